"""The daemon is killed while guests run: MMIO is unmapped, RAM stays, the VMM is notified, nothing hangs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE
from fakes.small_vmms import OURS, run
from intercept_client import NewRegion, libc, memory
from intercept_client.kvm import Coverage, OnDaemonLoss, PartitionSetting, StopReason
from intercept_protocol.addresses import PAGE_SHIFT, GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind, RequestedKind
from intercept_protocol.outcomes import Access
from interceptctl.guest.programs import COUNT, STORE, WATCH
from interceptctl.guest.small_vmm import Bar, SmallVmm

FOR_EVER = 0xFFFFFFFF
COUNTER_GPA = 0x8000
"""In RAM, behind the programs."""


class Told(threading.Event):
    """The VMM's ear; `why` is what it heard."""

    why = ""

    def tell(self, why: str) -> None:
        self.why = why
        self.set()


@contextmanager
def doomed(daemon: DaemonProcess, setting: PartitionSetting) -> Iterator[tuple[SmallVmm, Bar, Told]]:
    """A VMM at that daemon with a BAR."""
    told = Told()
    with SmallVmm(daemon.socket, setting, told.tell) as vmm:
        bar = vmm.add_bar(1)
        bar.write(0, OURS.to_bytes(4, "little"))
        yield vmm, bar, told


def new_region(gfns: GfnRange, memory: Bar, kind: RequestedKind = RequestedKind.MMIO) -> NewRegion:
    """The first page of that memory."""
    return NewRegion(
        gfns=gfns.slice(gfns.start, gfns.start + 1),
        uaddrs=memory.uaddrs.slice(memory.uaddrs.start, memory.uaddrs.start + 1),
        kind=kind,
        writable=True,
        executable=False,
    )


def kill(daemon: DaemonProcess, told: Told) -> None:
    daemon.signal(signal.SIGKILL)
    daemon.wait_ended()
    assert told.wait(PATIENCE), "the VMM is notified"


def reaches(vmm: SmallVmm, bar: Bar) -> bool:
    return vmm.partition.memory.reaches(bar.gfns.start, Access.READ)


@pytest.mark.parametrize("coverage", Coverage)
def test_mmio_is_unmapped_ram_kept_and_the_vmm_learns_why(
    own_daemon: DaemonProcess, coverage: Coverage
) -> None:
    with doomed(own_daemon, PartitionSetting(coverage=coverage)) as (vmm, bar, told):
        vmm.add_vcpu(WATCH, esi=bar.gpa)
        vmm.start()
        vmm.reports.wait_for(OURS)
        assert reaches(vmm, bar)

        kill(own_daemon, told)

        assert not reaches(vmm, bar)
        assert reaches(vmm, vmm.ram)
        assert told.why == vmm.partition.lost_because != ""


def test_regions_that_were_changed_in_one_step_go_or_stay_by_what_they_are_now(
    own_daemon: DaemonProcess,
) -> None:
    with doomed(own_daemon, PartitionSetting()) as (vmm, bar, told):
        removed = [(bar.gfns, bar.uaddrs)]
        moved = new_region(GfnRange.of(0x300, 1), bar, RequestedKind.MMIO)
        ram = new_region(bar.gfns, vmm.ram, RequestedKind.AUTO)
        with pytest.raises(WireError, match=r"add\[1\]"):
            vmm.partition.change_regions(remove=removed, add=[moved, new_region(vmm.ram.gfns, bar)])
        kinds = vmm.partition.change_regions(remove=removed, add=[moved, ram])
        assert kinds == [RegionKind.MMIO, RegionKind.MOVABLE]
        for gfns in (moved.gfns, ram.gfns):
            run(vmm.add_vcpu(STORE, esi=gfns.start << PAGE_SHIFT, ebx=OURS))
        assert vmm.partition.memory.reaches(moved.gfns.start, Access.READ)

        kill(own_daemon, told)

        assert not vmm.partition.memory.reaches(moved.gfns.start, Access.READ)
        assert reaches(vmm, bar), "there is RAM now"
        assert reaches(vmm, vmm.ram), "what was refused is forgotten"


def test_a_vmm_may_ask_that_ram_goes_too(own_daemon: DaemonProcess) -> None:
    setting = PartitionSetting(on_daemon_loss=OnDaemonLoss.KEEP_NOTHING)
    with doomed(own_daemon, setting) as (vmm, bar, told):
        vmm.add_vcpu(WATCH, esi=bar.gpa)
        (watching,) = vmm.start()
        vmm.reports.wait_for(OURS)

        kill(own_daemon, told)

        assert vmm.partition.memory.slots == []
        assert watching.result(PATIENCE).reason is StopReason.DAEMON_LOST


