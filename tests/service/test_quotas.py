"""The ledger of a uid: what is refused, lost or ended gives back what it had, and no more."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
import trio

from fakes.model_partition import ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, with_region
from fakes.raw_peer import RawPeer
from fakes.served import Guest, Served, serving
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from interceptd.config.schema import Limits
from interceptd.errors import PartitionLost
from interceptd.quota import Quota

ROUNDS = 10_000


def held(served: Served) -> dict[str, int]:
    """What this process's uid has of each thing that is limited."""
    tenant = served.daemon.dispatcher.admission.tenants.of(os.getuid())
    return {
        "connections": tenant.connections.count,
        "vmms": tenant.vmms.count,
        "partitions": tenant.partitions.count,
        "vps": tenant.vps.count,
        "regions": tenant.regions.count,
        "mappings": tenant.mappings.count,
        "vmas": tenant.vmas.count,
    }


async def until(true: Callable[[], bool]) -> None:
    """Let the daemon run until it has noticed; time stands still, so rounds are counted."""
    for _ in range(ROUNDS):
        if true():
            return
        await trio.lowlevel.checkpoint()
    raise AssertionError("the daemon has not noticed")


async def refusal(peer: RawPeer, method: str, **fields: object) -> WireError:
    with pytest.raises(WireError) as refused:
        await peer.ask(method, **fields)
    return refused.value


# ------------------------------------------------ one quota


def test_a_quota_refuses_one_too_many_by_its_limits_name_and_takes_one_again_after_a_release() -> None:
    quota = Quota(7, "VPs", "vps_per_uid", lambda: 1)
    quota.acquire()
    with pytest.raises(WireError, match="uid 7 may have 1 VPs") as refused:
        quota.acquire()
    assert (refused.value.number, refused.value.details) == (errno.ENOSPC, {"limit": "vps_per_uid"})
    quota.release()
    quota.acquire()
    assert quota.count == 1


def test_a_quota_counts_what_was_acquired_unless_the_block_fails() -> None:
    quota = Quota(7, "VPs", "vps_per_uid", lambda: 2)
    with quota.acquired():
        pass
    with pytest.raises(ZeroDivisionError), quota.acquired():
        raise ZeroDivisionError
    assert quota.count == 1


def test_a_quota_that_gets_back_more_than_it_gave_is_a_mistake() -> None:
    quota = Quota(7, "VPs", "vps_per_uid", lambda: 2)
    quota.acquire()
    with pytest.raises(AssertionError, match="uid 7 has 1 VPs, and releases 2"):
        quota.release(2)


def test_a_quota_has_room_up_to_its_limit() -> None:
    quota = Quota(7, "VPs", "vps_per_uid", lambda: 3)
    quota.add(1)
    assert [quota.has_room(more) for more in (1, 2, 3)] == [True, True, False]


# ------------------------------------------------ the regions of a partition


async def test_a_region_that_overlaps_or_that_the_hypervisor_refuses_is_not_counted(
    model: ModelPartition,
) -> None:
    await with_region(model)
    with pytest.raises(WireError, match="overlaps"):
        await model.add_region(GFN, 1, PAGE)
    model.hypervisor.refuse_map()
    with pytest.raises(WireError):
        await model.add_region(GFN + PAGES, 1, PAGE, RegionKind.MOVABLE)
    assert model.tenant.regions.count == model.regions.region_count == 1


async def test_a_pinned_region_that_cannot_be_populated_is_not_counted(model: ModelPartition) -> None:
    with pytest.raises(WireError, match="cannot be populated"):
        await model.add_region(GFN, PAGES, PAGE, RegionKind.PINNED)
    assert model.tenant.regions.count == 0


async def test_a_removed_region_is_not_counted(model: ModelPartition) -> None:
    await with_region(model)
    await model.remove_region(GFN, PAGES, PAGE)
    assert model.tenant.regions.count == 0


async def test_a_lost_partition_gives_back_the_regions_that_it_could_not_remove() -> None:
    model = ModelPartition()

    async def vmm() -> None:
        await with_region(model)
        await model.add_region(GFN + PAGES, PAGES, PAGE)
        await model.fault(GFN)
        model.hypervisor.refuse_unmaps()
        with pytest.raises(PartitionLost):
            await model.remove_region(GFN, PAGES, PAGE)
        assert model.tenant.regions.count == 1
        raise PartitionLost("here")

    with pytest.raises(WireError, match="the partition is lost"):
        await model.partition.run(vmm)
    assert (model.tenant.regions.count, model.regions.region_count) == (0, 0)
    assert (model.tenant.mappings.count, model.tenant.vmas.count) == (0, 0)


