"""The values of the reference: memory, what the guest reaches, intercepts, unmapped ranges.

Owns the values alone. Moments are counted from 0. Must not know what follows from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from intercept_protocol.outcomes import Access, Answer

from .script import Bar, Pages, rights


@dataclass(frozen=True, slots=True)
class Memory:
    """A VMA: pages, the pfn of the first, the VMA's rights."""

    pages: Pages
    pfn: int
    access: Access

    def pfn_of(self, page: int) -> int:
        return self.pfn + page - self.pages.start


@dataclass(frozen=True, slots=True)
class Reached:
    """What the guest reaches at one gfn, the moment at which it was mapped, and for which intercept, if it
    was for one."""

    gfn: int
    pfn: int
    access: Access
    mapped_at: int
    mapped_for: Watch | None

    def __str__(self) -> str:
        return f"gfn {self.gfn} reaches pfn {self.pfn} {rights(self.access)}"


@dataclass(slots=True, eq=False)
class Watch:
    """One intercept: the moment at which it began, every FORWARD that was right at some instant since, and
    whether its page was going at one, when a kernel has nothing behind it."""

    gfn: int
    access: Access
    began: int
    rightly: set[Answer] = field(default_factory=set)
    was_going: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """Regions that are replaced by others, since the moment at which that `began`."""

    old: tuple[Bar, ...]
    new: tuple[Bar, ...]
    began: int

    def covers_throughout(self, gfn: int) -> bool:
        return any(bar.covers(gfn) for bar in self.old) and any(bar.covers(gfn) for bar in self.new)

    def alike(self, gfn: int) -> Bar | None:
        """The old region, if a new one gives the guest the same at `gfn`."""
        for before in self.old:
            for after in self.new:
                if before.covers(gfn) and after.covers(gfn) and before.gives_as(after):
                    return before
        return None


@dataclass(slots=True)
class Gone:
    """Pages that the VMM had back `since` that moment, as it had `announced` at another."""

    pages: Pages
    since: int
    announced: int
