"""A munmap waits for nothing but its event being read: not for the region lock, not for a worker.

Each of these hangs, and fails at the patience's end, when the reader of the userfaultfd waits for more.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes import live_locks as locks
from fakes.barrier import Barrier
from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.held_daemon import launch
from fakes.live_vmm import GFN, LiveVmm, Memory
from fakes.puppet import ENVIRONMENT, Pending, Puppet, StartVmm
from fakes.witness import Witness
from intercept_client.memory import Watch
from intercept_protocol.messages import HypervisorKind
from intercept_protocol.outcomes import Answer, AnyAnswer

PAGES = 16
PARTS = [(0, 3), (4, 7), (8, 11), (12, 15)]


@pytest.fixture
def barrier(tmp_path: Path) -> Barrier:
    return Barrier(tmp_path)


@pytest.fixture
def held_daemon(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    barrier: Barrier,  # noqa: ARG001 - there before the daemon, and after it
) -> Iterator[DaemonProcess]:
    command = launch(request.param, tmp_path)
    with DaemonProcess(tmp_path, launch=command, environment=ENVIRONMENT) as process:
        yield process.wait_serving()


@pytest.fixture
def vmm(held_daemon: DaemonProcess, start_vmm: StartVmm) -> Puppet:
    puppet = start_vmm()
    puppet.do(LiveVmm.connect, held_daemon.socket)
    puppet.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    return puppet


held_in_resolve = pytest.mark.parametrize("held_daemon", ["in-resolve"], indirect=True)
held_in_the_hypervisor = pytest.mark.parametrize("held_daemon", ["in-the-hypervisor"], indirect=True)


def held_fault(vmm: Puppet, barrier: Barrier, gfn: int) -> Pending[AnyAnswer]:
    """A fault whose worker has its answer and has not told anybody."""
    faulting = vmm.start(LiveVmm.fault, gfn)
    barrier.wait_arrived()
    return faulting


def mapped(vmm: Puppet, barrier: Barrier, start_gfn: int) -> Memory:
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    vmm.do(LiveVmm.add_region, start_gfn, memory.uaddrs)
    faulting = held_fault(vmm, barrier, start_gfn)
    barrier.let_go()
    assert faulting.result() is Answer.MAPPED
    return memory


@held_in_resolve
def test_a_munmap_ends_while_a_worker_sits_in_resolve(vmm: Puppet, barrier: Barrier) -> None:
    first = mapped(vmm, barrier, GFN)
    second = mapped(vmm, barrier, 2 * GFN)
    vmm.do(LiveVmm.munmap, second.part(3, 4))
    vmm.do(LiveVmm.drain)
    faulting = held_fault(vmm, barrier, 2 * GFN + 3)
    vmm.do(LiveVmm.munmap, first.uaddrs)
    eventually(lambda: len(vmm.do(LiveVmm.reached, GFN, PAGES)), 0)
    barrier.let_go()
    assert faulting.result() is Answer.UNBACKED


@held_in_resolve
def test_memory_unmapped_before_the_worker_answers_is_not_mapped(vmm: Puppet, barrier: Barrier) -> None:
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    faulting = held_fault(vmm, barrier, GFN)
    vmm.do(LiveVmm.munmap, memory.uaddrs)
    barrier.let_go(2)
    assert faulting.result() is Answer.UNBACKED
    assert vmm.do(LiveVmm.counter, "stale_attempts") == 1
    assert vmm.do(LiveVmm.counter, "map_calls") == 1  # the region's NO_ACCESS


@held_in_resolve
def test_a_guest_that_waits_for_a_worker_is_given_an_answer_when_it_takes_too_long(
    start_vmm: StartVmm, barrier: Barrier, held_daemon: DaemonProcess
) -> None:
    vmm = start_vmm()
    vmm.do(LiveVmm.connect, held_daemon.socket, invalidate_timeout_ms=300)
    vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    faulting = held_fault(vmm, barrier, GFN)
    with Witness(held_daemon.socket) as witness:
        assert witness.serve() == Witness.SERVED
    assert faulting.result() is Answer.CONTENDED
    barrier.let_go()


@held_in_the_hypervisor
def test_a_munmap_ends_while_the_region_lock_is_held(vmm: Puppet, barrier: Barrier) -> None:
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    assert vmm.do(LiveVmm.fault, GFN) is Answer.MAPPED
    vmm.do(LiveVmm.munmap, memory.part(0, 4))
    barrier.wait_arrived()
    vmm.do(LiveVmm.munmap, memory.part(4, 8))
    vmm.do(LiveVmm.munmap, memory.part(8, PAGES))
    barrier.let_go(3)
    vmm.do(LiveVmm.drain)
    assert vmm.do(LiveVmm.reached, GFN, PAGES) == []


@held_in_the_hypervisor
def test_between_a_watched_munmap_and_its_serving_the_guest_reaches_the_old_frames(
    vmm: Puppet, barrier: Barrier
) -> None:
    """What an announced munmap does not let happen."""
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    assert vmm.do(LiveVmm.fault, GFN) is Answer.MAPPED
    vmm.do(LiveVmm.munmap, memory.part(0, 4))
    barrier.wait_arrived()
    assert vmm.do(LiveVmm.reached, GFN, PAGES) == list(range(PAGES))
    barrier.let_go()
    vmm.do(LiveVmm.drain)
    assert vmm.do(LiveVmm.reached, GFN, PAGES) == list(range(4, PAGES))


@held_in_the_hypervisor
def test_unmapping_ranges_under_a_lock_of_the_hypervisor_does_not_deadlock(
    vmm: Puppet, tmp_path: Path
) -> None:
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    assert vmm.do(LiveVmm.fault, GFN) is Answer.MAPPED
    vmm.start(locks.answer_the_hypervisor_under_the_lock, tmp_path)
    parts = [memory.part(*part) for part in PARTS]
    assert vmm.start(locks.unmap_all_under_the_lock, parts).result() == len(PARTS)
    vmm.do(LiveVmm.drain)
    assert vmm.do(LiveVmm.reached, GFN, PAGES) == [3, 7, 11, 15]


def test_unmapping_ranges_under_a_lock_of_the_hypervisor_connection_does_not_deadlock(
    daemon: DaemonProcess, start_vmm: StartVmm, tmp_path: Path
) -> None:
    vmm = start_vmm()
    vmm.do(LiveVmm.connect, daemon.socket, hypervisor=HypervisorKind.VMM)
    vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    vmm.start(locks.serve_the_hypervisor_under_the_lock, tmp_path / "served")
    eventually((tmp_path / "served").exists, True)
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    assert vmm.do(LiveVmm.fault, GFN) is Answer.MAPPED
    assert len(vmm.do(locks.reached_through_the_link)) == PAGES
    parts = [memory.part(*part) for part in PARTS]
    assert vmm.start(locks.unmap_all_under_the_lock, parts).result() == len(PARTS)
    vmm.do(LiveVmm.drain)
    assert vmm.do(locks.reached_through_the_link) == [GFN + page for page in (3, 7, 11, 15)]


# ------------------------------------------------ a rude VMM


def test_a_vmm_that_clears_o_nonblock_affects_no_other_and_its_munmaps_return(
    daemon: DaemonProcess, unattached: Puppet
) -> None:
    unattached.do(LiveVmm.attach_and_keep_userfaultfd)
    memory = unattached.do(LiveVmm.map_memfd, PAGES)
    unattached.do(LiveVmm.add_region, GFN, memory.uaddrs)
    assert unattached.do(LiveVmm.fault, GFN) is Answer.MAPPED
    with Witness(daemon.socket) as witness:
        for page in range(8):
            unattached.do(LiveVmm.clear_nonblocking)
            assert witness.serve() == Witness.SERVED
            unattached.do(LiveVmm.munmap, memory.part(page, page + 1))
        unattached.do(LiveVmm.drain)
        assert unattached.do(LiveVmm.reached, GFN, PAGES) == list(range(8, PAGES))


def test_a_vmm_that_clears_o_nonblock_without_end_does_not_spin_the_daemon(
    daemon: DaemonProcess, unattached: Puppet
) -> None:
    unattached.do(LiveVmm.attach_and_keep_userfaultfd)
    clearing = unattached.start(locks.clear_nonblocking_for_a_while)
    with Witness(daemon.socket) as witness:
        assert witness.serve() == Witness.SERVED
    assert clearing.result() > 0
