"""Repeats a recording: what changed becomes requests, and each intercept is sent and its answer compared.

Owns the order of things. Must not know files or terminals. The requests go one after the other, so nothing
depends on how fast the daemon is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Final

from intercept_protocol.addresses import PAGE_SHIFT, RangeError, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.hv_message import InterceptMessage, MessageType, build_memory_intercept
from intercept_protocol.messages import AddressSpaceKind, Architecture, MmioGranularity
from intercept_protocol.outcomes import Access, Answer
from intercept_protocol.recording import (
    Chunk,
    Gap,
    Header,
    Mappings,
    Regions,
    StateBegins,
    StateEnds,
    Vmas,
)
from intercept_protocol.trace import Intercept, Kind, Traced, intercept_of
from interceptctl import operator_client

from .comparison import claim, difference, is_another_order, why_not
from .daemon_side import RepeatedPartition
from .live_memory import LiveMemory, behind, derive_vmas
from .model import Model, Region, vma_of
from .refused import ask, refused
from .restoring import HostPages, Restored
from .survey import Survey
from .verdict import Verdict

_NO_MEMORY: Final = InterceptMessage(
    message_type=MessageType.X64_HALT, payload_size=0, payload=bytes(240)
).build()


class Player:
    """Plays one recording against the daemon at `path`. `keep_time` is awaited before each record, with its
    time.

    Raises what the clients raise when the daemon goes away, and `Failure` for a recording of what cannot be.
    """

    def __init__(
        self,
        path: str,
        header: Header,
        survey: Survey,
        keep_time: Callable[[int], Awaitable[None]],
        stack: AsyncExitStack,
    ) -> None:
        """Use `playing`. Raises ValueError for a header with words that nobody knows."""
        self.verdict = Verdict()
        self._path = path
        self._header = header
        self._survey = survey
        self._keep_time = keep_time
        self._stack = stack
        self._live = header.address_space != AddressSpaceKind.DECLARED
        self._architecture = Architecture(header.architecture)
        MmioGranularity(header.mmio_granularity)
        self._model = self._new_model()
        self._made: LiveMemory | None = None
        """None until a state is complete."""
        self._stretch: list[Traced] = []
        self._state_ends: int | None = None
        """What happens while a state is read, and the record from which on it holds."""
        self._pages = HostPages(live=self._live)
        self._announced: deque[tuple[UaddrRange | None, int]] = deque()
        """Of the invalidations that are not served, the range of those that are not held open, and how many
        faults had mapped something by then."""
        self._faults = 0
        self._changed_ns = 0

    async def play(self, recorded: Iterable[Chunk | Traced]) -> None:
        """What `in_order` gives."""
        for what in recorded:
            match what:
                case Traced():
                    await self._record(what)
                case StateBegins():
                    await self._close()
                    self._stretch, self._state_ends, self._model = [], None, self._new_model()
                    self._model.open.update(self._survey.open_at[self.verdict.states])
                    self.verdict.states += 1
                case StateEnds(number):
                    self._state_ends = number
                case Gap():
                    await self._close()
                    self.verdict.gaps += 1
                case Regions() | Vmas() | Mappings():
                    self._list(what)

    def _new_model(self) -> Model:
        return Model(self._header.words, self._header.mmio_granularity)

    def _list(self, chunk: Regions | Vmas | Mappings) -> None:
        try:
            match chunk:
                case Regions(views):
                    self._model.add_regions(views)
                case Vmas(views):
                    self._model.add_vmas(views)
                case Mappings(views):
                    self._model.add_mappings(views)
        except ValueError as error:
            raise operator_client.Failure(f"a state says what cannot be: {error}") from error

    async def _record(self, record: Traced) -> None:
        if self._state_ends is not None and record.number >= self._state_ends:
            await self._begin()
        if self._made is None:
            self._stretch.append(record)
            self.verdict.unplaced += record.kind == Kind.INTERCEPT
            return
        await self._keep_time(record.time_ns)
        with _sense_of(record):
            await self._play(record)

    # ------------------------------------------------ states

    async def _close(self) -> None:
        self._made, self._state_ends, self._stretch = None, None, []
        self._announced.clear()
        await self._stack.aclose()

    async def _begin(self) -> None:
        """Make a partition as the state says, changed by what happened while it was read."""
        model = self._model
        for record in self._stretch:
            with _sense_of(record):
                model.apply(record)
        self._stretch, self._state_ends = [], None
        granularity = MmioGranularity(model.mmio_granularity)
        opened = RepeatedPartition.opened(self._path, self._architecture, granularity)
        partition = await self._stack.enter_async_context(opened)
        restored = Restored(partition, model, self._pages, self.verdict)
        self._made = LiveMemory(restored, self._survey)
        if self._live:
            derive_vmas(model)
        await restored.make()

    @property
    def _memory(self) -> LiveMemory:
        """What there is once a state is complete."""
        assert self._made is not None
        return self._made

    @property
    def _restored(self) -> Restored:
        return self._memory.restored

    # ------------------------------------------------ records

    async def _play(self, record: Traced) -> None:
        restored, model = self._restored, self._model
        partition = restored.partition
        a, b = record.values[:2]
        match record.kind:
            case Kind.INTERCEPT:
                await self._intercept(record)
            case Kind.REGION_ADDED:
                model.apply(record)
                region = model.regions.at(a)
                if region is not None and not await self._complete(record, region):
                    await ask(self.verdict, record, "add_region", restored.add(region))
                return
            case Kind.REGION_REMOVED:
                for region in model.regions.overlapping(a, a + b):
                    if not region.waiting:
                        await ask(self.verdict, record, "remove_region", partition.remove(region))
            case Kind.GUEST_MAPPED:
                model.apply(record)
                for region in model.regions.overlapping(a, a + b):
                    await self._complete(record, region)
                return
            case Kind.POLICY_SET:
                policy = MmioGranularity.PAGE if record.detail else MmioGranularity.VMA
                request = partition.vmm.set_policy(mmio_granularity=policy)
                await ask(self.verdict, record, "set_policy", request)
                self._changed_ns = record.time_ns
            case _:
                await self._play_memory(record)
        model.apply(record)

    async def _play_memory(self, record: Traced) -> None:
        match record.kind:
            case Kind.BACKED if self._live:
                await self._memory.learn(record, vma_of(record, *record.values[2:4]))
            case Kind.INVALIDATION_BEGUN | Kind.INVALIDATION_ENDED | Kind.RANGE_INVALIDATED:
                await self._invalidation(record)
            case Kind.INVALIDATION_SERVED:
                await self._served(record)
            case Kind.VMA_MAPPED | Kind.VMA_UNMAPPED | Kind.VMA_PROTECTED if not self._live:
                await self._vma(record)

    async def _vma(self, record: Traced) -> None:
        restored = self._restored
        partition, vmm = restored.partition, restored.partition.vmm
        uaddrs = UaddrRange.at_page(*record.values[:2])
        match record.kind:
            case Kind.VMA_MAPPED:
                vma = vma_of(record, record.values[2], None)
                await ask(self.verdict, record, "map_vma", partition.declare([restored.pages.declared(vma)]))
            case Kind.VMA_UNMAPPED:
                await ask(self.verdict, record, "unmap_vma", vmm.unmap_vma(uaddrs))
            case _:
                access = Access(record.detail & 7)
                await ask(self.verdict, record, "protect_vma", vmm.protect_vma(uaddrs, access))

    async def _complete(self, record: Traced, region: Region) -> bool:
        """Whether it is a pinned region that was not whole; it is added once the guest reaches all of it.

        In the recording it was added first, and its faults were told to wait.
        """
        if not region.waiting:
            return False
        restored, model = self._restored, self._model
        if model.reached(region) == [(region.start, region.end)]:
            region.waiting = False
            if self._live:
                for mapping in model.table.clipped(region.start, region.end):
                    await self._memory.learn(record, behind(mapping, record))
            await ask(self.verdict, record, "add_region", restored.add(region))
        return True

    # ------------------------------------------------ invalidations

    async def _invalidation(self, record: Traced) -> None:
        partition, model = self._restored.partition, self._model
        uaddrs = UaddrRange.at_page(*record.values[:2])
        announced = model.source(record)
        if record.kind == Kind.RANGE_INVALIDATED:
            self._announced.append((uaddrs, self._faults))
            if self._live:
                await self._memory.forget(record, uaddrs)
            else:
                await ask(self.verdict, record, "invalidate", partition.notifier.invalidate(uaddrs))
            return
        if record.kind == Kind.INVALIDATION_BEGUN:
            self._announced.append((None, self._faults))
        else:
            self._changed_ns = record.time_ns
        if announced != "notifier":
            return  # it is part of the call that made it
        if record.kind == Kind.INVALIDATION_BEGUN:
            await ask(self.verdict, record, "invalidate_begin", partition.begin(uaddrs))
            return
        if self._live:
            await self._memory.forget(record, uaddrs)
        if model.open[uaddrs]:
            await ask(self.verdict, record, "invalidate_end", partition.end(uaddrs))

    async def _served(self, record: Traced) -> None:
        """What a fault mapped between an invalidation and its pass, the pass took away again."""
        partition = self._restored.partition
        for _ in range(min(record.values[1], len(self._announced))):
            uaddrs, faults = self._announced.popleft()
            if uaddrs is not None and faults != self._faults:
                await ask(self.verdict, record, "invalidate", partition.notifier.invalidate(uaddrs))

    # ------------------------------------------------ intercepts

    async def _intercept(self, record: Traced) -> None:
        intercept, verdict = intercept_of(record, self._header.words), self.verdict
        verdict.intercepts += 1
        region = None if intercept.gfn is None else self._model.regions.at(intercept.gfn)
        why = why_not(intercept, region, self._model, live=self._live)
        if why is not None:
            verdict.not_repeatable[why] += 1
            return
        made = claim(intercept, self._model)
        got = await self._send(record, intercept)
        if got is None:
            return
        verdict.compared += 1
        if got == (intercept.outcome, intercept.reason):
            verdict.equal += 1
        elif is_another_order(intercept, got[1], made):
            verdict.equal += 1
            verdict.reordered += 1
        else:
            verdict.differ(difference(intercept, region, got))
        if "mapped" in {intercept.reason, got[1]} and region is not None:
            self._faults += 1
            began_ns = record.time_ns - intercept.total_ns
            if self._live or began_ns <= self._changed_ns or got[1] != intercept.reason:
                await self._restored.settle(record, region)

    async def _send(self, record: Traced, intercept: Intercept) -> tuple[str, str] | None:
        """The answer as (outcome, reason); None if the daemon would not have it."""
        partition = self._restored.partition
        message = _NO_MEMORY
        if intercept.gfn is not None:
            message = build_memory_intercept(
                gpa=intercept.gfn << PAGE_SHIFT,
                access=intercept.access,
                architecture=self._architecture,
                vp_index=intercept.vp_index,
            )
        try:
            vp = await partition.vp(intercept.vp_index)
            answer = await vp.intercept(message)
            if answer is Answer.NO_PROGRESS:  # answers that are not repeated would have ended the run
                answer = await vp.intercept(message)
        except WireError as error:
            refused(self.verdict, record, "intercept", error)
            return None
        return str(answer.outcome), answer.reason


@asynccontextmanager
async def playing(
    path: str, header: Header, survey: Survey, keep_time: Callable[[int], Awaitable[None]]
) -> AsyncIterator[Player]:
    """A player, whose connections end with the block."""
    async with AsyncExitStack() as stack:
        try:
            player = Player(path, header, survey, keep_time, stack)
        except ValueError as error:
            raise operator_client.Failure(f"the recording says what cannot be: {error}") from error
        yield player


@contextmanager
def _sense_of(record: Traced) -> Iterator[None]:
    try:
        yield
    except (RangeError, ValueError) as error:
        raise operator_client.Failure(f"record {record.number:,} says what cannot be: {error}") from error
