"""What the actors of a schedule do.

Owns the verbs of a VMM, of its notifier connections and of its VPs, and how each reads in a story. Must not
know who carries them out, nor in which order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access
from interceptd.hypervisor.hv_status import HvStatus

RW = Access.READ | Access.WRITE


def rights(access: Access) -> str:
    """Like `rw-`."""
    letters = zip("rwx", (Access.READ, Access.WRITE, Access.EXECUTE), strict=True)
    return "".join(letter if right in access else "-" for letter, right in letters)


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages [start, end) of the VMM, or every `step`-th of them."""

    start: int
    end: int
    step: int = 1

    @property
    def count(self) -> int:
        return self.end - self.start

    def __contains__(self, page: int) -> bool:
        return self.start <= page < self.end and (page - self.start) % self.step == 0

    def overlaps(self, other: Pages) -> bool:
        return self.start < other.end and other.start < self.end

    def __str__(self) -> str:
        pages = f"page {self.start}" if self.count == 1 else f"pages {self.start}-{self.end - 1}"
        return pages if self.step == 1 else f"one in {self.step} of {pages}, each by itself"


@dataclass(frozen=True, slots=True)
class Bar:
    """A region that the VMM may add: gfns [gfn, gfn + count) over the pages from `page`."""

    name: str
    gfn: int
    count: int
    page: int
    kind: RegionKind = RegionKind.MMIO
    access: Access = RW

    @property
    def pages(self) -> Pages:
        return Pages(self.page, self.page + self.count)

    def covers(self, gfn: int) -> bool:
        return self.gfn <= gfn < self.gfn + self.count

    def meets(self, other: Bar) -> bool:
        return self.gfn < other.gfn + other.count and other.gfn < self.gfn + self.count

    def page_of(self, gfn: int) -> int:
        return gfn - self.gfn + self.page

    def gives_as(self, other: Bar) -> bool:
        """Whether gfns that both cover are given the guest alike."""
        return (self.page - self.gfn, self.kind, self.access) == (
            other.page - other.gfn,
            other.kind,
            other.access,
        )

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.kind}, {rights(self.access)}): "
            f"gfns {self.gfn}-{self.gfn + self.count - 1} over {self.pages}"
        )


# ------------------------------------------------ verbs of a VMM


@dataclass(frozen=True, slots=True)
class MapVma:
    pages: Pages
    pfn: int
    access: Access = RW

    def __str__(self) -> str:
        last = self.pfn + self.pages.count - 1
        return f"maps {self.pages} to pfns {self.pfn}-{last} {rights(self.access)}"


@dataclass(frozen=True, slots=True)
class LendVp:
    """Another process runs this VP from now on: the VMM forked, or passed the descriptor on. It has memory of
    its own where the VMM has the regions'."""

    vp: int
    memory: MapVma

    def __str__(self) -> str:
        return f"lends VP {self.vp} to a process that {self.memory}"


@dataclass(frozen=True, slots=True)
class UnmapVma:
    pages: Pages

    def __str__(self) -> str:
        return f"unmaps {self.pages}"


@dataclass(frozen=True, slots=True)
class ProtectVma:
    pages: Pages
    access: Access

    def __str__(self) -> str:
        return f"protects {self.pages} {rights(self.access)}"


@dataclass(frozen=True, slots=True)
class AddRegion:
    bar: Bar

    def __str__(self) -> str:
        return f"adds {self.bar}"


@dataclass(frozen=True, slots=True)
class RemoveRegion:
    bar: Bar

    def __str__(self) -> str:
        return f"removes {self.bar.name} at gfn {self.bar.gfn}"


@dataclass(frozen=True, slots=True)
class ChangeRegions:
    """In one step, or not at all."""

    remove: tuple[Bar, ...]
    add: tuple[Bar, ...]

    def __str__(self) -> str:
        old = " and ".join(f"{bar.name} at gfn {bar.gfn}" for bar in self.remove) or "nothing"
        return f"replaces {old} by {' and '.join(map(str, self.add)) or 'nothing'}"


@dataclass(frozen=True, slots=True)
class Kick:
    vp: int

    def __str__(self) -> str:
        return f"kicks VP {self.vp}"


@dataclass(frozen=True, slots=True)
class AwaitVp:
    """Wait for a VP that was kicked to be out of its intercept."""

    vp: int

    def __str__(self) -> str:
        return f"waits for VP {self.vp} to be out of its intercept"


@dataclass(frozen=True, slots=True)
class Die:
    """The VMM's connection closes, as on SIGKILL."""

    def __str__(self) -> str:
        return "dies"


# ------------------------------------------------ verbs of a notifier connection, and of a VMM thread


@dataclass(frozen=True, slots=True)
class Begin:
    pages: Pages

    def __str__(self) -> str:
        return f"invalidate_begin {self.pages}"


@dataclass(frozen=True, slots=True)
class End:
    pages: Pages

    def __str__(self) -> str:
        return f"invalidate_end {self.pages}"


@dataclass(frozen=True, slots=True)
class Invalidate:
    pages: Pages

    def __str__(self) -> str:
        return f"invalidate {self.pages}"


@dataclass(frozen=True, slots=True)
class MapFixed:
    """Replace what was there by other memory, announced by a begin and an end around it."""

    pages: Pages
    pfn: int

    def __str__(self) -> str:
        return f"maps {self.pages} to pfns {self.pfn}-{self.pfn + self.pages.count - 1} over what was there"


Verb = (
    MapVma
    | LendVp
    | UnmapVma
    | ProtectVma
    | AddRegion
    | RemoveRegion
    | ChangeRegions
    | Kick
    | AwaitVp
    | Die
    | Begin
    | MapFixed
    | End
    | Invalidate
)


# ------------------------------------------------ a VP


@dataclass(frozen=True, slots=True)
class Touch:
    """One access of the guest, repeated until it is through or the VMM is to emulate it.

    `translated` is the message's gva_gpa_valid. A `trapped` page faults forever, mapped or not, as one does
    that the hypervisor keeps an overlay on.
    """

    gfn: int
    access: Access = Access.READ
    translated: bool = True
    trapped: bool = False

    def __str__(self) -> str:
        verb = {Access.READ: "reads", Access.WRITE: "writes", Access.EXECUTE: "fetches from"}[self.access]
        return f"{verb} gfn {self.gfn}"


@dataclass(frozen=True, slots=True)
class Script:
    """`given` is done before the others start. `refused` are the maps with access that the hypervisor
    refuses, `failing` its map hypercalls that fail with a status, both counted from 1."""

    given: tuple[Verb, ...]
    vmm: tuple[Verb, ...]
    notifiers: tuple[tuple[Verb, ...], ...] = ()
    vps: tuple[tuple[Touch, ...], ...] = ()
    refused: frozenset[int] = frozenset()
    failing: Mapping[int, HvStatus] = field(default_factory=dict)
