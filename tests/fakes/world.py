"""What the VMM of a drawn schedule knows to be true, page by page, and what may be said of it.

Owns the reference: plain dicts, no ranges, no locks. A page whose call is not answered yet is in motion:
nothing can be said of it, and a fault there waits. Must not know how the daemon works.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from interceptctl.explore.inspection import Violation, slat_reach
from fakes.model_partition import ModelPartition
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer

RW = Access.READ | Access.WRITE


@dataclass(frozen=True)
class Candidate:
    """A region that the VMM may add."""

    gfn: int
    page_count: int
    page: int
    kind: RegionKind
    access: Access

    @property
    def gfns(self) -> range:
        return range(self.gfn, self.gfn + self.page_count)

    def page_of(self, gfn: int) -> int:
        return gfn - self.gfn + self.page


CANDIDATES = (
    Candidate(0, 16, 0, RegionKind.MMIO, RW),
    Candidate(16, 16, 8, RegionKind.MOVABLE, RW | Access.EXECUTE),
    Candidate(32, 8, 4, RegionKind.PINNED, RW),
    Candidate(8, 16, 20, RegionKind.MMIO, Access.READ),
    Candidate(16, 8, 0, RegionKind.MOVABLE, RW),
    Candidate(30, 4, 28, RegionKind.MMIO, RW),
)
"""They overlap in gfns, alias each other's pages, and are of every kind."""
PAGES = 36


@dataclass(eq=False)
class Watch:
    """One fault under way: what it may be told, as of any instant since it began."""

    gfn: int
    access: Access
    forwards: set[Answer] = field(default_factory=set)


class World:
    def __init__(self) -> None:
        self.pages: dict[int, tuple[int, Access]] = {}
        self.present: set[Candidate] = set()
        self.in_doubt: set[Candidate] = set()
        """Being added or removed."""
        self.dangling: set[Candidate] = set()
        """Pinned, and possibly broken by an invalidation."""
        self.moving: Counter[int] = Counter()
        self.closed: Counter[int] = Counter()
        """Acknowledged begins that have no end yet."""
        self._watches: set[Watch] = set()
        self._next_pfn = 0

    def fresh_pfn(self) -> int:
        """Frames are never used twice, so an old one is told from a new one."""
        self._next_pfn += 1000
        return self._next_pfn

    def changed(self) -> None:
        """Something is true now that was not: call it after every change."""
        for watch in self._watches:
            watch.forwards |= self._forwards(watch.gfn, watch.access)

    @contextmanager
    def watching(self, gfn: int, access: Access) -> Iterator[Watch]:
        watch = Watch(gfn, access)
        self._watches.add(watch)
        self.changed()
        try:
            yield watch
        finally:
            self._watches.discard(watch)

    def shake(self, pages: range) -> None:
        """An invalidation of these pages: a pinned region does not survive it."""
        self.dangling |= {held for held in CANDIDATES if _touches(held, pages)}
        self.changed()

    @contextmanager
    def motion(self, pages: range) -> Iterator[None]:
        """From a begin, or a call that is one, to its answer: nothing can be said of these pages."""
        self.moving.update(pages)
        self.shake(pages)
        try:
            yield
        finally:
            self.moving.subtract(pages)
            self.changed()

    @contextmanager
    def doubt(self, candidate: Candidate) -> Iterator[None]:
        """While a call about this region is out."""
        self.in_doubt.add(candidate)
        self.changed()
        try:
            yield
        finally:
            self.in_doubt.discard(candidate)
            self.changed()

    # ------------------------------------------------ what must hold

    def violations(self, model: ModelPartition) -> Iterator[Violation]:
        """I1 and I2, on what the guest reaches now."""
        for gfn, (frame, access) in slat_reach(model).items():
            held = [each for each in self.present | self.in_doubt if gfn in each.gfns]
            if not held:
                yield Violation("I2", f"{gfn} is reached and in no region")
            elif all(self._is_old(each, gfn, None if frame is None else frame.page, access) for each in held):
                yield Violation("I1", f"{gfn} reaches {frame} with {access!r} after it was acknowledged")

    def _is_old(self, held: Candidate, gfn: int, pfn: int | None, access: Access) -> bool:
        page = held.page_of(gfn)
        if self.moving[page]:
            return False
        true_pfn, vma_access = self.pages.get(page, (None, Access.NONE))
        excess = access & ~_rights(held, vma_access)
        return bool(self.closed[page] or pfn != true_pfn or excess)

    def _forwards(self, gfn: int, access: Access) -> set[Answer]:
        """Every FORWARD that would be true at this instant."""
        covering = [held for held in self.present | self.in_doubt if gfn in held.gfns]
        certain = [held for held in covering if held not in self.in_doubt]
        forwards = set() if certain else {Answer.NO_REGION}
        for held in covering:
            page = held.page_of(gfn)
            _, vma_access = self.pages.get(page, (None, Access.NONE))
            if access not in held.access:
                forwards.add(Answer.PERMISSION)
            elif held.kind is RegionKind.PINNED and held in self.dangling:
                forwards.add(Answer.UNBACKED)
            elif self.moving[page] or self.closed[page]:
                continue  # faults wait
            elif page not in self.pages:
                forwards.add(Answer.UNBACKED)
            elif access not in _rights(held, vma_access):
                forwards.add(Answer.PERMISSION)
        return forwards


def _touches(held: Candidate, pages: range) -> bool:
    return held.page < pages.stop and pages.start < held.page + held.page_count


def _rights(held: Candidate, vma_access: Access) -> Access:
    shared = held.access & vma_access & RW
    return shared | (held.access & Access.EXECUTE) if Access.READ in shared else shared
