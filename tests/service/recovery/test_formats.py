"""Ledgers of the formats that were written so far: this version goes on from each, or says why not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes.ledger_file import CALL, EVENT, INTERCEPT, example, load, parts, restored_example
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.address_space.declared import Vma
from interceptd.address_space.missing_faults import removal_in
from interceptd.ledger import ledger as layout
from interceptd.ledger import records
from interceptd.ledger.ledger import Ledger, LedgerUnreadable
from interceptd.ledger.ledger_format import LEDGER_FORMAT, READABLE_FORMATS
from interceptd.ledger.records import KeptRegion
from interceptd.pages.mapping import Cache, Frame, Mapping
from interceptd.recovery.fold import Fold

HERE = Path(__file__).parent
FILES = {number: HERE / f"ledger_format_{number}.zip" for number in (1, 2)}
RESTORED_FILES = {2: HERE / "ledger_format_2_restored.zip"}
READ, RW = Access.READ, Access.READ | Access.WRITE


def test_there_is_a_ledger_of_each_format() -> None:
    assert set(FILES) == READABLE_FORMATS
    assert max(FILES) == LEDGER_FORMAT


@pytest.fixture(params=FILES)
def kept(request: pytest.FixtureRequest) -> Ledger:
    return Ledger.open(load(FILES[request.param]))


def test_what_is_kept_of_a_partition_is_read(kept: Ledger) -> None:
    fold = Fold()
    for frame, _ in kept.frames():
        fold.read(frame)
    assert fold.opened == records.Opened(1001, "a VMM", 1)
    request = {"address_space": "declared", "hypervisor": "vmm"}
    assert fold.created == records.Created(1, 5, b"0123456789abcdef", request)
    assert fold.joined == {
        1: records.Joined(1, 1002, "hypervisor", 1, 0, lists=True),
        2: records.Joined(2, 1003, "vp", 1, 3),
        3: records.Joined(3, 1004, "notifier", 1),
    }
    assert {inbox: (last.serial, last.method) for inbox, last in fold.last.items()} == {
        0: (10, "change_regions"),
        3: (4, "invalidate_end"),
    }
    assert fold.last[0].reply == {"kinds": ["mmio", "movable"]}
    assert fold.regions == {
        768: KeptRegion(768, 784, 16, "pinned", inferred=False, access=1, dangling=True),
        256: KeptRegion(256, 272, 16, "mmio", inferred=False, access=3),
        512: KeptRegion(512, 528, 16, "movable", inferred=True, access=7),
        1024: KeptRegion(1024, 1040, 64, "movable", inferred=True, access=7),
    }
    assert list(fold.vmas) == [
        Vma(16, 32, 1000, RW, io=True),
        Vma(64, 66, 2000, RW, io=False),
        Vma(67, 68, 2003, RW, io=False),
        Vma(68, 72, 2004, READ, io=False),
        Vma(128, 144, 3000, READ, io=False),
    ]
    first = Frame("host", 1000)
    assert list(fold.table) == [
        Mapping(256, 260, first, 16, RW, Cache.NOT_CACHED),
        Mapping(262, 272, first.ahead(6), 22, RW, Cache.NOT_CACHED),
        Mapping(512, 528, None, 16, Access.NONE),
    ]
    assert fold.begun == {3: Counter({UaddrRange(start=16, end=18): 1, UaddrRange(start=128, end=130): 2})}
    assert fold.gone == {2: records.Gone(2, 20, 21)}
    assert list(fold.doubt) == [GfnRange(start=264, end=266), GfnRange(start=270, end=272)]
    assert (fold.mmio_granularity, fold.attached) == ("page", records.Attached(promised=False))


def test_what_is_owed_to_its_connections_is_read(kept: Ledger) -> None:
    assert (kept.restarts, kept.last_msgid, bytes(kept.event)) == (1, 77, EVENT)
    inboxes = [kept.inbox(number) for number in range(4)]
    assert [inbox.take_over() for inbox in inboxes] == [CALL[:20], b"", INTERCEPT, b""]
    assert [inbox.owes_hello for inbox in inboxes] == [False, False, False, True]


@pytest.mark.parametrize("file", RESTORED_FILES.values(), ids=str)
def test_what_is_kept_of_a_restored_guest_is_read(file: Path) -> None:
    kept, fold = Ledger.open(load(file)), Fold()
    for frame, _ in kept.frames():
        fold.read(frame)
    request = {"around_pages": 8, "on_image_error": "kill"}
    assert fold.restoring == records.Restoring(1000, 6, "a starter", 1024, request, (1001, 3))
    regions = [(0x10000, 0x300000, 0, 4096), (0x900000, 0x100000, 0x300000, 4096)]
    assert fold.handed_off == records.HandedOff(1006, regions)
    all_rights = RW | Access.EXECUTE
    assert list(fold.table) == [
        Mapping(0, 4, None, 16, Access.NONE),
        Mapping(4, 5, Frame("zero", 20), 20, all_rights),
        Mapping(5, 6, None, 21, Access.NONE),
        Mapping(6, 8, Frame("image", 6), 22, all_rights),
        Mapping(8, 768, None, 24, Access.NONE),
        Mapping(768, 1024, None, 2304, Access.NONE),
    ]
    assert fold.gone == {2: records.Gone(2, 2400, 2402)}
    assert [(each.start, each.end) for each in fold.removed] == [(20, 22), (2304, 2310), (2400, 2402)]
    assert removal_in(kept.event) == UaddrRange(start=16, end=18)


@pytest.mark.parametrize(
    ("make", "file"),
    [(example, FILES[LEDGER_FORMAT]), (restored_example, RESTORED_FILES[LEDGER_FORMAT])],
    ids=["example", "restored"],
)
def test_this_version_writes_what_is_in_its_file(make: Callable[[], Ledger], file: Path) -> None:
    """If not, it writes another format, which needs a number and a file of its own."""
    ledger = make()
    for start, part in parts(file):
        assert os.pread(ledger.descriptor, len(part), start) == part
    ledger.close()


def test_a_later_format_is_refused_by_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "LEDGER_FORMAT", 3)
    later = Ledger.create()
    with pytest.raises(LedgerUnreadable, match="it has format 3, and this version reads 1, 2"):
        Ledger.open(os.dup(later.descriptor))
    later.close()
