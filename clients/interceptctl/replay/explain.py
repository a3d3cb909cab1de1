"""Why the first difference may be there: what the recording says about its page before.

Owns finding these records, by reading the file again, and their wording. Must not know how they are repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.outcomes import Access, spelled
from intercept_protocol.recording import Chunk, Gap, Header, Mappings, Records, Regions, StateEnds, Vmas
from intercept_protocol.text import visible
from intercept_protocol.trace import Kind, Traced, Words, intercept_of, records_of
from interceptctl import units

from .verdict import Difference

SHOWN: Final = 8
"""Records before the difference."""
_GFNS: Final = frozenset(
    {Kind.REGION_ADDED, Kind.REGION_REMOVED, Kind.REGION_DANGLING, Kind.GUEST_MAPPED, Kind.GUEST_UNMAPPED}
)
_PAGES: Final = frozenset(
    {
        Kind.VMA_MAPPED, Kind.VMA_UNMAPPED, Kind.VMA_PROTECTED, Kind.BACKED, Kind.INVALIDATION_BEGUN,
        Kind.INVALIDATION_ENDED, Kind.RANGE_INVALIDATED,
    }
)  # fmt: skip
_REASONS_TO_GO: Final = frozenset(
    {
        Kind.REGION_REMOVED, Kind.VMA_UNMAPPED, Kind.VMA_PROTECTED, Kind.INVALIDATION_BEGUN,
        Kind.RANGE_INVALIDATED, Kind.REGION_ADDED,
    }
)  # fmt: skip


def explanation(header: Header, chunks: Iterable[Chunk], difference: Difference) -> tuple[list[str], str]:
    """What the recording says of the page until the difference, oldest first, and what is odd about it."""
    told: deque[str] = deque(maxlen=SHOWN)
    reached_since: int | None = None
    striking = ""
    reason_to_go = False
    for what in _touching(chunks, difference):
        match what:
            case str():
                told.append(what)
                reached_since, reason_to_go = None, False
            case record:
                told.append(f"{_when(record, header)}  {described(record, header.words)}")
                kind, goes = record.kind, _takes_away(record)
                if kind in _REASONS_TO_GO:
                    reason_to_go = True
                elif kind == Kind.GUEST_MAPPED and not goes:
                    reached_since, reason_to_go = record.number, False
                elif goes and not reason_to_go:
                    since = "the state" if reached_since is None else f"record {reached_since:,}"
                    striking = (
                        f"record {record.number:,} takes the page away from the guest, "
                        f"but no invalidation since {since} says why"
                    )
    return list(told), striking


def _takes_away(record: Traced) -> bool:
    unmapped = record.kind == Kind.GUEST_UNMAPPED
    return unmapped or (record.kind == Kind.GUEST_MAPPED and not record.detail & 7)


def _touching(chunks: Iterable[Chunk], difference: Difference) -> Iterator[str | Traced]:
    """What of the recording is about the page, before the difference."""
    gfn, page = difference.gfn, difference.page
    for chunk in chunks:
        match chunk:
            case Records(first, stored):
                for record in records_of(first, stored):
                    if record.number >= difference.record:
                        return
                    if _is_about(record, gfn, page):
                        yield record
            case Regions() | Vmas() | Mappings():
                yield from _of_state(chunk, gfn, page)
            case Gap(_, count):
                yield "gap: " + ("another daemon" if count is None else f"{units.of(count, 'record')} lost")
            case StateEnds(number):
                yield f"state complete before record {number:,}"


def _is_about(record: Traced, gfn: int | None, page: int | None) -> bool:
    start, end = record.values[0], record.values[0] + record.values[1]
    if record.kind == Kind.INTERCEPT:
        return gfn is not None and start == gfn
    if record.kind in _GFNS:
        return gfn is not None and start <= gfn < end
    return record.kind in _PAGES and page is not None and start <= page < end


def _of_state(chunk: Regions | Vmas | Mappings, gfn: int | None, page: int | None) -> Iterator[str]:
    match chunk:
        case Regions(regions):
            for region in regions:
                if gfn is not None and region.start_gfn <= gfn < region.start_gfn + region.page_count:
                    gfns = units.span(region.start_gfn, region.page_count)
                    yield f"state: {visible(region.kind)} region at gpa {gfns}, {visible(region.state)}"
        case Vmas(vmas):
            for vma in vmas:
                start = vma.start_uaddr >> PAGE_SHIFT
                if page is not None and start <= page < start + vma.page_count:
                    yield f"state: VMA {units.span(start, vma.page_count)}, pfn {vma.start_pfn:#x}"
        case Mappings(mappings):
            for mapping in mappings:
                if gfn is not None and mapping.start_gfn <= gfn < mapping.start_gfn + mapping.page_count:
                    gfns = units.span(mapping.start_gfn, mapping.page_count)
                    yield f"state: the guest reaches gpa {gfns}, {spelled(Access(mapping.access & 7))}"


def _when(record: Traced, header: Header) -> str:
    return f"record {record.number:,}, {seconds(record.time_ns, header)}:"


def seconds(time_ns: int, header: Header) -> str:
    """Since the recording began."""
    return f"{(time_ns - header.monotonic_ns) / 1e9:.6f} s"


def described(record: Traced, words: Words) -> str:
    """A record for people."""
    a, b, c, d = record.values[:4]
    access = spelled(Access(record.detail & 7))
    match record.kind:
        case Kind.INTERCEPT:
            intercept = intercept_of(record, words)
            answer = visible(f"{intercept.outcome} {intercept.reason}")
            return f"VP {record.vp_index}, {spelled(intercept.access)}: {answer}"
        case Kind.REGION_ADDED:
            kind = _word(words.region_kinds, record.detail)
            rights = spelled(Access(d & 7))
            return f"{kind} region added at gpa {units.span(a, b)}, {rights}, uaddr {units.address(c)}"
        case Kind.REGION_REMOVED:
            return f"region removed at gpa {units.span(a, b)}"
        case Kind.REGION_DANGLING:
            return f"region dangling at gpa {units.span(a, b)}"
        case Kind.GUEST_MAPPED if record.detail & 7:
            return f"the guest reaches gpa {units.span(a, b)}, {access}, page {d:#x} of its backing"
        case Kind.GUEST_MAPPED | Kind.GUEST_UNMAPPED:
            return f"the guest no longer reaches gpa {units.span(a, b)}"
        case Kind.VMA_MAPPED:
            return f"VMA declared at {units.span(a, b)}, {access}, pfn {c:#x}"
        case Kind.VMA_UNMAPPED:
            return f"VMAs removed at {units.span(a, b)}"
        case Kind.VMA_PROTECTED:
            return f"rights {access} set at {units.span(a, b)}"
        case Kind.BACKED:
            return f"a fault found page {c:#x} of backing {d:#x} at {units.span(a, b)}, {access}"
        case Kind.INVALIDATION_BEGUN | Kind.INVALIDATION_ENDED | Kind.RANGE_INVALIDATED:
            what = {Kind.INVALIDATION_BEGUN: "begun", Kind.INVALIDATION_ENDED: "ended"}.get(
                Kind(record.kind), "made"
            )
            return f"invalidation {what} by {_word(words.sources, record.detail)} of {units.span(a, b)}"
        case _:
            return f"record of kind {record.kind}"


def _word(words: Iterable[str], index: int) -> str:
    return visible(dict(enumerate(words)).get(index, f"number {index}"))
