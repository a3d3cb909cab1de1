"""Folds as values that can be compared, and the logs that they are drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hypothesis import strategies as st

from intercept_protocol.addresses import PAGE_SHIFT
from interceptd.ledger import records
from interceptd.ledger.records import Record
from interceptd.recovery.fold import Fold


def folded(log: Iterable[Record]) -> Fold:
    fold = Fold()
    for record in log:
        fold.read(records.encode(record))
    return fold


def state(fold: Fold) -> dict[str, object]:
    """All that a successor looks at."""
    return {
        "opened": fold.opened,
        "created": fold.created,
        "joined": fold.joined,
        "last": fold.last,
        "regions": fold.regions,
        "vmas": list(fold.vmas),
        "table": list(fold.table),
        "begun": {inbox: begun for inbox, begun in fold.begun.items() if begun},
        "gone": (fold.gone, fold.gone_count),
        "in doubt": list(fold.doubt),
        "granularity": fold.mmio_granularity,
        "attached": fold.attached,
        "restoring": (fold.restoring, fold.handed_off),
        "removed": list(fold.removed),
    }


Fields = Mapping[str, object]


def done(method: str, request: Fields, reply: Fields | None = None, inbox: int = 0) -> Record:
    return records.Done(inbox, 1, method, dict(request), None if reply is None else dict(reply))


def region(gfn: int, count: int, page: int, kind: str = "mmio", **rights: bool) -> Fields:
    where = {"start_gfn": gfn, "page_count": count, "start_uaddr": page << PAGE_SHIFT}
    return {**where, "kind": kind, "writable": True, "executable": False, **rights}


def uaddrs(page: int, count: int) -> Fields:
    return {"start_uaddr": page << PAGE_SHIFT, "page_count": count}


def vma(page: int, count: int, pfn: int, **rights: bool) -> Fields:
    given = {"readable": True, "writable": True, "executable": False, "io": False, **rights}
    return {**uaddrs(page, count), "start_pfn": pfn, **given}


def length(page: int, count: int) -> Fields:
    return {"start_uaddr": page << PAGE_SHIFT, "length": count << PAGE_SHIFT}


PAGES = st.integers(0, 12)
COUNTS = st.integers(1, 4)
INBOXES = st.integers(0, 4)
KINDS = st.sampled_from(["mmio", "movable", "pinned"])
REGIONS = st.builds(region, PAGES, COUNTS, PAGES, KINDS)
VMAS = st.builds(vma, PAGES, COUNTS, PAGES)
RANGES = st.builds(lambda start, count: (start, start + count), PAGES, COUNTS)


def _kinds(request: Fields) -> Fields:
    return {"kinds": [each["kind"] for each in request["add"]]}  # type: ignore[attr-defined] # a list


CHANGES = st.fixed_dictionaries({
    "remove": st.lists(st.builds(lambda gfn: {**uaddrs(0, 1), "start_gfn": gfn}, PAGES), max_size=2),
    "add": st.lists(REGIONS, max_size=2),
})  # fmt: skip
RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.builds(records.Opened, st.integers(0, 99), st.just("vmm"), st.integers(0, 9)),
    st.builds(records.Created, st.integers(0, 9), st.integers(1, 9), st.just(b"token"), st.just({})),
    st.builds(records.Joined, INBOXES, st.integers(0, 99), st.just("vp"), st.integers(0, 9), PAGES),
    st.builds(records.Left, INBOXES),
    st.builds(lambda call: done("add_region", call, {"kind": call["kind"]}), REGIONS),
    st.builds(lambda gfn: done("remove_region", {**uaddrs(0, 1), "start_gfn": gfn}), PAGES),
    st.builds(lambda call: done("change_regions", call, _kinds(call)), CHANGES),
    st.builds(lambda vma: done("map_vma", vma), VMAS),
    st.builds(lambda vmas: done("map_vmas", {"vmas": vmas}), st.lists(VMAS, max_size=3)),
    st.builds(lambda page, count: done("unmap_vma", uaddrs(page, count)), PAGES, COUNTS),
    st.builds(lambda page, count: done("protect_vma", {**uaddrs(page, count), "readable": True,
              "writable": False, "executable": True}), PAGES, COUNTS),
    st.builds(lambda promised: done("attach_memory", {"promise_begin_end": promised}), st.booleans()),
    st.builds(lambda page, inbox: done("invalidate_begin", length(page, 2), inbox=inbox), PAGES, INBOXES),
    st.builds(lambda page, inbox: done("invalidate_end", length(page, 2), inbox=inbox), PAGES, INBOXES),
    st.builds(records.Changing, st.lists(RANGES, min_size=1, max_size=3)),
    st.builds(records.Settled),
    st.builds(lambda start, count, page, access: records.Mapped(start, start + count, page, access, "host",
              100 * page), PAGES, COUNTS, PAGES, st.integers(1, 7)),
    st.builds(lambda start, count, page: records.Mapped(start, start + count, page, 0), PAGES, COUNTS, PAGES),
    st.builds(lambda gfns: records.Unmapped(*gfns), RANGES),
    st.builds(records.Served, st.integers(0, 5)),
    st.builds(records.Dangling, PAGES),
    st.builds(lambda pages: records.HandedOff(7, [(0x10000, pages << 12, 0, 4096)]), COUNTS),
    st.builds(lambda pages: records.Removed(*pages), RANGES),
    st.builds(records.Policy, st.sampled_from(["page", "vma"])),
)  # fmt: skip


@st.composite
def logs(draw: st.DrawFn) -> list[Record]:
    """With what went counted, as a journal counts it, and each part of an end settled once. Some are of a
    restored guest, which the first record says."""
    log: list[Record] = []
    if draw(st.booleans()):
        log.append(records.Restoring(1000, 1, "a starter", 16, {}, (5, 6)))
    gone = 0
    for record in draw(st.lists(st.one_of(RECORDS, st.just(None)), max_size=25)):
        if record is not None:
            log.append(record)
            continue
        gone += 1
        start, end = draw(RANGES)
        log.append(records.Gone(gone, start, end))
    return log