def test_a_vcpu_that_needs_the_daemon_stops_and_one_in_ram_runs_on(own_daemon: DaemonProcess) -> None:
    with doomed(own_daemon, PartitionSetting()) as (vmm, bar, told):
        vmm.add_vcpu(WATCH, esi=bar.gpa)
        vmm.add_vcpu(COUNT, esi=COUNTER_GPA, ecx=FOR_EVER)
        watching, counting = vmm.start()
        vmm.reports.wait_for(OURS)

        kill(own_daemon, told)

        stop = watching.result(PATIENCE)
        assert (stop.reason, stop.gpa) == (StopReason.DAEMON_LOST, bar.gpa)
        before = vmm.ram.word(COUNTER_GPA)
        while vmm.ram.word(COUNTER_GPA) == before:
            assert not counting.done()


def test_a_vcpu_waiting_in_an_intercept_is_released(own_daemon: DaemonProcess) -> None:
    with doomed(own_daemon, PartitionSetting()) as (vmm, bar, told):
        vmm.add_vcpu(WATCH, esi=bar.gpa)
        with ExitStack() as invalidating:
            invalidating.enter_context(vmm.partition.notifier.invalidation(bar.uaddrs))
            (watching,) = vmm.start()
            kill(own_daemon, told)

            assert watching.result(PATIENCE).reason is StopReason.DAEMON_LOST


@pytest.mark.parametrize("coverage", Coverage)
def test_munmap_of_kept_memory_unmaps_it_from_the_guest_first(
    own_daemon: DaemonProcess, coverage: Coverage
) -> None:
    with doomed(own_daemon, PartitionSetting(coverage=coverage)) as (vmm, bar, told):
        vmm.add_vcpu(WATCH, esi=bar.gpa)
        vmm.start()
        vmm.reports.wait_for(OURS)
        kill(own_daemon, told)

        in_thread(partial(memory.munmap, vmm.partition.notifier, vmm.ram.uaddrs))

        assert not reaches(vmm, vmm.ram)


def test_the_bare_munmap_of_a_watched_vmm_does_not_hang(own_daemon: DaemonProcess) -> None:
    """The userfaultfd died with the daemon, because the VMM kept no copy."""
    with doomed(own_daemon, PartitionSetting(coverage=Coverage.WATCHED)) as (vmm, bar, told):
        vmm.add_vcpu(WATCH, esi=bar.gpa)
        vmm.start()
        vmm.reports.wait_for(OURS)
        kill(own_daemon, told)

        in_thread(partial(libc.munmap, bar.uaddrs))


def test_a_death_in_the_middle_of_an_invalidation_lets_the_vmm_finish_it(own_daemon: DaemonProcess) -> None:
    with doomed(own_daemon, PartitionSetting()) as (vmm, bar, told):
        vmm.add_vcpu(WATCH, esi=bar.gpa)
        vmm.start()
        vmm.reports.wait_for(OURS)
        with vmm.partition.notifier.invalidation(bar.uaddrs):
            kill(own_daemon, told)
            libc.munmap(bar.uaddrs)

        assert not reaches(vmm, bar)


def test_a_drained_daemon_is_noticed_alike(own_daemon: DaemonProcess) -> None:
    with doomed(own_daemon, PartitionSetting()) as (vmm, bar, told):
        vmm.add_vcpu(WATCH, esi=bar.gpa)
        (watching,) = vmm.start()
        vmm.reports.wait_for(OURS)

        assert own_daemon.stop() == 0

        assert told.wait(PATIENCE)
        assert watching.result(PATIENCE).reason is StopReason.DAEMON_LOST
        assert not reaches(vmm, bar)


def test_a_vmm_that_closes_loses_nothing(own_daemon: DaemonProcess) -> None:
    with doomed(own_daemon, PartitionSetting()) as (vmm, _, told):
        vmm.add_vcpu(COUNT, esi=COUNTER_GPA, ecx=1)
        vmm.start()

    assert not told.is_set()
    assert "partition_lost" not in own_daemon.events()
    assert vmm.partition.memory.slots == [], "the daemon took everything away on the way out"


def in_thread(call: partial[None]) -> None:
    """Run it, and fail if it hangs; a thread in the kernel cannot be interrupted."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
