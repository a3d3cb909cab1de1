"""A recording becomes a history.

Owns what each record and each part of a state means for it, as far as it is drawn. Must not know files, nor
how a history looks. Lists and records are applied in the file's order, in which a later one is right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.messages.inspection import MappingView, RegionView
from intercept_protocol.outcomes import Access, spelled
from intercept_protocol.recording import Chunk, End, Gap, Header, Mappings, Records, Regions, StateBegins
from intercept_protocol.trace import NO_MEMORY, RECORD_SIZE, Kind, backing_number
from interceptctl.page_map import Span

from .held import Held, Layer
from .history import IMAGE_BACKINGS, STAGES, Change, History, Hole, Intercepts, Invalidation, Whole

_COLUMNS: Final = np.dtype(
    [
        ("time", "<u8"),
        ("kind", "<u2"),
        ("vp", "<u2"),
        ("detail", "<u4"),
        *((name, "<u8") for name in "abcdef"),
    ]
)
"""A record."""
_IMAGE_BACKINGS: Final = {backing_number(name): name for name in IMAGE_BACKINGS}
PAGES: Final = 1 << 52
"""Beyond this number nothing has an address."""


class UnknownWord(ValueError):
    """A record has a number that stands for nothing."""


def history_of(header: Header, chunks: Iterable[Chunk]) -> History:
    """Raises `UnknownWord`, and what `chunks` raises."""
    return _Reader(header).read(chunks)


_Row = tuple[int, int, int, int, int, int, int, int, int, int]


class _Reader:
    def __init__(self, header: Header) -> None:
        self._header = header
        self._origin = min(max(0, header.monotonic_ns), 2**63 - 1)
        self._now = self._known_since = 0
        self._found = History(header, _columns([], []))
        self._numbers: list[npt.NDArray[np.uint64]] = []
        self._intercepts: list[npt.NDArray[np.void]] = []
        self._regions = Layer(self._found.regions, self._found.region_pages)
        self._mapped = Layer(self._found.mapped, self._found.mapped_pages)
        self._open: defaultdict[tuple[int, int, int], list[tuple[int, int]]] = defaultdict(list)
        self._uaddrs: tuple[Whole, Whole, Whole] | None = None
        self._after_hole: Hole | None = None
        self._kinds: dict[int, Callable[[int, _Row], None]] = {
            Kind.REGION_ADDED: self._region_added,
            Kind.REGION_REMOVED: self._region_removed,
            Kind.GUEST_MAPPED: self._guest_mapped,
            Kind.GUEST_UNMAPPED: self._guest_unmapped,
            Kind.INVALIDATION_BEGUN: self._begun,
            Kind.INVALIDATION_ENDED: self._ended,
            Kind.RANGE_INVALIDATED: self._at_once,
            Kind.INVALIDATION_SERVED: self._served,
        }

    def read(self, chunks: Iterable[Chunk]) -> History:
        for chunk in chunks:
            match chunk:
                case Records(first, stored):
                    self._records(first, stored)
                case Regions(regions):
                    self._list_regions(regions)
                case Mappings(mappings):
                    self._list_mappings(mappings)
                case Gap(number, count):
                    self._after_hole = Hole(number, count, self._now, self._now)
                    self._forget()
                case StateBegins():
                    self._forget()
                case End(reason):
                    self._found.end = reason
        self._close_hole(self._now)
        self._forget()
        found = self._found
        found.intercepts = _columns(self._numbers, self._intercepts)
        found.until = max(self._now, 1)
        return found

    # ------------------------------------------------ the lists of a state

    def _list_regions(self, views: Iterable[RegionView]) -> None:
        for view in views:
            rights = Access.READ | Access.WRITE * view.writable | Access.EXECUTE * view.executable
            what, page = f"{view.kind} {spelled(rights)}", _page(view.start_uaddr >> PAGE_SHIFT)
            self._regions.fill(Held(*_span(view.start_gfn, view.page_count), self._now, what, page))
        self._uaddrs = None

    def _list_mappings(self, views: Iterable[MappingView]) -> None:
        for view in views:
            if view.access:
                self._mapped.fill(Held(*_span(view.start_gfn, view.page_count), self._now, ""))

    def _forget(self) -> None:
        """Nothing is known from here on."""
        self._regions.clear(self._now)
        self._mapped.clear(self._now)
        self._uaddrs = None
        self._known_since = self._now
        for (source, start, count), begun in self._open.items():
            for number, since in begun:
                self._invalidation(number, since, source, start, count)
        self._open.clear()

    # ------------------------------------------------ records

    def _records(self, first: int, stored: bytes) -> None:
        table = np.frombuffer(stored, _COLUMNS)
        self._found.records += len(stored) // RECORD_SIZE
        self._close_hole(self._since(int(table["time"][0])))
        intercepts = np.nonzero(table["kind"] == Kind.INTERCEPT)[0]
        codes = table["detail"][intercepts] & 0xFF
        if len(wrong := np.nonzero(codes >= len(self._header.answers))[0]):
            raise UnknownWord(f"record {first + int(intercepts[wrong[0]])} has an answer without a name")
        self._numbers.append(intercepts.astype(np.uint64) + np.uint64(first))
        relative = table[intercepts].copy()
        relative["time"] -= np.uint64(self._origin)
        self._intercepts.append(relative)
        others = np.nonzero(np.isin(table["kind"], list(self._kinds)))[0]
        for index, row in zip(others.tolist(), table[others].tolist(), strict=True):
            self._now = self._since(row[0])
            self._kinds[row[1]](first + index, row)
        self._now = self._since(int(table["time"][-1]))

    def _since(self, time_ns: int) -> int:
        return _signed(time_ns - self._origin)

    def _close_hole(self, until: int) -> None:
        if self._after_hole is not None:
            self._found.holes.append(self._after_hole._replace(until=max(until, self._after_hole.since)))
            self._after_hole = None

    def _region_added(self, number: int, row: _Row) -> None:
        kind = _word(self._header.region_kinds, row[3], number)
        held = Held(*_span(row[4], row[5]), self._now, f"{kind} {spelled(Access(row[7] & 7))}", _page(row[6]))
        there = self._regions.held.overlapping(held.start, held.end)
        if [each._replace(since=held.since) for each in there] != [held]:
            self._regions.put(held)
            self._uaddrs = None

    def _region_removed(self, _number: int, row: _Row) -> None:
        self._regions.take(*_span(row[4], row[5]), self._now)
        self._uaddrs = None

    def _guest_mapped(self, number: int, row: _Row) -> None:
        access = Access(row[3] & 7)
        if not access:
            self._guest_unmapped(number, row)
            return
        self._mapped.put(Held(*_span(row[4], row[5]), self._now, ""))
        self._found.changes.append(Change(number, self._now, row[4], row[5], access))
        if (name := _IMAGE_BACKINGS.get(row[8])) is not None:
            self._found.brought_in[name] += row[5]

    def _guest_unmapped(self, number: int, row: _Row) -> None:
        self._mapped.take(*_span(row[4], row[5]), self._now)
        self._found.changes.append(Change(number, self._now, row[4], row[5], Access.NONE))

    def _begun(self, number: int, row: _Row) -> None:
        self._open[row[3], row[4], row[5]].append((number, self._now))

    def _ended(self, number: int, row: _Row) -> None:
        key = row[3], row[4], row[5]
        begun = self._open.get(key)
        number, since = begun.pop(0) if begun else (number, self._known_since)
        if begun is not None and not begun:
            del self._open[key]
        self._invalidation(number, since, *key)

    def _at_once(self, number: int, row: _Row) -> None:
        self._invalidation(number, self._now, row[3], row[4], row[5])

    def _served(self, _number: int, row: _Row) -> None:
        self._found.passes.append((_signed(self._now - row[4]), self._now, row[5]))

    def _invalidation(self, number: int, since: int, source: int, start: int, count: int) -> None:
        word = _word(self._header.sources, source, number)
        gfns = tuple(self._gfns(*_span(start, count)))
        self._found.invalidations.append(Invalidation(number, since, self._now, word, start, count, gfns))

    def _gfns(self, start: int, end: int) -> Iterator[Span]:
        """Where the regions have these pages of the VMM; several regions may have the same."""
        if self._uaddrs is None:
            held = list(self._regions.held)
            self._uaddrs = (
                np.array([each.start_page for each in held], np.int64),
                np.array([each.start_page + each.end - each.start for each in held], np.int64),
                np.array([each.start for each in held], np.int64),
            )
        starts, ends, gfns = self._uaddrs
        for index in np.nonzero((starts < end) & (start < ends))[0]:
            page, gfn = int(starts[index]), int(gfns[index])
            yield gfn + max(start, page) - page, gfn + min(end, int(ends[index])) - page


def _columns(numbers: list[npt.NDArray[np.uint64]], records: list[npt.NDArray[np.void]]) -> Intercepts:
    table = np.concatenate([np.empty(0, _COLUMNS), *records])
    detail = table["detail"]
    half = np.uint64(0xFFFFFFFF)
    stages = {
        "total": np.minimum(table["b"], np.uint64(2**63 - 1)),
        "decode": table["c"] >> np.uint64(32),
        "wait": table["c"] & half,
        "resolve": table["d"] >> np.uint64(32),
        "map": table["d"] & half,
    }
    return Intercepts(
        np.concatenate([np.empty(0, np.uint64), *numbers]).view(np.int64),
        table["time"].view(np.int64),
        table["vp"].astype(np.int64),
        (detail & 0xFF).astype(np.int64),
        (detail >> 8 & 7).astype(np.int64),
        detail & NO_MEMORY == 0,
        table["a"].copy(),
        {name: stages[name].astype(np.int64) for name in STAGES},
    )


def _word(words: Sequence[str], index: int, number: int) -> str:
    if index >= len(words):
        raise UnknownWord(f"record {number} has number {index} for one of {len(words)} words")
    return words[index]


def _span(start: int, count: int) -> Span:
    """[start, end) of pages, of a file that may say anything."""
    return _page(start), _page(start + max(0, count))


def _page(page: int) -> int:
    return min(max(0, page), PAGES)


def _signed(nanoseconds: int) -> int:
    """Of 64 bits."""
    return (nanoseconds + 2**63) % 2**64 - 2**63
