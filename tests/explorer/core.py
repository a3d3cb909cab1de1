"""The daemon's own core as a system under test: a real partition, its region manager, its VPs.

Owns the translation of verbs into the calls that a VMM makes. Must not know what is right.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from enum import Enum
from functools import cache, partial

from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.hv_message import build_memory_intercept
from intercept_protocol.messages import Architecture
from intercept_protocol.outcomes import Access, Answer
from interceptd.connections.peer import Peer
from interceptd.telemetry.counters import Source

from .inspection import disorder, misrecorded
from .line import WELCOME, Line
from .model_partition import VMM, ModelPartition, Parts, addition, removal
from .pauses import Asked, Point
from .script import Bar, MapFixed, MapVma, Pages, ProtectVma, Script, Touch
from .successor import Successor, unlogged
from .system_under_test import Build, Stage, Subject


class Held(Enum):
    """Which ports may be held up: the core takes another path where none is to be waited for."""

    BOTH = "as in real guests"
    ADDRESS_SPACE = "as with live memory"
    NEITHER = "as in the model"
    LISTS = "as in real guests, whose VMM takes lists"


LONG_LOG = 300
"""Records. A longer one takes most of a schedule's time, and of its moments fewer are looked at."""
FEW_OF_LONG = 16


def of(parts: Parts, held: Held = Held.BOTH) -> Build:
    """A subject made of these parts."""
    return partial(Core, parts, held)


class _Held:
    """Pauses where a port may be held up, and nowhere else."""

    def __init__(self, stage: Stage, held: Held) -> None:
        self._stage = stage
        self._at_once = {
            Held.BOTH: frozenset[Point](),
            Held.LISTS: frozenset[Point](),
            Held.ADDRESS_SPACE: frozenset(Point) - {Point.RESOLVE, Point.RESOLVED},
            Held.NEITHER: frozenset(Point),
        }[held]

    async def at(self, point: Point, asked: Asked) -> None:
        if point in self._at_once:
            self._stage.at_once(point, asked)
        else:
            await self._stage.at(point, asked)


