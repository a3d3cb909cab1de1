"""A pass of the cyclic garbage collector stops all partitions, so it neither tracks nor visits what is
numerous."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Sequence
from types import FrameType

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fakes.model_partition import RW, ModelPartition
from fakes.served import Served, serving
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access
from interceptd.address_space.declared import Vma
from interceptd.collector import FEW, PERIOD, collect_while_few
from interceptd.connections.tenants import OBJECTS_PER_CONNECTION
from interceptd.memory.region import KindOrigin, Region, RegionState
from interceptd.pages.mapping import HOST_BACKING, Extent, Frame, Mapping
from interceptd.pages.ordered_map import CHUNK

UADDRS = UaddrRange(start=7, end=9)
FRAME = Frame(HOST_BACKING, 70)


@pytest.mark.parametrize(
    "kept",
    [
        GfnRange(start=1, end=3),
        UADDRS,
        FRAME,
        Extent(UADDRS, FRAME, Access.READ, io=False, vma=UADDRS),
        Mapping(1, 3, FRAME, 7, Access.READ),
        Mapping(1, 3, FRAME, 7, Access.READ).slice(2, 3),
        Region(GfnRange(start=1, end=3), UADDRS, RegionKind.MMIO, KindOrigin.STATED, Access.READ),
        Vma(7, 9, 70, Access.READ, io=False),
    ],
    ids=lambda kept: type(kept).__name__,
)
def test_numerous_objects_of_a_partition_are_untracked_by_the_garbage_collector(kept: object) -> None:
    assert not gc.is_tracked(kept)


@pytest.mark.parametrize(("kept", "passes"), [(FEW, 3), (FEW + 1, 0)])
async def test_a_full_pass_is_made_once_a_period_and_only_while_few_objects_are_kept(
    kept: int, passes: int
) -> None:
    made = []
    with trio.move_on_after(3.5 * PERIOD):
        await collect_while_few(lambda: kept, lambda: made.append(trio.current_time()))
    assert len(made) == passes


async def test_no_pass_visits_what_a_partition_has_many_of(
    model: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In none of the lists that it lies in: neither while a pinned region is being populated, nor then. Two
    regions behind each page, so that they share a centre."""
    many, visited, others = 2 * CHUNK, list[int](), references_of_lists()
    for page in range(many):
        await model.map_vma(page, 1, 2 * page)
        await model.add_region(2 * many + page, 1, 0)
    pinned = Region(
        GfnRange.of(0, many), UaddrRange.at_page(0, many), RegionKind.PINNED, KindOrigin.STATED, RW,
        RegionState.POPULATING,
    )  # fmt: skip
    await model.regions.add(pinned)
    map_gpas, before = model.hypervisor.map_gpas, references_of_lists()

    async def visiting(mappings: Sequence[Mapping]) -> None:
        await map_gpas(mappings)
        model.address_space.extents.clear()  # the fake's own record
        if mappings[-1].end == many:
            visited.append(references_of_lists())

    monkeypatch.setattr(model.hypervisor, "map_gpas", visiting)
    await model.faults.populate(pinned)
    visited.append(references_of_lists())
    assert before - others < many / 4, "behind one page"
    assert len(visited) == 2
    assert max(visited) < before + many / 4


def references_of_lists() -> int:
    """How many of the objects above the collector meets in the lists that it visits."""
    numerous = (Region, Mapping, Extent, Vma)
    return sum(
        isinstance(item, numerous) or type(item).__name__ == "_Entry"
        for found in gc.get_objects()
        if type(found) is list
        for item in found
    )


async def test_connections_count_as_objects_kept() -> None:
    async with serving() as served:
        tenants = served.daemon.dispatcher.admission.tenants
        guest = await served.guest()
        await served.vp(guest)
        assert tenants.kept_objects == 2 * OBJECTS_PER_CONNECTION


async def test_no_client_makes_the_collector_pass_over_everything() -> None:
    """However many objects there are."""
    before = gc.get_threshold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect_while_few, lambda: 0)
        await wait_all_tasks_blocked()
        made = gc.get_stats()[2]["collections"]
        kept: list[list[object]] = [[] for _ in range(400_000)]
        assert gc.get_stats()[2]["collections"] == made, f"with {len(kept)} more objects"
        nursery.cancel_scope.cancel()
    assert gc.get_threshold() == before


# ------------------------------------------------ cycles: the end of a session leaves none


async def an_operator_leaves_and_has_not_read_all(served: Served) -> None:
    operator = await served.operator()
    await operator.ask("subscribe", events=["partition_created"])
    await served.guest()
    await wait_all_tasks_blocked()


async def a_vmm_leaves(served: Served) -> None:
    guest = await served.guest()
    await served.vp(guest)
    await served.notifier(guest)
    guest.vmm.close()


async def a_vmm_sends_rubbish(served: Served) -> None:
    guest = await served.guest()
    await guest.vmm.send(RUBBISH)
    await guest.vmm.last_words()


async def a_vp_sends_rubbish(served: Served) -> None:
    vp = await served.vp(await served.guest())
    await vp.send(RUBBISH)
    await vp.last_words()


async def rubbish_comes_for_a_hello(served: Served) -> None:
    peer = await served.connect()
    await peer.send(RUBBISH)
    await peer.last_words()


async def a_request_is_refused(served: Served) -> None:
    guest = await served.guest()
    with pytest.raises(WireError):
        await guest.vmm.ask("kick", vp_index=7)


RUBBISH = b"\xc1" * 300


@pytest.mark.parametrize(
    "act",
    [
        an_operator_leaves_and_has_not_read_all,
        a_vmm_leaves,
        a_vmm_sends_rubbish,
        a_vp_sends_rubbish,
        rubbish_comes_for_a_hello,
        a_request_is_refused,
    ],
)
async def test_an_end_leaves_no_garbage_for_a_full_pass(act: Callable[[Served], Awaitable[None]]) -> None:
    async with serving() as served:
        gc.collect()
        gc.disable()
        try:
            await act(served)
            for peer in served.peers:
                peer.close()
            await wait_all_tasks_blocked()
            assert not served.daemon.dispatcher.admission.connections
            assert not daemons_frames_in_cycles()
        finally:
            gc.enable()


def daemons_frames_in_cycles() -> set[str]:
    """The functions of the daemon whose frames only the collector can free."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    code = [found.f_code for found in gc.garbage if isinstance(found, FrameType)]
    gc.garbage.clear()
    return {part.co_qualname for part in code if "interceptd" in part.co_filename}
