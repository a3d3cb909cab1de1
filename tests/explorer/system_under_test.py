"""The system under test, as the explorer sees it: one partition, and any code that decides its intercepts.

Owns the interface that the daemon's core and the patches of the thread stand behind, and the stage that they
play on. Must not know how any of them works.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from intercept_protocol.outcomes import Answer
from interceptd.hypervisor.software import SoftwareHypervisor

from .pauses import Asked, Pauses, Point
from .rules import Rule
from .script import Bar, MapFixed, MapVma, Pages, ProtectVma, Script, Touch
from .successor import Successor


class Stage(Pauses, Protocol):
    """Where a subject tells what it does, and stops where others may run."""

    def at_once(self, point: Point, asked: Asked) -> None:
        """Like `at`, in a port that never waits: no actor stops here."""

    async def step(self, what: str) -> None:
        """Something was done that another CPU may see; others may run now. Allowed under any lock."""

    async def sleep(self, what: str) -> None:
        """About to do what may sleep."""

    def name(self, actor: str) -> None:
        """The task that calls this acts for that actor."""

    def tell(self, what: str, *of: object) -> None:
        """A line of the story, on the daemon's side."""

    def find(self, rule: Rule, how: str) -> None:
        """The subject itself noticed that a rule is broken: it read what was freed, say."""


class Subject(Protocol):
    """Ranges are pages of the VMM. Refused requests raise `WireError`; what is answered is done."""

    slat: SoftwareHypervisor
    says_why: bool
    """Whether a FORWARD carries its reason, to be judged; the patches only say that it is not theirs."""

    async def live(self, vmm: Callable[[], Awaitable[None]]) -> None:
        """The partition's life: as long as its VMM's, and its end."""

    def attach(self, vp: int, judge: Callable[[Touch, Answer], None]) -> None:
        """Make a VP; `judge` is called at the instant of each answer, before anyone else runs."""

    async def map_vma(self, verb: MapVma) -> None: ...

    def lend_vp(self, vp: int, memory: MapVma) -> None:
        """Another process, which has this memory, runs the VP. Comes before `attach`."""

    async def unmap_vma(self, pages: Pages) -> None: ...

    async def protect_vma(self, verb: ProtectVma) -> None: ...

    async def add_region(self, bar: Bar) -> None: ...

    async def remove_region(self, bar: Bar) -> None: ...

    async def change_regions(self, remove: Sequence[Bar], add: Sequence[Bar]) -> None: ...

    async def begin(self, pages: Pages) -> None: ...

    def end(self, pages: Pages) -> None: ...

    def map_fixed(self, verb: MapFixed) -> None:
        """Between a begin and an end; nothing else tells of it."""
        raise NotImplementedError("not in the scenarios of this subject")

    async def invalidate(self, pages: Pages) -> None:
        """Pages with a step are invalidated one by one, and answered together."""

    def kick(self, vp: int) -> None: ...

    async def intercept(self, vp: int, touch: Touch) -> Answer | None:
        """None if the VP is left without an answer."""

    def sleeps_with_a_lock(self) -> str | None:
        """The name of a lock that the task at hand holds and must not sleep with."""

    def misrecorded(self, gfns: Iterable[int]) -> str | None:
        """Where the subject's own record of what is mapped differs from the SLAT, if it keeps one."""

    def disorder(self) -> str | None:
        """How the subject's list of regions is not as it must be, if it keeps it in order."""

    def unlogged(self) -> str | None:
        """How the subject differs from what its log says, if it keeps one."""

    def successors(self) -> Iterable[Successor]:
        """What would go on if the subject were killed at this moment, and what if that were killed too. None
        if that is nothing new."""
        return ()

    def remains(self) -> str | None:
        """What is left after `live`, if anything."""


Build = Callable[[Script, Stage], Subject]
"""Builds a subject that has nothing yet."""
