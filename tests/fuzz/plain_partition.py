"""The page-by-page reference of the control methods: what the daemon must answer to a sequence of requests.

Owns the reference: dicts of single pages, no ranges, no concurrency, one caller at a time. Written from
`protocol/README.md`. Must not know how the daemon works, nor share code with it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

R, W, X = 1, 2, 4
PAGE_LIMIT = 1 << 52
FAULT_IN = 512
REPEATS = 16


class Refusal(Exception):
    """The errno's name that a request is answered with."""


@dataclass(frozen=True)
class Backing:
    """One page of the VMM: `piece` tells the VMAs apart."""

    pfn: int
    access: int
    io: bool
    piece: object


@dataclass(eq=False)
class Area:
    """A region."""

    gfn: int
    page_count: int
    page: int
    kind: str
    inferred: bool
    access: int
    dangling: bool = False

    def page_of(self, gfn: int) -> int:
        return gfn - self.gfn + self.page

    @property
    def pages(self) -> range:
        return range(self.page, self.page + self.page_count)

    @property
    def gfns(self) -> range:
        return range(self.gfn, self.gfn + self.page_count)

    def rights(self, backing: Backing) -> int:
        shared = self.access & backing.access & (R | W)
        return shared | (self.access & X) if shared & R else shared


@dataclass
class PlainPartition:
    granularity: str = "vma"
    memory: dict[int, Backing] = field(default_factory=dict)
    areas: list[Area] = field(default_factory=list)
    reached: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By gfn: pfn and rights."""
    opened: Counter[range] = field(default_factory=Counter)
    _repeated: tuple[int, int, int] = (-1, 0, 0)

    # ------------------------------------------------ the VMM

    def map_vma(self, pages: range, pfn: int, access: int, *, io: bool) -> None:
        _require_pages(pages)
        if self.memory.keys() & set(pages):
            raise Refusal("EEXIST")
        piece = object()
        self.memory |= {page: Backing(pfn + page - pages.start, access, io, piece) for page in pages}

    def map_vmas(self, vmas: list[tuple[range, int, int, bool]]) -> None:
        for pages, _, _, _ in vmas:
            _require_pages(pages)
        before = dict(self.memory)
        try:
            for pages, pfn, access, io in vmas:
                self.map_vma(pages, pfn, access, io=io)
        except Refusal:
            self.memory = before
            raise

    def unmap_vma(self, pages: range) -> None:
        _require_pages(pages)
        for page in pages:
            self.memory.pop(page, None)
        self.invalidate(pages)

    def protect_vma(self, pages: range, access: int) -> None:
        _require_pages(pages)
        pieces: dict[object, object] = {}
        for page in self.memory.keys() & set(pages):
            held = self.memory[page]
            piece = pieces.setdefault(held.piece, object())
            self.memory[page] = replace(held, access=access, piece=piece)
        self.invalidate(pages)

    def add_region(self, gfns: range, page: int, kind: str, access: int) -> str:
        area = self._asked(gfns, page, kind, access)
        if any(_meet(area.gfns, each.gfns) for each in self.areas):
            raise Refusal("EEXIST")
        self._populate(area)
        self.areas.append(area)
        return area.kind

    def remove_region(self, gfns: range, page: int) -> None:
        _require_place(gfns, page)
        area = self._found(gfns, page, self.areas)
        self.areas.remove(area)
        for gfn in area.gfns:
            self.reached.pop(gfn, None)

    def change_regions(
        self, remove: list[tuple[range, int]], add: list[tuple[range, int, str, int]]
    ) -> list[str]:
        """Where several elements are wrong, the order of the checks is the daemon's, and not specified."""
        for gfns, page in remove:
            _require_place(gfns, page)
        new = [self._asked(*each) for each in add]
        for area in new:
            self._require_populatable(area)
        stay = list(self.areas)
        for gfns, page in remove:
            stay.remove(self._found(gfns, page, stay))
        for index, area in enumerate(new):
            if any(_meet(area.gfns, each.gfns) for each in (*stay, *new[:index])):
                raise Refusal("EEXIST")
        for old in self.areas:
            for gfn in old.gfns if old not in stay else ():
                if not any(_alike(old, area, gfn) for area in new):
                    self.reached.pop(gfn, None)
        self.areas = stay + new
        for area in new:
            self._populate(area)
        return [area.kind for area in new]

    def _asked(self, gfns: range, page: int, kind: str, access: int) -> Area:
        _require_place(gfns, page)
        inferred = kind == "auto"
        if inferred:
            if page not in self.memory:
                raise Refusal("EINVAL")
            kind = "mmio" if self.memory[page].io else "movable"
        return Area(gfns.start, len(gfns), page, kind, inferred, access | R)

    @staticmethod
    def _found(gfns: range, page: int, areas: list[Area]) -> Area:
        area = next((each for each in areas if each.gfn == gfns.start), None)
        if area is None:
            raise Refusal("ENOENT")
        if (area.page_count, area.page) != (len(gfns), page):
            raise Refusal("EINVAL")
        return area

    def _require_populatable(self, area: Area) -> None:
        if area.kind == "pinned":
            backed = all(each in self.memory and self.memory[each].access & R for each in area.pages)
            if not backed or any(_meet(area.pages, each) for each in self.opened):
                raise Refusal("EFAULT")

    def _populate(self, area: Area) -> None:
        """Map a pinned region in full."""
        self._require_populatable(area)
        if area.kind == "pinned":
            for gfn in area.gfns:
                backing = self.memory[area.page_of(gfn)]
                self.reached[gfn] = backing.pfn, area.rights(backing)
            self._changed()

    def prefault(self, gfns: range) -> dict[str, int]:
        """All of them at once: few enough pages for one answer."""
        _require_pages(gfns)
        for gfn in gfns:
            self._decide(gfn, R)
        readable = sum(gfn in self.reached and bool(self.reached[gfn][1] & R) for gfn in gfns)
        return {"page_count": len(gfns), "mapped_gfns": readable}

    # ------------------------------------------------ a notifier

    def invalidate(self, pages: range) -> None:
        _require_pages(pages)
        for area in self.areas:
            if _meet(area.pages, pages):
                area.dangling = area.kind == "pinned"
                for gfn in area.gfns:
                    if area.page_of(gfn) in pages:
                        self.reached.pop(gfn, None)

    def begin(self, pages: range) -> None:
        self.invalidate(pages)
        self.opened[pages] += 1

    def end(self, pages: range) -> None:
        _require_pages(pages)
        if not self.opened[pages]:
            raise Refusal("ENOENT")
        self.opened[pages] -= 1
        self.opened += Counter()

    # ------------------------------------------------ a VP

    def intercept(self, gfn: int, access: int) -> tuple[str, str]:
        answer = self._decide(gfn, access)
        if answer != ("resume", "already_mapped"):
            self._repeated = (-1, 0, 0)
            return answer
        before = self._repeated
        count = before[2] if before[:2] == (gfn, access) else 0
        self._repeated = (-1, 0, 0) if count == REPEATS else (gfn, access, count + 1)
        return ("fail", "no_progress") if count == REPEATS else answer

    def _decide(self, gfn: int, access: int) -> tuple[str, str]:
        if gfn in self.reached and self.reached[gfn][1] & access == access:
            return "resume", "already_mapped"
        area = next((each for each in self.areas if gfn in each.gfns), None)
        if area is None:
            return "forward", "no_region"
        if not access & area.access:
            return "forward", "permission"
        if area.dangling:
            return "forward", "unbacked"
        page = area.page_of(gfn)
        if any(page in each for each in self.opened):
            return "retry", "invalidating"
        backing = self.memory.get(page)
        if backing is None or (area.inferred and backing.io != (area.kind == "mmio")):
            return "forward", "unbacked"
        if not access & area.rights(backing):
            return "forward", "permission"
        for each in self._extent(area, gfn):
            held, new = self.reached.get(each), self.memory[area.page_of(each)]
            if held is None or held[0] != new.pfn or area.rights(new) & ~held[1]:
                self.reached[each] = new.pfn, area.rights(new)
        self._changed()
        return "resume", "mapped"

    def _extent(self, area: Area, gfn: int) -> range:
        """The pages around the fault, as far as one VMA and the window go and nothing is open."""
        window = area.gfns
        if area.kind == "mmio" and self.granularity == "page":
            window = range(gfn, gfn + 1)
        if area.kind == "movable":
            start = area.gfn + (gfn - area.gfn) // FAULT_IN * FAULT_IN
            window = range(start, min(start + FAULT_IN, area.gfns.stop))
        piece = self.memory[area.page_of(gfn)].piece

        def fits(each: int) -> bool:
            page = area.page_of(each)
            backing = self.memory.get(page)
            closed = any(page in pages for pages in self.opened)
            return each in window and backing is not None and backing.piece is piece and not closed

        first = last = gfn
        while fits(first - 1):
            first -= 1
        while fits(last + 1):
            last += 1
        return range(first, last + 1)

    def _changed(self) -> None:
        self._repeated = (-1, 0, 0)


def _require_pages(pages: range) -> None:
    if not pages or pages.stop > PAGE_LIMIT:
        raise Refusal("EINVAL")


def _require_place(gfns: range, page: int) -> None:
    _require_pages(gfns)
    _require_pages(range(page, page + len(gfns)))


def _alike(old: Area, new: Area, gfn: int) -> bool:
    """Whether both regions give the guest the same at this gfn, so that what is mapped stays."""
    return (
        gfn in new.gfns
        and old.page_of(gfn) == new.page_of(gfn)
        and (old.kind, old.inferred, old.access) == (new.kind, new.inferred, new.access)
        and not old.dangling
    )


def _meet(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
