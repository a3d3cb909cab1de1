"""The memory budget: what a uid may hold of it, what counts, and where its default comes from."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fakes.served import serving
from intercept_protocol.outcomes import Answer
from interceptd.config.system_memory import cgroup_limit
from interceptd.memory_budget import CacheShare, Cost, MemoryBudget, MemoryShare
from interceptd.quota import Quota

LIMIT, BASE = 1000, 200


@pytest.fixture
def budget() -> MemoryBudget:
    return MemoryBudget(lambda: LIMIT, BASE)


def test_a_uid_holds_at_most_three_times_what_it_leaves_free(budget: MemoryBudget) -> None:
    one, other = MemoryShare(1, budget), MemoryShare(2, budget)
    assert (one.has_room(600), one.has_room(601)) == (True, False)
    one.change(600)
    assert (other.has_room(150), other.has_room(151), budget.estimated) == (True, False, 800)
    one.change(-600)
    assert (other.has_room(600), budget.estimated) == (True, BASE)


def test_what_exists_counts_beyond_the_budget_and_may_go(budget: MemoryBudget) -> None:
    """After a restart, or when the limit was lowered."""
    share = MemoryShare(1, budget)
    quota = Quota(1, "regions", "regions_per_uid", lambda: 100, memory=share, cost=100)
    quota.add(9)
    assert (share.held, budget.free) == (900, -100)
    assert not quota.has_room(1)
    quota.release(4)
    assert (share.held, quota.has_room(1), quota.has_room(2)) == (500, True, False)


def test_a_cache_takes_an_eighth_of_what_it_leaves_free_and_gives_way_to_nothing_else(
    budget: MemoryBudget,
) -> None:
    share = MemoryShare(1, budget)
    one, other = CacheShare(share, cost=10), CacheShare(share, cost=10)
    assert (one.resize(9), one.resize(8), share.cached, budget.estimated) == (False, True, 80, 280)
    assert (other.resize(1), one.resize(7), other.resize(1)) == (False, True, True)
    assert (share.has_room(520), share.has_room(521)) == (True, False)
    share.change(520)
    assert (one.resize(8), one.resize(6), share.cached) == (False, True, 70)


def test_a_quota_names_the_limit_that_is_reached(budget: MemoryBudget) -> None:
    quota = Quota(
        1, "regions", "regions_per_uid", lambda: 3, memory=MemoryShare(1, budget), cost=250
    )  # fmt: skip
    with quota.acquired(), quota.reserved(1):
        assert (quota.refusal(1).number, quota.refusal(1).details) == (errno.ENOSPC, {"limit": "memory_mib"})
        assert quota.refusal(2).details == {"limit": "regions_per_uid"}
    assert budget.held == 250


async def test_what_operators_are_told_of_the_partitions_adds_up_to_what_the_uid_holds() -> None:
    """With each thing that has a cost, two partitions, and an operator."""
    async with serving() as served:
        _, full = await served.guest(), await served.guest()
        await served.mmio(full)
        vp, notifier = await served.vp(full), await served.notifier(full)
        assert await vp.intercept(0x100) is Answer.MAPPED
        await notifier.ask("invalidate_begin", start_uaddr=0, length=0x1000)
        vmm = await served.hello("vmm")
        created = await vmm.ask("create_partition", address_space="declared", hypervisor="vmm")
        assert isinstance(created, dict)
        await served.hello("hypervisor", partition_id=created["partition_id"], token=created["token"])
        operator = await served.operator()
        listed = await operator.ask("list_partitions")
        assert isinstance(listed, dict)
        told = [partition["memory_bytes"] for partition in listed["partitions"]]
        held = served.daemon.dispatcher.admission.tenants.of(os.getuid()).memory.held
        assert sum(told) == held - Cost.CONNECTION
        assert told[0] < told[1]


# ------------------------------------------------ the cgroup's limit


def system(root: Path, memberships: str, **files: str) -> int | None:
    """The limit, where the process is in these cgroups; `files` have `_` for each slash."""
    (root / "cgroup").write_text(memberships)
    for name, text in files.items():
        place = (
            root / "fs" / name.replace("_", "/").replace("MAX", "memory.max").replace("STAT", "memory.stat")
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return cgroup_limit(root / "cgroup", root / "fs")


def test_version_2_has_the_lowest_limit_on_the_way_up(tmp_path: Path) -> None:
    assert system(tmp_path, "0::/a/b\n", a_MAX="4096\n", a_b_MAX="max\n") == 4096


def test_in_a_namespace_the_root_has_the_limit(tmp_path: Path) -> None:
    assert system(tmp_path, "0::/\n", MAX="8192\n") == 8192


def test_version_1_states_the_lowest_limit_itself(tmp_path: Path) -> None:
    statistics = "cache 1\nhierarchical_memory_limit 12288\n"
    assert system(tmp_path, "4:memory:/a\n0::/\n", memory_a_STAT=statistics) == 12288


def test_a_container_that_sees_version_1_at_its_root_finds_the_limit_there(tmp_path: Path) -> None:
    statistics = "hierarchical_memory_limit 12288\n"
    assert system(tmp_path, "4:cpu,memory:/docker/1\n", memory_STAT=statistics) == 12288


@pytest.mark.parametrize("memberships", ["0::/a\n", "4:memory:/\n0::/\n", "", "0::/../b\n"])
def test_there_may_be_no_limit(tmp_path: Path, memberships: str) -> None:
    assert system(tmp_path, memberships, memory_STAT=f"hierarchical_memory_limit {2**63 - 4096}\n") is None
