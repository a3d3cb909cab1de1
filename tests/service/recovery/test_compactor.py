"""A compaction beside everything else: what a successor finds means the same at every step of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Sequence

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from interceptd.ledger import journal as journal_module
from interceptd.ledger import records
from interceptd.ledger.journal import Journal
from interceptd.ledger.ledger import Ledger, LedgerFull, LedgerUnreadable, Rewriting
from interceptd.ledger.records import Mapped, Record, Unmapped
from interceptd.recovery.compactor import Compactor
from interceptd.scheduling.step_monitor import StepMonitor, Usage
from interceptd.scheduling.time_share import SLICE_NS, TimeShare, TimeShares

from .conftest import found
from .states import done, folded, region, state, uaddrs, vma

BEFORE: Sequence[Record] = (
    records.Opened(1, "vmm", 1),
    records.Created(2, 1, b"token", {}),
    done("map_vma", vma(0, 64, 100)),
    done("add_region", region(0, 64, 0), {"kind": "mmio"}),
    *(Mapped(gfn, gfn + 1, gfn, 3, "host", 2 * gfn) for gfn in range(8)),
    *(Unmapped(gfn, gfn + 1) for gfn in range(4)),
)


def used_up() -> TimeShare:
    """A share whose tasks let others run after every record."""
    ticks = itertools.count(0, 2 * SLICE_NS)
    return TimeShares(StepMonitor(now=lambda: next(ticks), usage=lambda: Usage(0, 0, 0))).share()


def read(ledger: Ledger) -> list[Record]:
    return [records.decode(frame) for frame, _ in ledger.frames()]


def journal_of(ledger: Ledger, log: Sequence[Record] = BEFORE) -> Journal:
    journal = Journal(ledger, lambda _: None)
    for record in log:
        journal.append(record)
    return journal


class Compacting:
    """One that lets the test run after every record."""

    def __init__(self, nursery: trio.Nursery, journal: Journal) -> None:
        self.compactor = Compactor()
        self._journal = journal
        nursery.start_soon(self.compactor.run)
        self.compactor.request(journal, used_up())

    async def steps(self) -> AsyncIterator[int]:
        """Yields after each step, and ends with the compaction."""
        for step in itertools.count():
            await trio.lowlevel.checkpoint()
            yield step
            if self._journal not in self.compactor._long:
                break


async def compacted(nursery: trio.Nursery, journal: Journal) -> int:
    """How many steps it took."""
    async for step in Compacting(nursery, journal).steps():
        last = step
    return last


async def test_a_compacted_log_is_short_and_means_the_same(ledger: Ledger, nursery: trio.Nursery) -> None:
    journal = journal_of(ledger)
    await compacted(nursery, journal)
    short = read(found(ledger))
    assert len(short) < len(BEFORE) - 4
    assert state(folded(short)) == state(folded(BEFORE))
    await compacted(nursery, journal)
    assert read(found(ledger)) == short


async def test_at_every_step_of_a_compaction_the_log_means_the_same(
    ledger: Ledger, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at that step: what is in the other half is nothing, or all."""
    monkeypatch.setattr(Ledger, "give_back", lambda _: iter(()))
    meaning = state(folded(BEFORE))
    lengths = []
    async for _ in Compacting(nursery, journal_of(ledger)).steps():
        log = read(found(ledger))
        lengths.append(len(log))
        assert state(folded(log)) == meaning
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) == 2, "one step exchanges them"
    assert len(lengths) >= len(BEFORE) + lengths[-1]


async def test_what_is_recorded_at_any_step_of_a_compaction_is_not_lost(
    ledger: Ledger, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step by itself, and as often as the compaction lets it: it must end all the same."""
    monkeypatch.setattr(Ledger, "give_back", lambda _: iter(()))
    steps = await compacted(nursery, journal_of(ledger))
    for at in (*range(steps), None):
        journal = journal_of(ledger)
        log = read(ledger)
        async for step in Compacting(nursery, journal).steps():
            if step == at or (at is None and step < 100 and step % 2):
                log += [Unmapped(step, step + 1), done("unmap_vma", uaddrs(step, 1))]
                for record in log[-2:]:
                    journal.append(record)
            assert state(folded(read(ledger))) == state(folded(log))
        assert state(folded(read(found(ledger)))) == state(folded(log))


async def test_the_memory_of_the_long_log_is_given_back(ledger: Ledger, nursery: trio.Nursery) -> None:
    journal = journal_of(
        ledger, [*BEFORE, records.Opened(1, "x" * (1 << 20), 1), records.Opened(1, "vmm", 1)]
    )
    before = os.fstat(ledger.descriptor).st_blocks
    await compacted(nursery, journal)
    assert (before - os.fstat(ledger.descriptor).st_blocks) * 512 >= 1 << 20


async def test_a_log_that_grew_twice_as_long_is_compacted_again(
    ledger: Ledger, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_BYTES", 2000)
    compactor = Compactor()
    nursery.start_soon(compactor.run)
    journal = Journal(ledger, lambda long: compactor.request(long, used_up()))
    longest = 0
    for turn in range(1000):
        journal.append(Unmapped(turn, turn + 1))
        longest = max(longest, ledger.log_bytes)
        if not turn % 50:
            await wait_all_tasks_blocked()
    await wait_all_tasks_blocked()
    assert 2000 < longest < 4000
    assert read(found(ledger)) == read(ledger)


# ------------------------------------------------ what ends one


async def test_a_ledger_that_is_closed_in_the_middle_is_let_go(ledger: Ledger, nursery: trio.Nursery) -> None:
    steps = await compacted(nursery, journal_of(ledger))
    for at in range(steps):
        other = Ledger.create()
        compacting = Compacting(nursery, journal := journal_of(other))
        async for step in compacting.steps():
            if step == at:
                compacting.compactor.forget(journal)
                other.close()
        await wait_all_tasks_blocked()
        compacting.compactor.request(journal := journal_of(ledger), used_up())
        await wait_all_tasks_blocked()
        assert journal not in compacting.compactor._long, "it goes on with the next"


async def test_a_log_that_has_no_room_to_be_compacted_in_stays_as_it_is(
    ledger: Ledger, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise LedgerFull

    monkeypatch.setattr(Rewriting, "append", full)
    journal = journal_of(ledger)
    await compacted(nursery, journal)
    assert read(found(ledger)) == [*BEFORE]
    assert not journal.is_void


async def test_a_log_that_makes_no_sense_is_given_up_and_the_next_is_compacted(
    ledger: Ledger, nursery: trio.Nursery
) -> None:
    """The daemon goes on: all its other partitions would else go down with it."""
    broken, whole = journal_of(Ledger.create()), journal_of(ledger)
    broken.append(done("unheard_of", {}))
    compactor = Compactor()
    nursery.start_soon(compactor.run)
    with capture_logs() as lines:
        compactor.request(broken, used_up())
        compactor.request(whole, used_up())
        await wait_all_tasks_blocked()
    assert [(line["event"], line["reason"][:24]) for line in lines] == [
        ("partition_not_kept", "a record makes no sense:")
    ]
    with pytest.raises(LedgerUnreadable):
        found(broken.ledger)
    assert len(read(found(ledger))) < len(BEFORE)
    broken.ledger.close()
