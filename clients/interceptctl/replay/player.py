"""Repeats a recording: what changed becomes requests, and each intercept is sent and its answer compared.

Owns the order of things, and which answers depend on the partition's state alone. Must not know files or
terminals. The requests go one after the other, so nothing depends on how fast the daemon is.

Live memory is repeated as declared memory: what faults found is declared just before they are repeated, and
taken back when it is invalidated. How much of a VMA such a fault mapped depends on what the kernel said then,
so the guest's mappings are made as they were.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Final

from intercept_client import DeclaredVma
from intercept_protocol.addresses import PAGE_SHIFT, RangeError, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.hv_message import InterceptMessage, MessageType, build_memory_intercept
from intercept_protocol.messages import AddressSpaceKind, Architecture, MmioGranularity, RegionKind
from intercept_protocol.outcomes import Access, Answer, spelled
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
from interceptctl.page_map import without

from .daemon_side import RepeatedPartition
from .model import Backing, Made, Mapping, Model, Region, Vma, vma_of
from .survey import Survey
from .verdict import Difference, Verdict

REPEATABLE: Final = frozenset(
    str(answer.reason)
    for answer in (
        Answer.MAPPED, Answer.ALREADY_MAPPED, Answer.NOT_MEMORY, Answer.NO_REGION, Answer.PERMISSION,
        Answer.UNBACKED, Answer.INVALIDATING,
    )
)  # fmt: skip
"""Reasons that depend on the partition's state; all others depend on time, too."""
_BACKINGS: Final = 36
"""Each backing of live memory gets 2^36 host pages, whose contents nobody looks at."""
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
        self._partition: RepeatedPartition | None = None
        """None until a state is complete."""
        self._stretch: list[Traced] = []
        self._state_ends: int | None = None
        """What happens while a state is read, and the record from which on it holds."""
        self._numbers: dict[Backing, int] = {}
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
        if self._partition is None:
            self._stretch.append(record)
            self.verdict.unplaced += record.kind == Kind.INTERCEPT
            return
        await self._keep_time(record.time_ns)
        with _sense_of(record):
            await self._play(record)

    # ------------------------------------------------ states

    async def _close(self) -> None:
        self._partition, self._state_ends, self._stretch = None, None, []
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
        partition = RepeatedPartition.opened(self._path, self._architecture, granularity)
        self._partition = await self._stack.enter_async_context(partition)
        if self._live:
            self._derive_vmas()
        await self._partition.declare([self._declared(vma) for vma in model.vmas])
        regions = list(model.regions)
        for region in regions:
            if region.dangling and not region.waiting:
                await self._add_dangling(region)
        for region in regions:
            if not (region.dangling or region.waiting):
                await self._add(region)
        for uaddrs in model.open.elements():
            await self._partition.begin(uaddrs)

    def _derive_vmas(self) -> None:
        """What must be behind the guest's mappings. Of two that show it, that with more rights says more."""
        for mapping in sorted(self._model.table, key=lambda mapping: mapping.access):
            self._model.vmas.put(_behind(mapping))

    async def _add(self, region: Region) -> None:
        assert self._partition is not None
        if region.kind is RegionKind.PINNED:
            await self._partition.add(region)
        else:
            await self._partition.map_exactly(region, self._model.reached(region), present=False)

    async def _add_dangling(self, region: Region) -> None:
        """A pinned region that lost some of its memory: it is added whole, and then loses that."""
        assert self._partition is not None
        vmm, model = self._partition.vmm, self._model
        start, end = region.uaddrs.start, region.uaddrs.end
        hidden = [vma for vma in model.vmas.clipped(start, end) if Access.READ not in vma.access]
        for vma in hidden:
            await vmm.unmap_vma(UaddrRange(start=vma.start, end=vma.end))
        readable = [(vma.start, vma.end) for vma in model.vmas.clipped(start, end) if vma not in hidden]
        missing = without((start, end), readable)
        await self._partition.declare(
            [DeclaredVma(UaddrRange(start=a, end=b), a, Access.READ | Access.WRITE) for a, b in missing]
        )
        await self._partition.add(region)
        for first, behind in missing:
            await vmm.unmap_vma(UaddrRange(start=first, end=behind))
        await self._partition.declare([self._declared(vma) for vma in hidden])
        for first, behind in without((region.start, region.end), model.reached(region)):
            page = region.uaddr_page(first)
            await self._partition.notifier.invalidate(UaddrRange(start=page, end=page + behind - first))

    # ------------------------------------------------ records

    async def _play(self, record: Traced) -> None:
        partition, model = self._partition, self._model
        assert partition is not None
        a, b = record.values[:2]
        match record.kind:
            case Kind.INTERCEPT:
                await self._intercept(record)
            case Kind.REGION_ADDED:
                model.apply(record)
                region = model.regions.at(a)
                if region is not None and not await self._complete(record, region):
                    await self._ask(record, "add_region", self._add(region))
                return
            case Kind.REGION_REMOVED:
                for region in model.regions.overlapping(a, a + b):
                    if not region.waiting:
                        await self._ask(record, "remove_region", partition.remove(region))
            case Kind.GUEST_MAPPED:
                model.apply(record)
                for region in model.regions.overlapping(a, a + b):
                    await self._complete(record, region)
                return
            case Kind.POLICY_SET:
                policy = MmioGranularity.PAGE if record.detail else MmioGranularity.VMA
                await self._ask(record, "set_policy", partition.vmm.set_policy(mmio_granularity=policy))
                self._changed_ns = record.time_ns
            case _:
                await self._play_memory(record)
        model.apply(record)

    async def _play_memory(self, record: Traced) -> None:
        match record.kind:
            case Kind.BACKED if self._live:
                await self._learn(record, vma_of(record, *record.values[2:4]))
            case Kind.INVALIDATION_BEGUN | Kind.INVALIDATION_ENDED | Kind.RANGE_INVALIDATED:
                await self._invalidation(record)
            case Kind.INVALIDATION_SERVED:
                await self._served(record)
            case Kind.VMA_MAPPED | Kind.VMA_UNMAPPED | Kind.VMA_PROTECTED if not self._live:
                await self._vma(record)

    async def _vma(self, record: Traced) -> None:
        assert self._partition is not None
        vmm = self._partition.vmm
        uaddrs = UaddrRange.at_page(*record.values[:2])
        match record.kind:
            case Kind.VMA_MAPPED:
                vma = vma_of(record, record.values[2], None)
                await self._ask(record, "map_vma", self._partition.declare([self._declared(vma)]))
            case Kind.VMA_UNMAPPED:
                await self._ask(record, "unmap_vma", vmm.unmap_vma(uaddrs))
            case _:
                access = Access(record.detail & 7)
                await self._ask(record, "protect_vma", vmm.protect_vma(uaddrs, access))

    async def _complete(self, record: Traced, region: Region) -> bool:
        """Whether it is a pinned region that was not whole; it is added once the guest reaches all of it.

        In the recording it was added first, and its faults were told to wait.
        """
        if not region.waiting:
            return False
        model = self._model
        if model.reached(region) == [(region.start, region.end)]:
            region.waiting = False
            if self._live:
                for mapping in model.table.clipped(region.start, region.end):
                    await self._learn(record, _behind(mapping, record))
            await self._ask(record, "add_region", self._add(region))
        return True

    # ------------------------------------------------ invalidations

    async def _invalidation(self, record: Traced) -> None:
        partition, model = self._partition, self._model
        assert partition is not None
        uaddrs = UaddrRange.at_page(*record.values[:2])
        announced = model.source(record)
        if record.kind == Kind.RANGE_INVALIDATED:
            self._announced.append((uaddrs, self._faults))
            if self._live:
                await self._forget(record, uaddrs)
            else:
                await self._ask(record, "invalidate", partition.notifier.invalidate(uaddrs))
            return
        if record.kind == Kind.INVALIDATION_BEGUN:
            self._announced.append((None, self._faults))
        else:
            self._changed_ns = record.time_ns
        if announced != "notifier":
            return  # it is part of the call that made it
        if record.kind == Kind.INVALIDATION_BEGUN:
            await self._ask(record, "invalidate_begin", partition.begin(uaddrs))
            return
        if self._live:
            await self._forget(record, uaddrs)
        if model.open[uaddrs]:
            await self._ask(record, "invalidate_end", partition.end(uaddrs))

    async def _served(self, record: Traced) -> None:
        """What a fault mapped between an invalidation and its pass, the pass took away again."""
        assert self._partition is not None
        for _ in range(min(record.values[1], len(self._announced))):
            uaddrs, faults = self._announced.popleft()
            if uaddrs is not None and faults != self._faults:
                await self._ask(record, "invalidate", self._partition.notifier.invalidate(uaddrs))

    # ------------------------------------------------ live memory

    async def _forget(self, record: Traced, uaddrs: UaddrRange) -> None:
        assert self._partition is not None
        self._model.forget(uaddrs)
        await self._ask(record, "unmap_vma", self._partition.vmm.unmap_vma(uaddrs))

    async def _learn(self, record: Traced, found: Vma) -> None:
        """Declare what a fault found, where that is not declared yet."""
        assert self._partition is not None
        model, wrong = self._model, False
        for known in model.vmas.clipped(found.start, found.end):
            part = found.slice(known.start, known.end)
            same_frame = (known.page, known.backing) == (part.page, part.backing)
            if same_frame and known.access == part.access:
                continue
            if same_frame and known.since is None:
                pass  # the guest's mappings show fewer rights than there are
            elif self._survey.told_later(record, known.start, known.end):
                self.verdict.told_late += 1
            else:
                self._contradiction(record, known, part)
            wrong = True
            await self._forget(record, UaddrRange(start=known.start, end=known.end))
        for start, end in model.vmas.gaps(found.start, found.end):
            vma = found.slice(start, end)
            model.vmas.put(vma)
            await self._ask(record, "map_vmas", self._partition.declare([self._declared(vma)]))
        if wrong:
            for region in list(model.regions):
                if region.uaddrs.start < found.end and found.start < region.uaddrs.end:
                    await self._settle(record, region)

    def _contradiction(self, record: Traced, known: Vma, found: Vma) -> None:
        since = "since the state" if known.since is None else f"since record {known.since:,}"
        self.verdict.differ(
            Difference(
                record=record.number,
                time_ns=record.time_ns,
                gfn=self._model.gfn_of(found.start),
                page=found.start,
                what="what backs memory of the VMM",
                recorded=_backing(found),
                replayed=f"{_backing(known)}, {since}",
                why="nothing was invalidated in between",
            )
        )

    def _declared(self, vma: Vma) -> DeclaredVma:
        return DeclaredVma(UaddrRange(start=vma.start, end=vma.end), self._pfn(vma), vma.access, io=vma.io)

    def _pfn(self, vma: Vma) -> int:
        if not self._live:
            return vma.page
        number = self._numbers.setdefault(vma.backing, len(self._numbers) % (1 << 15))
        return (number << _BACKINGS) + vma.page % (1 << _BACKINGS)

    async def _settle(self, record: Traced, region: Region) -> None:
        """Have the guest reach of the region what it reached in the recording."""
        partition = self._partition
        assert partition is not None
        if region.kind is RegionKind.PINNED:
            return
        wanted = self._model.reached(region)
        if await partition.reached(region.gfns) != wanted:
            await self._ask(record, "change_regions", partition.map_exactly(region, wanted, present=True))

    # ------------------------------------------------ intercepts

    async def _intercept(self, record: Traced) -> None:
        intercept, verdict = intercept_of(record, self._header.words), self.verdict
        verdict.intercepts += 1
        region = None if intercept.gfn is None else self._model.regions.at(intercept.gfn)
        why = self._why_not(intercept, region)
        if why is not None:
            verdict.not_repeatable[why] += 1
            return
        made = self._claim(intercept)
        got = await self._send(record, intercept)
        if got is None:
            return
        verdict.compared += 1
        if got == (intercept.outcome, intercept.reason):
            verdict.equal += 1
        elif self._is_another_order(intercept, got[1], made):
            verdict.equal += 1
            verdict.reordered += 1
        else:
            self._difference(intercept, region, got)
        if "mapped" in {intercept.reason, got[1]} and region is not None:
            self._faults += 1
            began_ns = record.time_ns - intercept.total_ns
            if self._live or began_ns <= self._changed_ns or got[1] != intercept.reason:
                await self._settle(record, region)

    def _why_not(self, intercept: Intercept, region: Region | None) -> str | None:
        """Why the recorded answer cannot be expected again."""
        if intercept.reason not in REPEATABLE:
            return intercept.reason
        if intercept.gfn is None:
            return None
        model, reason = self._model, intercept.reason
        if region is None:
            going = reason == "already_mapped" and model.table.at(intercept.gfn) is not None
            return "region being removed" if going else None
        if region.waiting:
            return "region being added"
        page = region.uaddr_page(intercept.gfn)
        if reason == "invalidating":
            return None if model.open_at(page) else "invalidating"
        vma = model.vmas.at(page)
        if reason == "unbacked" and vma is not None and not region.dangling:
            if vma.io is not (region.kind is RegionKind.MMIO) and region.kind is not RegionKind.PINNED:
                return "memory of another kind than the region's (auto)"
            if (
                self._live
                and vma.since is not None
                and vma.since_ns >= intercept.time_ns - intercept.total_ns
            ):
                return "memory that was mapped meanwhile"
        return None

    def _claim(self, intercept: Intercept) -> Made | None:
        """How what the guest reaches there came about; this may be the answer that it was made for."""
        mapping = None if intercept.gfn is None else self._model.table.at(intercept.gfn)
        if mapping is None:
            return None
        if intercept.reason == "mapped":
            mapping.made.answered = True
        return mapping.made

    def _is_another_order(self, intercept: Intercept, got: str, made: Made | None) -> bool:
        """Whether the recorded answers are right in another order.

        Of two that want one page, the first to come maps it; the second may be answered before it. What the
        VMM prefaults is found mapped, too.
        """
        if made is None:
            return False
        if (intercept.reason, got) == ("already_mapped", "mapped") and not made.answered:
            made.early = True
            return True
        if (intercept.reason, got) == ("mapped", "already_mapped") and made.early:
            made.early = False
            return True
        return False

    async def _send(self, record: Traced, intercept: Intercept) -> tuple[str, str] | None:
        """The answer as (outcome, reason); None if the daemon would not have it."""
        assert self._partition is not None
        message = _NO_MEMORY
        if intercept.gfn is not None:
            message = build_memory_intercept(
                gpa=intercept.gfn << PAGE_SHIFT,
                access=intercept.access,
                architecture=self._architecture,
                vp_index=intercept.vp_index,
            )
        try:
            vp = await self._partition.vp(intercept.vp_index)
            answer = await vp.intercept(message)
            if answer is Answer.NO_PROGRESS:  # answers that are not repeated would have ended the run
                answer = await vp.intercept(message)
        except WireError as error:
            self._refused(record, "intercept", error)
            return None
        return str(answer.outcome), answer.reason

    def _difference(self, intercept: Intercept, region: Region | None, got: tuple[str, str]) -> None:
        gfn = intercept.gfn
        self.verdict.differ(
            Difference(
                record=intercept.number,
                time_ns=intercept.time_ns,
                vp_index=intercept.vp_index,
                gfn=gfn,
                page=None if region is None or gfn is None else region.uaddr_page(gfn),
                what="no access to memory" if gfn is None else f"{spelled(intercept.access)} of gfn {gfn:#x}",
                recorded=f"{intercept.outcome} {intercept.reason}",
                replayed=" ".join(got),
            )
        )

    async def _ask(self, record: Traced, what: str, request: Awaitable[None]) -> None:
        """Repeat what the recorded daemon has carried out; that this one refuses it is a difference."""
        try:
            await request
        except WireError as error:
            self._refused(record, what, error)

    def _refused(self, record: Traced, what: str, error: WireError) -> None:
        start = record.values[0]
        of_guest = record.kind in {Kind.INTERCEPT, Kind.REGION_ADDED, Kind.REGION_REMOVED, Kind.GUEST_MAPPED}
        self.verdict.differ(
            Difference(
                record=record.number,
                time_ns=record.time_ns,
                gfn=start if of_guest else None,
                page=None if of_guest else start,
                what=what,
                recorded="carried out",
                replayed=f"refused: {error}",
            )
        )


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


def _behind(mapping: Mapping, record: Traced | None = None) -> Vma:
    """The VMA that a mapping shows, with the rights that it must have at least."""
    start = mapping.uaddr_page
    return Vma(
        start, start + mapping.end - mapping.start, mapping.page, mapping.access & ~Access.EXECUTE, False,
        mapping.backing, None if record is None else record.number, 0 if record is None else record.time_ns,
    )  # fmt: skip


def _backing(vma: Vma) -> str:
    return f"page {vma.page:#x} of backing {vma.backing or 0:#x}, {spelled(vma.access)}"
