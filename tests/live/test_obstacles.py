"""A temporary obstacle to watching guest RAM is undecided: the VP retries, and then continues."""

from __future__ import annotations

import pytest

from fakes import live_obstacles as obstacles
from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.live_vmm import GFN, LiveVmm, Memory
from fakes.puppet import Puppet, VmmFailed
from fakes.raw_client import WRITE
from intercept_client.memory import Watch
from intercept_protocol.outcomes import Answer

PAGES = 16
QUICK = 200_000
"""Mappings that are split off in a tenth of a second."""


@pytest.fixture
def memory(watched: Puppet) -> Memory:
    """RAM that the userfaultfd of a first partition holds, while a second one is there."""
    memory = watched.do(LiveVmm.map_memfd, PAGES)
    watched.do(LiveVmm.add_region, GFN, memory.uaddrs)
    assert watched.do(LiveVmm.fault, GFN, WRITE) is Answer.MAPPED
    watched.do(obstacles.open_another_partition)
    watched.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    return memory


def test_ram_that_an_older_partition_still_watches_is_retry_until_that_one_is_closed(
    watched: Puppet, memory: Memory
) -> None:
    """A VMM that opens another partition at once loses no write."""
    watched.do(LiveVmm.add_region, GFN, memory.uaddrs)
    assert watched.do(LiveVmm.fault, GFN, WRITE, vp_index=1) is Answer.CONTENDED
    watched.do(obstacles.close_the_first_partition)
    eventually(lambda: watched.do(LiveVmm.fault, GFN, WRITE, vp_index=1), Answer.MAPPED)


def test_a_pinned_region_over_ram_that_an_older_partition_still_watches_is_eagain_and_leaves_nothing(
    watched: Puppet, memory: Memory
) -> None:
    with pytest.raises(VmmFailed, match="another userfaultfd still holds the VMA") as refused:
        watched.do(LiveVmm.add_region, GFN, memory.uaddrs, "pinned")
    assert (refused.value.number, watched.do(LiveVmm.counter, "regions")) == (11, 0)


def test_the_log_says_once_why_the_guest_does_not_continue(
    unattached_to_own: Puppet, own_daemon: DaemonProcess
) -> None:
    vmm = unattached_to_own
    vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    vmm.do(LiveVmm.fault, GFN)
    vmm.do(obstacles.open_another_partition)
    vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    answers = [vmm.do(LiveVmm.fault, GFN, vp_index=1) for _ in range(5)]
    own_daemon.wait_event("faults_undecided")
    told = [line for line in own_daemon.log_lines() if line["event"] == "faults_undecided"]
    assert answers == [Answer.CONTENDED] * 5
    assert [(line["partition_id"], line["vp_index"], "EBUSY" in line["error"]) for line in told] == [
        (2, 1, True)
    ]


@pytest.mark.skipif(
    obstacles.MAX_MAP_COUNT > QUICK, reason=f"vm.max_map_count is over {QUICK}: using it up takes too long"
)
def test_ram_at_vm_max_map_count_is_retry_until_a_mapping_is_free(watched: Puppet) -> None:
    """To watch a part of a VMA splits it, which takes two more."""
    memory = watched.do(LiveVmm.map_memfd, PAGES)
    watched.do(LiveVmm.add_region, GFN, memory.part(4, 8))
    used_up = watched.do(obstacles.use_up_the_mappings)
    assert watched.do(LiveVmm.fault, GFN, WRITE) is Answer.CONTENDED
    watched.do(LiveVmm.munmap, used_up)
    assert watched.do(LiveVmm.fault, GFN, WRITE) is Answer.MAPPED