async def test_mappings_are_counted_as_pieces(model: ModelPartition) -> None:
    """Mapped, cut by an invalidation, joined by a fault, and removed."""
    await with_region(model)
    counts = []
    for change in (
        model.fault(GFN), model.invalidate(PAGE + 4, 1), model.fault(GFN + 4), model.invalidate(PAGE, 4),
        model.remove_region(GFN, PAGES, PAGE),
    ):  # fmt: skip
        await change
        counts.append(model.tenant.mappings.count)
    assert counts == [1, 2, 1, 1, 0]


# ------------------------------------------------ a daemon


async def everything(served: Served) -> tuple[Guest, RawPeer]:
    guest = await served.guest()
    vp = await served.vp(guest)
    await served.mmio(guest)
    return guest, vp


NOTHING = {
    "connections": 0, "vmms": 0, "partitions": 0, "vps": 0, "regions": 0, "mappings": 0, "vmas": 0,
}  # fmt: skip


async def test_a_uid_has_nothing_any_more_once_its_vmm_has_left() -> None:
    async with serving() as served:
        guest, vp = await everything(served)
        assert held(served) == {
            "connections": 2, "vmms": 1, "partitions": 1, "vps": 1, "regions": 1, "mappings": 0, "vmas": 1,
        }  # fmt: skip
        guest.vmm.close()
        assert await vp.receive() is None
        await until(lambda: held(served) == NOTHING)


async def test_a_vp_that_left_is_not_counted() -> None:
    async with serving(Limits(vps_per_uid=1)) as served:
        guest, vp = await everything(served)
        vp.close()
        await until(lambda: held(served)["vps"] == 0)
        await served.vp(guest)
        assert held(served)["vps"] == 1


async def test_a_vp_that_is_refused_is_not_counted() -> None:
    """Neither for its index, nor for the index of another, nor for the limit of its uid."""
    async with serving(Limits(vps_per_uid=2)) as served:
        guest, _ = await everything(served)
        joining = {
            "protocol": 1,
            "role": "vp",
            "partition_id": guest.partition_id,
            "token": guest.token,
        }
        names = [
            (await refusal(await served.connect(), "hello", **joining, vp_index=index)).name
            for index in (0, 1 << 16)
        ]
        await served.vp(guest, 1)
        beyond = await refusal(await served.connect(), "hello", **joining, vp_index=2)
        assert [*names, beyond.name, beyond.details] == [
            "EEXIST",
            "EINVAL",
            "ENOSPC",
            {"limit": "vps_per_uid"},
        ]
        assert held(served)["vps"] == 2


async def test_a_partition_that_could_not_be_created_is_not_counted() -> None:
    async with serving(Limits(partitions_per_uid=1, deposit_pages_per_partition=300)) as served:
        vmm = await served.hello("vmm")
        wanted = {"address_space": "declared", "hypervisor": "software"}
        refused = await refusal(vmm, "create_partition", **wanted, deposit_pages=301)
        assert refused.details == {"limit": "deposit_pages_per_partition"}
        assert held(served)["partitions"] == 0
        await vmm.ask("create_partition", **wanted)
        assert held(served)["partitions"] == 1


async def test_a_vmm_and_a_connection_beyond_the_limit_are_refused_and_not_counted() -> None:
    async with serving(Limits(vmms_per_uid=1, connections_per_uid=2)) as served:
        vmm = await served.hello("vmm")
        second = await refusal(await served.connect(), "hello", protocol=1, role="vmm")
        await until(lambda: held(served)["connections"] == 1)
        idle = await served.connect()
        await until(lambda: held(served)["connections"] == 2)
        third = await (await served.connect()).last_words()
        assert (second.details, third.details) == (
            {"limit": "vmms_per_uid"},
            {"limit": "connections_per_uid"},
        )
        assert (held(served)["vmms"], held(served)["connections"]) == (1, 2)
        for peer in (vmm, idle):
            peer.close()
        await until(lambda: held(served) == NOTHING)
