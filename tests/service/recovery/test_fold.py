"""What a log adds up to: each record, each method, and the shortest log with the same meaning."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import NOTIFIER_METHODS, VMM_METHODS, RegionKind
from intercept_protocol.outcomes import Access
from interceptd.address_space.declared import Vma
from interceptd.ledger import records
from interceptd.ledger.ledger import LedgerUnreadable
from interceptd.ledger.records import (
    Attached,
    Changing,
    Created,
    Dangling,
    Gone,
    Joined,
    KeptBegin,
    KeptRegion,
    KeptVma,
    Left,
    Mapped,
    Opened,
    Policy,
    Record,
    Served,
    Settled,
    Unmapped,
)
from interceptd.memory.region import KindOrigin, RegionState
from interceptd.pages.mapping import Cache, Frame, Mapping
from interceptd.recovery import fold as fold_module
from interceptd.recovery.fold import Fold, region_of

from .states import done, folded, length, logs, region, state, uaddrs, vma

RW = Access.READ | Access.WRITE


def test_every_record_has_a_meaning() -> None:
    assert set(fold_module._APPLY) == set(Record.__args__)


def test_every_logged_method_has_a_meaning() -> None:
    """`create_partition` and `restore` have records of their own."""
    calls = [*VMM_METHODS.values(), *NOTIFIER_METHODS.values()]
    logged = {call.METHOD for call in calls if call.RESTART == "logged"}
    assert set(fold_module._DONE) == logged - {"create_partition", "restore"}


def added(fold: Fold) -> dict[int, tuple[int, int, str]]:
    return {gfn: (each.end_gfn, each.uaddr_page, each.kind) for gfn, each in fold.regions.items()}


# ------------------------------------------------ connections


def test_connections_join_and_leave() -> None:
    fold = folded([
        Opened(11, "a VMM", 1), Created(2, 5, b"token", {"address_space": "declared"}),
        Joined(2, 12, "vp", 3, 7), Joined(3, 13, "notifier", 4), Joined(1, 14, "hypervisor", 5, lists=True),
        done("invalidate_begin", length(0, 1), inbox=3), Left(3),
    ])  # fmt: skip
    assert fold.opened == Opened(11, "a VMM", 1)
    assert fold.created == Created(2, 5, b"token", {"address_space": "declared"})
    assert fold.joined == {2: Joined(2, 12, "vp", 3, 7), 1: Joined(1, 14, "hypervisor", 5, lists=True)}
    assert (fold.last, fold.begun) == ({}, {})


def test_the_last_request_of_each_connection_is_known() -> None:
    begin, vma = done("invalidate_begin", length(0, 1), inbox=3), done("unmap_vma", uaddrs(0, 1))
    fold = folded([done("unmap_vma", uaddrs(5, 1)), begin, vma])
    assert fold.last == {3: begin, 0: vma}


# ------------------------------------------------ regions and VMAs


def test_regions_come_and_go() -> None:
    fold = folded([
        done("add_region", region(0, 4, 50), {"kind": "mmio"}),
        done("add_region", region(8, 4, 60, "auto", writable=False, executable=True), {"kind": "movable"}),
        done("remove_region", {**uaddrs(50, 4), "start_gfn": 0}),
    ])  # fmt: skip
    access = int(Access.READ | Access.EXECUTE)
    assert fold.regions == {8: KeptRegion(8, 12, 60, "movable", inferred=True, access=access)}


def test_a_change_of_regions_is_one_step() -> None:
    fold = folded([
        done("add_region", region(0, 4, 50), {"kind": "mmio"}),
        done("add_region", region(8, 4, 60), {"kind": "mmio"}),
        done(
            "change_regions",
            {
                "remove": [{**uaddrs(50, 4), "start_gfn": 0}],
                "add": [region(0, 2, 70), region(2, 2, 80, "auto")],
            },
            {"kinds": ["mmio", "movable"]},
        ),
    ])  # fmt: skip
    assert added(fold) == {8: (12, 60, "mmio"), 0: (2, 70, "mmio"), 2: (4, 80, "movable")}
    assert [each.inferred for each in fold.regions.values()] == [False, False, True]


def test_a_pinned_region_is_dangling_until_it_is_another() -> None:
    add = done("add_region", region(0, 4, 50, "pinned"), {"kind": "pinned"})
    remove = {**uaddrs(50, 4), "start_gfn": 0}
    log = [add, Dangling(0)]
    assert folded(log).regions[0].dangling
    assert not folded([*log, done("remove_region", remove), add]).regions[0].dangling
    change = {"remove": [remove], "add": [region(0, 4, 50, "pinned")]}
    assert not folded([*log, done("change_regions", change, {"kinds": ["pinned"]})]).regions[0].dangling
    assert folded([Dangling(0), add]).regions[0].dangling is False


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("inferred", [False, True])
def test_a_kept_region_becomes_a_region(*, inferred: bool, dangling: bool) -> None:
    made = region_of(KeptRegion(8, 12, 60, "movable", inferred, 5, dangling))
    assert (made.gfns, made.uaddrs) == (GfnRange(start=8, end=12), UaddrRange(start=60, end=64))
    assert (made.kind, made.access) == (RegionKind.MOVABLE, Access.READ | Access.EXECUTE)
    assert made.kind_origin is (KindOrigin.INFERRED if inferred else KindOrigin.STATED)
    assert made.state is (RegionState.DANGLING if dangling else RegionState.LIVE)
    assert made.mapped_gfns == 0


def test_vmas_are_mapped_cut_and_protected() -> None:
    fold = folded([
        done("map_vma", vma(0, 4, 100)),
        done("map_vmas", {"vmas": [vma(8, 2, 200, io=True, writable=False)]}),
        done("unmap_vma", uaddrs(1, 1)),
        done("protect_vma", {**uaddrs(3, 6), "readable": True, "writable": False, "executable": True}),
    ])  # fmt: skip
    fetched = Access.READ | Access.EXECUTE
    assert list(fold.vmas) == [
        Vma(0, 1, 100, RW, io=False), Vma(2, 3, 102, RW, io=False), Vma(3, 4, 103, fetched, io=False),
        Vma(8, 9, 200, fetched, io=True), Vma(9, 10, 201, Access.READ, io=True),
    ]  # fmt: skip


# ------------------------------------------------ the rest


def test_begins_nest_and_end() -> None:
    begin = [done("invalidate_begin", length(4, 2), inbox=inbox) for inbox in (3, 3, 4)]
    end = [done("invalidate_end", length(4, 2), inbox=inbox) for inbox in (3, 4)]
    fold = folded([*begin, *end])
    assert fold.begun[3] == Counter({UaddrRange(start=4, end=6): 1})
    assert not fold.begun[4]


def test_memory_is_attached_with_or_without_a_promise() -> None:
    assert folded([]).attached is None
    for promised in (False, True):
        log = [done("attach_memory", {"promise_begin_end": promised})]
        assert folded(log).attached == Attached(promised=promised)
    assert folded([done("attach_memory", {})]).attached == Attached(promised=False)


def test_the_last_policy_counts() -> None:
    assert folded([]).mmio_granularity is None
    assert folded([Policy("page"), Policy("vma")]).mmio_granularity == "vma"


def test_the_table_is_as_it_was_edited() -> None:
    fold = folded([
        Mapped(0, 8, 50, 3, "host", 100, cached=False), Mapped(4, 6, 70, 0), Unmapped(7, 20),
    ])  # fmt: skip
    frame = Frame("host", 100)
    assert list(fold.table) == [
        Mapping(0, 4, frame, 50, RW, Cache.NOT_CACHED),
        Mapping(4, 6, None, 70, Access.NONE),
        Mapping(6, 7, frame.ahead(6), 56, RW, Cache.NOT_CACHED),
    ]
    assert (fold.table.gfn_count, fold.table.no_access_gfns) == (7, 2)


def test_what_went_is_known_until_it_is_served() -> None:
    log: list[Record] = [Gone(1, 0, 1), Gone(2, 4, 6), Gone(3, 8, 9), Served(2)]
    fold = folded(log)
    assert (fold.gone, fold.gone_count) == ({3: Gone(3, 8, 9)}, 3)
    assert folded([*log, Served(3), Gone(1, 0, 1)]).gone == {1: Gone(1, 0, 1)}, "a successor counts again"


def gfns(fold: Fold) -> list[tuple[int, int]]:
    return [(each.start, each.end) for each in fold.doubt]


def test_what_the_hypervisor_was_asked_for_is_in_doubt_until_it_is_settled() -> None:
    log: list[Record] = [Changing([(0, 4), (8, 9)])]
    assert gfns(folded(log)) == [(0, 4), (8, 9)]
    assert gfns(folded([*log, Settled()])) == []
    assert gfns(folded([*log, Settled(), Changing([(2, 3)])])) == [(2, 3)]


def test_a_successor_settles_what_is_in_doubt_part_by_part() -> None:
    """And may die between two of them."""
    log: list[Record] = [Changing([(0, 4), (8, 9)]), Changing([(0, 2)])]
    assert gfns(folded(log)) == [(0, 2), (2, 4), (8, 9)]
    assert gfns(folded([*log, Settled()])) == [(2, 4), (8, 9)]
    assert gfns(folded([*log, Settled(), Changing([(2, 9)]), Settled()])) == []


# ------------------------------------------------ the shortest log


@given(logs())
def test_the_shortest_log_means_the_same(log: list[Record]) -> None:
    fold = folded(log)
    short = list(fold.shortest_log())
    assert state(folded(short)) == state(fold)
    assert len(list(folded(short).shortest_log())) == len(short)


@given(logs(), logs())
def test_what_comes_behind_the_shortest_log_means_the_same(log: list[Record], more: list[Record]) -> None:
    """A compaction copies it behind."""
    gone = folded(log).gone_count
    more = [
        records.Gone(each.number + gone, each.start_page, each.end_page) if isinstance(each, Gone) else each
        for each in more
    ]
    assert state(folded([*folded(log).shortest_log(), *more])) == state(folded([*log, *more]))


@given(logs(), st.data())
def test_what_is_not_there_may_be_taken_away(log: list[Record], data: st.DataObject) -> None:
    away: list[Record] = [
        Left(9), Unmapped(90, 99), Served(0), Settled(), Dangling(90),
        done("remove_region", {**uaddrs(0, 1), "start_gfn": 90}), done("unmap_vma", uaddrs(90, 1)),
        done("protect_vma", {**uaddrs(90, 1), "readable": True, "writable": False, "executable": False}),
        done("invalidate_end", length(90, 1)),
    ]  # fmt: skip
    less = {"last", "in doubt"}
    before, after = state(folded(log)), state(folded([*log, data.draw(st.sampled_from(away))]))
    assert {key: after[key] for key in after.keys() - less} == {
        key: before[key] for key in before.keys() - less
    }


@given(logs())
def test_the_kept_forms_may_repeat_what_is_known(log: list[Record]) -> None:
    fold = folded(log)
    kept = [
        each for each in fold.shortest_log() if isinstance(each, KeptRegion | KeptVma | KeptBegin | Mapped)
    ]
    for record in kept:
        fold.apply(record)
    assert state(fold) == state(folded(log))


# ------------------------------------------------ what makes no sense


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"garbage",
        records.encode(Left(1))[:-1],
        b"\x92\xa7unknown\x01",
        b"\x91\xa4left",
        b"\x92\xa4left\xa1x",
        records.encode(done("kick", {})),
        records.encode(done("add_region", region(0, 4, 50), {"kind": "unheard of"})),
        records.encode(done("add_region", region(0, 4, 50), {})),
        records.encode(done("add_region", region(0, 4, 50))),
        records.encode(done("add_region", {}, {"kind": "mmio"})),
        records.encode(done("unmap_vma", {**uaddrs(0, 1), "page_count": 0})),
        records.encode(done("change_regions", {"remove": [], "add": [region(0, 4, 50)]}, {"kinds": []})),
    ],
)
def test_a_record_that_makes_no_sense_is_found(frame: bytes) -> None:
    with pytest.raises(LedgerUnreadable, match=r"a record makes no sense: ."):
        Fold().read(frame)


def test_elements_at_the_end_that_a_later_version_adds_are_skipped() -> None:
    fold = Fold()
    fold.read(b"\x94\xa4left\x01\xa4more\x02")
    fold.read(records.encode(Opened(1, "vmm", 2))[:0] + b"\x95\xa6opened\x01\xa3vmm\x02\xa5later")
    assert fold.opened == Opened(1, "vmm", 2)
