"""Work that grows with what a client chooses lets other tasks run whenever its uid's time is used up, here
after every `QUESTIONS` pieces.

A turn is counted by a task of another's that is ready all the time. Taking a lock, and the order in which
trio runs what is ready, give or take two turns; a walk that takes none is far below the counts asserted.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import interceptd
from explorer.model_partition import addition, removal
from fakes.idle_vp import IdleVp
from fakes.model_partition import RW, ModelPartition
from fakes.others import Others
from fakes.used_up_time import time_used_up_every
from intercept_protocol.addresses import PAGE_SHIFT, GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import Event, EventName
from intercept_protocol.messages import (
    InvalidateBegin,
    ListPartitions,
    MmioGranularity,
    OperatorStatistics,
    RegionKind,
)
from intercept_protocol.messages.vmm import LIST_LIMIT
from intercept_protocol.outcomes import Access, Answer
from interceptd.config.live import Settings
from interceptd.config.schema import Config, Limits
from interceptd.connections.received_fds import ReceivedFds
from interceptd.connections.tenants import Tenants
from interceptd.daemon import Daemon
from interceptd.memory import long_lists
from interceptd.memory.region import KindOrigin, Region, RegionState
from interceptd.pages.mapping import HOST_BACKING, Extent, Frame
from interceptd.pages.ordered_map import CHUNK
from interceptd.partition.partition import Partition
from interceptd.partition.registry import PartitionRegistry
from interceptd.partition.virtual_processor import VirtualProcessor
from interceptd.scheduling.step_monitor import StepMonitor, Usage
from interceptd.scheduling.time_share import SHARE, SLICE_NS, TimeShares
from interceptd.sessions import views
from interceptd.sessions.notifier import NotifierSession
from interceptd.sessions.operator import OperatorSession
from interceptd.sessions.vmm import kick
from interceptd.telemetry.event_bus import EventBus, EventFilter, Subscription

TURNS = 8
QUESTIONS = 32
FEW = QUESTIONS // 2
MANY = TURNS * QUESTIONS


def scattered(count: int) -> list[Extent]:
    """Pages of which no two can be one mapping."""
    return [
        Extent(uaddrs, Frame(HOST_BACKING, 2 * uaddrs.start), Access.READ, None, uaddrs)
        for uaddrs in (UaddrRange.at_page(page, 1) for page in range(count))
    ]


async def pinned(model: ModelPartition, page_count: int) -> Region:
    """In the list, and not populated."""
    region = Region(
        GfnRange.of(0, page_count),
        UaddrRange.at_page(0, page_count),
        RegionKind.PINNED,
        KindOrigin.STATED,
        RW,
        RegionState.POPULATING,
    )
    await model.regions.add(region)
    return region


async def invalidated(model: ModelPartition, pages: int) -> None:
    """Served by this task, whose time it takes."""
    model.notifier.invalidate(UaddrRange.at_page(0, pages))
    await model.regions.serve_pending()


async def committed(model: ModelPartition, extents: list[Extent]) -> Answer | None:
    region = await pinned(model, len(extents))
    return await model.regions.commit(model.regions.begin_whole(region), extents)


async def test_a_commit_of_many_gaps_takes_turns(model: ModelPartition, nursery: trio.Nursery) -> None:
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        assert await committed(model, scattered(MANY)) is Answer.MAPPED
    assert others.turns >= TURNS - 2
    assert len(model.hypervisor.events) == MANY


async def test_a_commit_of_few_gaps_does_not_yield(model: ModelPartition, nursery: trio.Nursery) -> None:
    """A checkpoint a map would double what a fault costs."""
    region = await pinned(model, FEW)
    attempt = model.regions.begin_whole(region)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        await model.regions.commit(attempt, scattered(FEW))
    assert others.turns <= 1


async def test_the_undoing_of_many_maps_takes_turns(model: ModelPartition, nursery: trio.Nursery) -> None:
    model.hypervisor.refuse_map(nth=MANY)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        assert await committed(model, scattered(MANY)) is Answer.HYPERVISOR_ERROR
    assert others.turns >= 2 * TURNS - 3
    assert model.hypervisor.counters().slat_extents == 0


@pytest.mark.parametrize("change", ["invalidate", "remove", "close"])
async def test_revoking_many_mappings_of_one_region_yields(
    model: ModelPartition, nursery: trio.Nursery, change: str
) -> None:
    await committed(model, scattered(MANY))
    region = model.regions.first_regions(1)[0]
    changes = {
        "invalidate": lambda: invalidated(model, MANY),
        "remove": lambda: model.regions.remove(region),
        "close": model.regions.close,
    }
    others = Others(nursery)
    with time_used_up_every(2):  # it asks after each part
        await changes[change]()
    assert others.turns >= TURNS - 2
    assert model.hypervisor.counters().mapped_gfns == 0


async def test_counting_the_many_mappings_that_a_change_keeps_takes_turns(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    await committed(model, scattered(MANY))
    region = model.regions.first_regions(1)[0]
    region.kind, region.state = RegionKind.MMIO, RegionState.LIVE
    others = Others(nursery)
    with time_used_up_every(2):  # it asks after each part
        await model.change_regions([removal(0, MANY, 0)], [addition(0, MANY, 0)])
    assert others.turns >= TURNS - 2
    assert len(model.hypervisor.events) == MANY, "nothing was mapped or unmapped"


async def test_a_change_of_many_regions_takes_turns(model: ModelPartition, nursery: trio.Nursery) -> None:
    """To read what is asked for, to take away and to make; if that is refused, to unmake and to put back."""
    here, there = (
        [addition(2 * gfn, 1, 0, RegionKind.MOVABLE) for gfn in range(first, first + LIST_LIMIT)]
        for first in (0, LIST_LIMIT)
    )
    gone = [removal(each.start_gfn, 1, 0) for each in here]
    model.hypervisor.pieces_per_call = 1
    others = Others(nursery)
    turns: list[int] = []
    for remove, add in (([], here), (gone, there), (gone, [])):
        before = others.turns
        model.hypervisor.refuse_map(nth=LIST_LIMIT if remove else 0)
        with time_used_up_every(LIST_LIMIT // TURNS), suppress(WireError):
            await model.change_regions(remove, add)
        turns.append(others.turns - before)
    assert turns[0] >= 2 * TURNS - 3
    assert turns[1] >= 5 * TURNS - 6
    assert turns[2] >= TURNS - 2
    assert model.regions.region_count == 0


async def test_a_change_of_many_pinned_mappings_and_its_undoing_take_turns(
    model: ModelPartition, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look at them, to take them away, to map them again, and to forget them."""
    monkeypatch.setattr(long_lists, "PART", 1)
    await committed(model, scattered(MANY))
    others = Others(nursery)
    model.hypervisor.refuse_map()
    with time_used_up_every(2), pytest.raises(WireError):
        await model.change_regions([removal(0, MANY, 0)], [addition(0, 1, 1, RegionKind.MOVABLE)])
    assert others.turns >= 2 * (TURNS - 2) + 2 * (MANY // 2 - 2)
    assert model.hypervisor.counters().mapped_gfns == MANY


async def test_a_change_that_adds_many_pinned_regions_takes_turns(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """To read what is asked for, to resolve, and to map."""
    await model.map_vma(0, 1, 0)
    others = Others(nursery)
    with time_used_up_every(LIST_LIMIT // TURNS):
        await model.change_regions(
            [], [addition(2 * gfn, 1, 0, RegionKind.PINNED) for gfn in range(LIST_LIMIT)]
        )
    assert others.turns >= 3 * TURNS - 4
    assert model.hypervisor.counters().mapped_gfns == LIST_LIMIT


async def test_telling_subscribers_of_many_regions_takes_turns(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    """As many operators as there may be would take 4 ms."""
    others = Others(nursery)
    turns: list[int] = []

    class Subscriber(Subscription):
        def offer(self, event: Event) -> None:  # noqa: ARG002 - only when it comes counts
            turns.append(others.turns)

    model.event_bus.subscribe(Subscriber(), EventFilter(frozenset({EventName.REGION_ADDED})))
    with time_used_up_every(1):
        await model.change_regions([], [addition(2 * gfn, 1, 0) for gfn in range(LIST_LIMIT)])
    assert len(turns) == LIST_LIMIT
    assert len(set(turns)) >= TURNS // 2, "in two rounds the other task has at least one between"


async def test_closing_many_regions_takes_turns(model: ModelPartition, nursery: trio.Nursery) -> None:
    for gfn in range(MANY):
        await model.add_region(gfn, 1, gfn)
    model.hypervisor.pieces_per_call = 64
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        await model.regions.close()
    assert others.turns >= TURNS - 2


async def test_an_invalidation_of_many_regions_takes_turns(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    for gfn in range(MANY):
        await model.add_region(gfn, 1, 0)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        await invalidated(model, 1)
    assert others.turns >= TURNS - 2


async def test_populating_from_many_vmas_takes_turns_between_the_questions(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    for page in range(MANY):
        await model.map_vma(page, 1, 2 * page)
    region = await pinned(model, MANY)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        await model.faults.populate(region)
    assert others.turns >= 2 * TURNS - 3, "between the questions, and then between the maps"
    assert len(model.hypervisor.events) == MANY


async def test_what_populating_was_made_from_is_freed_in_turns(
    model: ModelPartition, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many turns as for the questions and the maps: there are two lists, and none is freed at once."""
    monkeypatch.setattr(long_lists, "PART", 1)
    for page in range(MANY):
        await model.map_vma(page, 1, 2 * page)
    region = await pinned(model, MANY)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        await model.faults.populate(region)
    assert others.turns >= 4 * TURNS - 5


async def test_what_a_change_pinned_is_freed_in_turns(
    model: ModelPartition, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_lists, "PART", 1)
    for page in range(MANY):
        await model.map_vma(page, 1, 2 * page)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        await model.change_regions([], [addition(0, MANY, 0, RegionKind.PINNED)])
    assert others.turns >= 4 * TURNS - 5


async def test_populating_from_few_vmas_does_not_yield(model: ModelPartition, nursery: trio.Nursery) -> None:
    for page in range(FEW):
        await model.map_vma(page, 1, 2 * page)
    region = await pinned(model, FEW)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        await model.faults.populate(region)
    assert others.turns <= 1


async def test_an_invalidation_of_many_pieces_that_hit_nothing_takes_turns(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    others = Others(nursery)
    for page in range(MANY):
        model.notifier.invalidate(UaddrRange.at_page(2 * page, 1))
    with time_used_up_every(QUESTIONS):
        await model.regions.serve_pending()
    assert others.turns >= TURNS - 2


@pytest.mark.parametrize("edit", ["unmap_vma", "protect_vma"])
async def test_an_edit_of_many_vmas_takes_turns(
    model: ModelPartition, nursery: trio.Nursery, edit: str
) -> None:
    for page in range(MANY * 4):
        await model.map_vma(page, 1, 2 * page)
    everything = UaddrRange.at_page(0, MANY * 4)
    edits = {
        "unmap_vma": partial(model.declared.unmap_vma, everything),
        "protect_vma": partial(model.declared.protect_vma, everything, Access.READ),
    }
    others = Others(nursery)
    with time_used_up_every(1):  # it asks after each part
        await edits[edit]()
    assert others.turns >= TURNS - 2


async def test_a_connection_that_leaves_many_begins_open_takes_turns(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    session = NotifierSession(model.notifier, model.regions, partial(kick, model.partition))
    for page in range(4 * TURNS):
        begun = session.answer(InvalidateBegin(start_uaddr=page << PAGE_SHIFT, length=1 << PAGE_SHIFT))
        assert begun is not None
        await begun
    others = Others(nursery)
    with time_used_up_every(4):
        await session.close()
    assert others.turns >= TURNS - 2
    assert model.notifier.open_invalidations == 0


@pytest.mark.parametrize("ended", ["regions", "mappings", "vmas", "slat"])
async def test_freeing_what_is_left_of_a_partition_takes_turns(
    model: ModelPartition, nursery: trio.Nursery, ended: str
) -> None:
    many = TURNS * CHUNK // 2 if ended != "regions" else 4 * TURNS
    if ended == "vmas":
        for page in range(many):
            await model.map_vma(page, 1, 2 * page)
    elif ended == "regions":
        for gfn in range(many):
            await model.add_region(gfn, 1, gfn)
    else:
        await committed(model, scattered(many))
    frees = {
        "regions": (4, model.regions.discard),
        "mappings": (1, model.mappings.discard),
        "vmas": (1, model.declared.discard),
        "slat": (1, model.hypervisor.discard),
    }
    questions, free = frees[ended]
    others = Others(nursery)
    with time_used_up_every(questions):
        await free()
    assert others.turns >= TURNS - 4, "chunks are half full, or full"
    assert (model.regions.region_count == 0) is (ended in {"regions", "vmas"})


@pytest.mark.parametrize("told", ["kicked", "drained"])
async def test_telling_many_vps_takes_turns(model: ModelPartition, nursery: trio.Nursery, told: str) -> None:
    vps = {index: IdleVp() for index in range(4 * TURNS)}
    model.partition.vps.update(cast("dict[int, VirtualProcessor]", vps))
    others = Others(nursery)
    with time_used_up_every(4):
        if told == "kicked":
            await model.partition.kick_all()
        else:
            await model.partition.drain_vps()
    assert others.turns >= TURNS - 2
    assert {vp.told for vp in vps.values()} == {told}


async def test_an_operators_view_of_many_partitions_takes_turns(nursery: trio.Nursery) -> None:
    registry = PartitionRegistry()
    for number in range(4 * TURNS):
        registry.add(ModelPartition(partition_id=number + 1).partition)
    daemon = Daemon(Settings(Config()))
    daemon.partitions = registry
    session = OperatorSession(daemon, EventBus(), Subscription(), ReceivedFds(Tenants(Limits).of(0).closer))
    others = Others(nursery)
    for call in (ListPartitions(after=0), OperatorStatistics()):
        before = others.turns
        with time_used_up_every(4):
            answer = session.answer(call)
            assert isinstance(answer, Coroutine)
            await answer
        assert others.turns - before >= TURNS - 2


async def test_a_prefault_of_many_pages_takes_turns(model: ModelPartition, nursery: trio.Nursery) -> None:
    model.regions.mmio_granularity = MmioGranularity.PAGE
    model.hypervisor.may_block = False
    await model.map_vma(0, MANY, 0)
    await model.add_region(0, MANY, 0)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        assert await model.prefault(0, MANY) == (MANY, MANY)
    assert others.turns >= TURNS - 2


@pytest.mark.parametrize("list_page", [views.region_page, views.vma_page, views.mapping_page])
async def test_a_page_of_a_list_takes_turns(
    model: ModelPartition,
    nursery: trio.Nursery,
    list_page: Callable[[Partition, int | None], Awaitable[object]],
) -> None:
    model.regions.mmio_granularity = MmioGranularity.PAGE
    for page in range(0, 2 * MANY, 2):
        await model.map_vma(page, 1, page)
        await model.add_region(page, 1, page)
        await model.fault(page)
    others = Others(nursery)
    with time_used_up_every(QUESTIONS):
        await list_page(model.partition, None)
    assert others.turns >= TURNS - 2


async def test_of_many_faults_that_waited_for_the_same_few_go_on_in_a_round(
    model: ModelPartition, nursery: trio.Nursery
) -> None:
    ticks = itertools.count(0, SLICE_NS + 1)
    monitor = StepMonitor(now=lambda: next(ticks), usage=lambda: Usage(0, 0, 0))
    turns, rounds = TimeShares(monitor), list[int]()

    async def fault(gfn: int) -> None:
        await model.fault(gfn)
        rounds.append(monitor.round)

    await model.map_vma(0, MANY, 0)
    await model.add_region(0, MANY, 0)
    await model.begin(0, MANY)
    with monitor.installed():
        nursery.start_soon(turns.run)
        SHARE.set(turns.share())
        async with trio.open_nursery() as faults:
            for gfn in range(FEW):
                faults.start_soon(fault, gfn)
            await wait_all_tasks_blocked()
            model.end(0, MANY)
        SHARE.set(None)
    assert len(rounds) == FEW
    assert max(map(rounds.count, rounds)) <= FEW // 4


# ------------------------------------------------ no other place

ELSEWHERE: Final = {
    "address_space/image.py: ImageAddressSpace.discard": "tests/service/test_restored_guest.py",
    "address_space/image.py: ImageAddressSpace.image_pages": "tests/service/test_restored_guest.py",
    "partition/completion.py: Completion.missing_pages": "tests/service/test_restored_guest.py",
    "partition/fault_reader.py: FaultReader._read": "tests/service/test_restored_guest.py",
    "partition/fault_reader.py: FaultReader._remove_rest": "tests/service/test_restored_guest.py",
    "partition/fault_reader.py: FaultReader._try_again": "as many as threads of the VMM wait",
    "address_space/process.py: ProcessAddressSpace._probe": "no work of its own: the probes take turns",
    "address_space/unmap_watch.py: UnmapWatch._read": "tests/live/test_storms.py",
    "connections/connection.py: Connection.receive": "tests/service/test_connection.py",
    "partition/virtual_processor.py: VirtualProcessor._handle": "one that waited goes on in its turn",
    "partition/partition.py: Partition._telling_vps": "tests/service/test_partition.py",
    "memory/guest_mappings.py: GuestMappings.unmap_unrecorded": "tests/service/recovery/test_restore.py",
    "memory/region_manager.py: RegionManager.close_gaps": "tests/service/recovery/test_restore.py",
    "memory/region_manager.py: RegionManager.doubt": "tests/service/recovery/test_restore.py",
    "memory/region_manager.py: RegionManager.take_over_mapping": "tests/service/recovery/test_restore.py",
    "recovery/compactor.py: Compactor._still_wanted": "tests/service/recovery/test_compactor.py",
    "recovery/fold.py: Fold.discard": "tests/service/recovery/test_restore.py",
    "recovery/recover.py: _folded": "after each record and each piece, as the compactor does",
    "recovery/restore.py: restore": "tests/service/recovery/test_restore.py",
    "recovery/returning_restore.py: bring_back": "tests/service/recovery/test_returning_restore.py",
    "recovery/returning.py: ReturningVmm._bring_back": "after each connection, of which there are few",
    "sessions/handoff_listener.py: look_at_handoff": "tests/service/test_handoff_listener.py",
}
HERE: Final = {
    "address_space/declared.py: DeclaredAddressSpace.discard",
    "address_space/declared.py: DeclaredAddressSpace.protect_vma",
    "address_space/declared.py: DeclaredAddressSpace.unmap_vma",
    "hypervisor/slat.py: SoftwareSlat.discard",
    "memory/fault_handler.py: FaultHandler._resolve_whole",
    "memory/fault_handler.py: FaultHandler.handle",
    "memory/guest_mappings.py: GuestMappings._undo",
    "memory/guest_mappings.py: GuestMappings.all",
    "memory/guest_mappings.py: GuestMappings.count",
    "memory/long_lists.py: LongList.free",
    "memory/prefault.py: prefault",
    "memory/guest_mappings.py: GuestMappings.discard",
    "memory/guest_mappings.py: GuestMappings.map_gaps",
    "memory/guest_mappings.py: GuestMappings.map_again",
    "memory/guest_mappings.py: GuestMappings.map_no_access",
    "memory/guest_mappings.py: Revocation.revoke",
    "memory/guest_mappings.py: Revocation.unmap_all",
    "memory/mapping_change.py: MappingChange._unmap",
    "memory/mapping_change.py: MappingChange.make",
    "memory/region_manager.py: RegionManager._publish",
    "memory/region_manager.py: RegionManager._remove",
    "memory/region_manager.py: RegionManager.discard",
    "memory/region_manager.py: RegionManager.serve_pending",
    "partition/partition.py: Partition.drain_vps",
    "partition/partition.py: Partition.kick_all",
    "partition/registry.py: PartitionRegistry.totals",
    "sessions/notifier.py: NotifierSession.close",
    "sessions/operator.py: OperatorSession._list",
    "sessions/views.py: _views",
    "sessions/region_calls.py: RegionCalls._change",
}


def places() -> Iterator[str]:
    """The functions and methods of the daemon that give way."""
    package = Path(interceptd.__file__).parent
    for file in package.rglob("*.py"):
        for owner in ast.walk(ast.parse(file.read_text())):
            if isinstance(owner, ast.ClassDef | ast.Module) and file.parent.name != "scheduling":
                prefix = f"{owner.name}." if isinstance(owner, ast.ClassDef) else ""
                for method in owner.body:
                    if isinstance(method, ast.AsyncFunctionDef) and "give_way" in ast.unparse(method):
                        yield f"{file.relative_to(package)}: {prefix}{method.name}"


def test_every_place_that_gives_way_is_tested() -> None:
    assert set(places()) == HERE | set(ELSEWHERE)
