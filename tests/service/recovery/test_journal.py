"""What the parts of a partition record, when a compaction is asked for, and what a full log means."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.hypervisor.slat import SoftwareSlat
from interceptd.ledger import journal as journal_module
from interceptd.ledger import records
from interceptd.ledger.journal import Journal
from interceptd.ledger.ledger import Ledger, LedgerUnreadable
from interceptd.ledger.records import Gone, Left, Mapped, Record, Served, Unmapped
from interceptd.mmu_notifier import MmuNotifier
from interceptd.pages.mapping import Cache, Frame, Mapping
from interceptd.telemetry.counters import Source
from interceptd.telemetry.event_bus import EventBus, PartitionPublisher

from .conftest import found


def logged(ledger: Ledger) -> list[Record]:
    return [records.decode(frame) for frame, _ in ledger.frames()]


def nothing(_: Journal) -> None:
    pass


@pytest.fixture
def journal(ledger: Ledger) -> Journal:
    return Journal(ledger, nothing)


def test_what_is_recorded_is_in_the_log_at_once(journal: Journal) -> None:
    journal.append(Left(7))
    assert logged(found(journal.ledger)) == [Left(7)]


def test_a_long_log_asks_to_be_compacted_until_it_is(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_BYTES", 1000)
    asked: list[int] = []
    journal = Journal(ledger, lambda journal: asked.append(journal.ledger.log_bytes))
    while not asked:
        journal.append(Left(1))
    assert 1000 < asked[0] <= 1000 + 16
    journal.append(Left(1))
    assert len(asked) == 2, "again: the first may have been forgotten"
    journal.compacted()
    twice = 2 * ledger.log_bytes
    while len(asked) == 2:
        journal.append(Left(1))
    assert twice < asked[-1] <= twice + 16


def test_a_short_log_is_compacted_at_the_same_length_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_BYTES", 1000)
    asked: list[int] = []
    journal = Journal(ledger, lambda journal: asked.append(journal.ledger.log_bytes))
    journal.append(Left(1))
    journal.compacted()
    while not asked:
        journal.append(Left(1))
    assert 1000 < asked[0] <= 1000 + 16


def test_a_full_log_ends_the_keeping_and_nothing_else(ledger: Ledger, journal: Journal) -> None:
    ledger._limit = ledger._end + 100
    with capture_logs() as lines:
        for _ in range(100):
            journal.append(Left(1))
    told = [line for line in lines if line["event"] == "partition_not_kept"]
    assert [line["reason"] for line in told] == ["its log is full"]
    assert journal.is_void
    with pytest.raises(LedgerUnreadable, match="gave it up"):
        found(ledger)


def test_a_journal_that_gave_up_records_nothing(journal: Journal) -> None:
    with capture_logs() as lines:
        journal.give_up("the store is full")
        journal.give_up("again")
        journal.append(Left(1))
    assert [line["reason"] for line in lines] == ["the store is full"]
    assert logged(journal.ledger) == []


# ------------------------------------------------ what went


def notifier(journal: Journal | None) -> MmuNotifier:
    return MmuNotifier(lambda: 64, PartitionPublisher(EventBus(), 1), journal)


@pytest.mark.parametrize("source", Source)
def test_what_no_request_tells_again_is_recorded(journal: Journal, source: Source) -> None:
    channel = notifier(journal)
    channel.invalidate(UaddrRange.at_page(5, 3), source)
    unrepeated = source in {Source.USERFAULTFD, Source.COMPARISON}
    assert logged(journal.ledger) == ([Gone(1, 5, 8)] if unrepeated else [])


async def test_what_went_is_served_with_its_batch_and_none_before(journal: Journal) -> None:
    channel = notifier(journal)
    for page in (1, 2):
        channel.invalidate(UaddrRange.at_page(page, 1), Source.USERFAULTFD)
    batch = channel.take()
    channel.invalidate(UaddrRange.at_page(3, 1), Source.USERFAULTFD)
    channel.served(batch)
    assert logged(journal.ledger) == [Gone(1, 1, 2), Gone(2, 2, 3), Gone(3, 3, 4), Served(2)]
    channel.served(channel.take())
    channel.served(channel.take())
    assert logged(journal.ledger)[4:] == [Served(3)], "once"


async def test_a_successor_serves_what_had_gone_and_does_not_record_it_again(ledger: Ledger) -> None:
    """Each daemon that dies in its recovery would else double the log."""
    journal = Journal(ledger, nothing, gone_count=7)
    channel = notifier(journal)
    channel.invalidate_again(UaddrRange.at_page(1, 1), Source.USERFAULTFD)
    assert logged(ledger) == []
    channel.served(channel.take())
    channel.invalidate(UaddrRange.at_page(2, 1), Source.USERFAULTFD)
    assert logged(ledger) == [Served(7), Gone(8, 2, 3)]


async def test_where_nothing_went_nothing_is_served(journal: Journal) -> None:
    channel = notifier(journal)
    channel.invalidate(UaddrRange.at_page(1, 1))
    channel.served(channel.take())
    assert logged(journal.ledger) == []


# ------------------------------------------------ the table


def test_each_edit_of_the_table_is_recorded(journal: Journal) -> None:
    table = SoftwareSlat(journal)
    backed = Mapping(0, 8, Frame("host", 100), 50, Access.READ | Access.WRITE, Cache.NOT_CACHED)
    waiting = Mapping(4, 6, None, 54, Access.NONE)
    assert table.insert(backed)
    assert not table.insert(waiting)
    table.replace(waiting)
    table.clear(GfnRange(start=20, end=30))
    table.clear(GfnRange(start=0, end=3))
    assert logged(journal.ledger) == [
        Mapped(0, 8, 50, 3, "host", 100, cached=False),
        Mapped(4, 6, 54, 0),
        Unmapped(0, 3),
    ]
