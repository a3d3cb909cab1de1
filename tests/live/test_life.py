"""A partition ends with its memory (exit, kill, exec), even if another process holds the socket."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from fakes import live_lives as lives
from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.live_vmm import GFN, LiveVmm
from fakes.puppet import Puppet
from intercept_client.memory import Watch
from intercept_protocol.outcomes import Answer

PAGES = 16


@pytest.fixture(params=["watched", "cooperative"])
def vmm(request: pytest.FixtureRequest) -> Puppet:
    """A VMM whose guest has touched its memory."""
    puppet: Puppet = request.getfixturevalue(request.param)
    memory = puppet.do(LiveVmm.map_memfd, PAGES)
    puppet.do(LiveVmm.add_region, GFN, memory.uaddrs)
    assert puppet.do(LiveVmm.fault, GFN) is Answer.MAPPED
    return puppet


def partitions_of(daemon: DaemonProcess, vmm: Puppet) -> int:
    partitions = daemon.operator().ask("list_partitions")["partitions"]
    return sum(partition["pid"] == vmm.pid for partition in partitions)


@pytest.mark.parametrize("end", [Puppet.leave, Puppet.kill])
def test_a_vmm_that_exits_or_is_killed_ends_its_partition(
    daemon: DaemonProcess, vmm: Puppet, end: Callable[[Puppet], None]
) -> None:
    end(vmm)
    eventually(lambda: partitions_of(daemon, vmm), 0)


def test_a_vmm_that_execs_ends_its_partition(daemon: DaemonProcess, vmm: Puppet) -> None:
    vmm.do(lives.exec_something_else)
    eventually(lambda: partitions_of(daemon, vmm), 0)


def test_an_exec_that_keeps_the_sockets_is_noticed_without_a_fault(
    daemon: DaemonProcess, vmm: Puppet
) -> None:
    """No kernel event tells of it: only the daemon's own asking once a second."""
    vmm.do(lives.exec_something_else_with_the_sockets)
    eventually(lambda: partitions_of(daemon, vmm), 0)
    assert vmm.is_running


@pytest.mark.parametrize("end", [Puppet.leave, Puppet.kill])
def test_a_forked_child_that_keeps_the_sockets_does_not_keep_a_dead_mms_partition(
    daemon: DaemonProcess, vmm: Puppet, end: Callable[[Puppet], None]
) -> None:
    child = vmm.do(LiveVmm.fork)
    try:
        assert partitions_of(daemon, vmm) == 1
        end(vmm)
        eventually(lambda: partitions_of(daemon, vmm), 0)
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_that_keeps_the_sockets_of_a_vmm_without_memory_does_not_keep_its_partition(
    daemon: DaemonProcess, unattached: Puppet
) -> None:
    """Only the pidfd shows it: there is no mm to query yet, and the connection stays open."""
    child = unattached.do(LiveVmm.fork)
    try:
        assert partitions_of(daemon, unattached) == 1
        unattached.kill()
        eventually(lambda: partitions_of(daemon, unattached), 0)
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_changes_by_a_forked_child_do_not_affect_the_parent(vmm: Puppet) -> None:
    before = vmm.do(LiveVmm.counter, "invalidations")
    vmm.do(lives.fork_a_child_that_unmaps_everything_of, GFN)
    vmm.do(LiveVmm.drain)
    assert vmm.do(LiveVmm.reached, GFN, PAGES) == list(range(PAGES))
    assert vmm.do(LiveVmm.counter, "invalidations") == before + 1  # the drain's own


def test_a_vmm_whose_thread_execs_in_the_middle_of_a_storm_of_faults_ends_its_partition(
    daemon: DaemonProcess, vmm: Puppet
) -> None:
    vmm.start(lives.fault_until_refused, GFN)
    vmm.do(lives.exec_something_else_with_the_sockets)
    eventually(lambda: partitions_of(daemon, vmm), 0)


# ------------------------------------------------ the daemon's death


def test_a_daemon_that_is_killed_hangs_no_munmap_and_no_thread(
    own_daemon: DaemonProcess, unattached_to_own: Puppet
) -> None:
    vmm = unattached_to_own
    vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=True)
    memory = vmm.do(LiveVmm.map_memfd, 1 << 14)
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    vmm.do(lives.fault_everywhere, GFN, memory.uaddrs.page_count)
    unmapping = vmm.start(lives.unmap_from_the_end, memory, 0)
    faulting = vmm.start(lives.fault_until_refused, GFN)
    announcing = vmm.start(lives.announce_until_refused)
    vmm.do(lives.wait_for_progress)
    own_daemon.signal(signal.SIGKILL)
    assert unmapping.result() == memory.uaddrs.page_count
    assert faulting.result() == "ConnectionLost"
    assert announcing.result() == "ConnectionLost"
    again = vmm.do(LiveVmm.map_memfd, 4)
    vmm.do(LiveVmm.munmap, again.uaddrs)


def test_killing_a_stopped_daemon_releases_the_waiting_munmap(
    own_daemon: DaemonProcess, unattached_to_own: Puppet
) -> None:
    """Stopped, it reads no event: the munmap waits, in the kernel."""
    vmm = unattached_to_own
    vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    memory = vmm.do(LiveVmm.map_memfd, 8)
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    vmm.do(LiveVmm.fault, GFN)
    own_daemon.signal(signal.SIGSTOP)
    waiting = vmm.start(LiveVmm.munmap, memory.uaddrs)
    eventually(lambda: "userfaultfd" in vmm.waits_in_the_kernel(), True)
    own_daemon.signal(signal.SIGKILL)
    assert waiting.result() is None


def test_a_vmm_whose_main_thread_has_exited_hands_over_its_memory_and_is_served(unattached: Puppet) -> None:
    """/proc/self is the main thread's, and shows nothing once that has exited."""
    unattached.do(lives.go_on_without_the_main_thread)
    unattached.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    memory = unattached.do(LiveVmm.map_memfd, PAGES)
    assert unattached.do(LiveVmm.add_region, GFN, memory.uaddrs, "auto") == "movable"
    assert unattached.do(LiveVmm.fault, GFN) is Answer.MAPPED