class Core(Subject):
    says_why = True

    def __init__(self, parts: Parts, held: Held, play: Script, stage: Stage) -> None:
        self._parts = parts
        self._stage = stage
        self._log = parts.log()
        self._model = ModelPartition(
            pauses=_Held(stage, held), parts=parts, failing_calls=play.failing, log=self._log
        )
        self._model.hypervisor.may_block = held in (Held.BOTH, Held.LISTS)
        self._model.hypervisor.pieces_per_call = 3 if held is Held.LISTS else 1
        self._model.address_space.may_block = held is not Held.NEITHER
        self._model.hypervisor.refused_maps = play.refused
        self._lines: dict[int, Line] = {}
        self._touches: dict[int, Touch] = {}
        self._peers: dict[int, Peer] = {}
        self._going: list[Pages] = []
        """What a userfaultfd has announced, and is not served."""
        self._has_vmm = True
        self._recovered_at: object = None
        self._moments = 0
        self.slat = self._model.software

    async def live(self, vmm: Callable[[], Awaitable[None]]) -> None:
        async def to_its_end() -> None:
            try:
                await vmm()
            finally:
                self._has_vmm = False

        await self._model.partition.run(to_its_end)

    def attach(self, vp: int, judge: Callable[[Touch, Answer], None]) -> None:
        model = self._model
        line = Line(
            lambda answer: judge(self._touches[vp], answer),
            partial(self._stage.name, f"VP {vp}"),
            self._peers.get(vp, VMM),
        )
        processor = self._parts.processor(
            vp,
            line,
            architecture=Architecture.X86_64,
            faults=model.faults,
            answers=model.partition.answers,
            event_bus=model.partition.event_bus,
        )
        self._lines[vp] = line
        model.partition.start_vp(processor, line, WELCOME)

    async def map_vma(self, verb: MapVma) -> None:
        await self._model.map_vma(verb.pages.start, verb.pages.count, verb.pfn, verb.access)

    def lend_vp(self, vp: int, memory: MapVma) -> None:  # noqa: ARG002 - nobody hands its memory over
        self._peers[vp] = Peer(pid=VMM.pid + 1, uid=VMM.uid, gid=VMM.gid)

    async def unmap_vma(self, pages: Pages) -> None:
        await self._model.unmap_vma(pages.start, pages.count)

    async def protect_vma(self, verb: ProtectVma) -> None:
        await self._model.protect_vma(verb.pages.start, verb.pages.count, verb.access)

    async def add_region(self, bar: Bar) -> None:
        await self._model.add_region(bar.gfn, bar.count, bar.page, bar.kind, bar.access)

    async def remove_region(self, bar: Bar) -> None:
        await self._model.remove_region(bar.gfn, bar.count, bar.page)

    async def change_regions(self, remove: Sequence[Bar], add: Sequence[Bar]) -> None:
        await self._model.change_regions(
            [removal(bar.gfn, bar.count, bar.page) for bar in remove],
            [addition(bar.gfn, bar.count, bar.page, bar.kind, bar.access) for bar in add],
        )

    async def begin(self, pages: Pages) -> None:
        await self._model.begin(pages.start, pages.count)

    def end(self, pages: Pages) -> None:
        self._model.end(pages.start, pages.count)

    def map_fixed(self, verb: MapFixed) -> None:
        self._model.map_fixed(verb.pages.start, verb.pages.count, verb.pfn)

    async def invalidate(self, pages: Pages) -> None:
        """As a userfaultfd does, which tells no successor again."""
        self._going.append(pages)
        if pages.step == 1:
            await self._model.invalidate(pages.start, pages.count, Source.USERFAULTFD)
        else:
            await self._model.invalidate_each(range(pages.start, pages.end, pages.step))
        self._going.remove(pages)

    def kick(self, vp: int) -> None:
        self._model.partition.kick(vp)

    async def intercept(self, vp: int, touch: Touch) -> Answer | None:
        self._touches[vp] = touch
        return await self._lines[vp].ask(_message(touch.gfn, touch.access, translated=touch.translated))

    def sleeps_with_a_lock(self) -> str | None:
        return "the region lock" if self._model.regions._lock.is_mine else None

    def misrecorded(self, gfns: Iterable[int]) -> str | None:
        return misrecorded(self._model, gfns)

    def disorder(self) -> str | None:
        return disorder(self._model)

    def unlogged(self) -> str | None:
        return unlogged(self._model, self._log, at_rest=self._has_vmm and not self._log.under_way)

    def successors(self) -> Iterator[Successor]:
        frames, asked = self._log.frames, list(self._log.under_way)
        now = (len(frames), asked, list(self._going))
        if now == self._recovered_at:
            return
        self._recovered_at = now
        self._moments += 1
        if len(frames) > LONG_LOG and self._moments % FEW_OF_LONG:
            return
        at_once = self._model.hypervisor.pieces_per_call
        first = Successor(self._parts, frames, asked, self._going, at_once)
        yield first
        for count in range(len(frames) + 1, len(first.frames)):
            yield Successor(self._parts, first.frames[:count], asked, self._going, at_once)

    def remains(self) -> str | None:
        extents = self._model.hypervisor.counters().slat_extents
        attempts = len(self._model.notifier._windows)
        vps = len(self._model.partition.vps)
        if extents or attempts:
            return f"{extents} extents in the SLAT, {attempts} attempts, {vps} VPs"
        return None


@cache
def _message(gfn: int, access: Access, *, translated: bool) -> bytes:
    """The 256 bytes of an intercept; `translated` ones carry a gva whose translation the gpa is."""
    gva = 0xFFFF_8000_0000_0000 + (gfn << PAGE_SHIFT) if translated else None
    return build_memory_intercept(gpa=gfn << PAGE_SHIFT, access=access, gva=gva)
