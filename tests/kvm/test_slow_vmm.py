"""A VMM that is slow with one map: no other peer waits; beyond the deadline it fails, and what is late is
undone."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE
from fakes.small_vmms import StartVmm, run
from intercept_client import BlockingVp
from intercept_client.kvm import PartitionSetting, Stop, StopReason
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.hv_message import build_memory_intercept
from intercept_protocol.outcomes import Access, Answer
from interceptctl.guest.programs import STORE, SWEEP, WATCH
from interceptctl.guest.small_vmm import Bar, SmallVmm

SLOW_GFN = 0x800
DEADLINE = "[timeouts]\nhypervisor_ms = 1000\n"


def before_mapping(vmm: SmallVmm, bar: Bar, wait: Callable[[], None]) -> threading.Event:
    """Have `wait` run before the first map of `bar` is carried out; the event tells that it was asked for."""
    asked, carry_out = threading.Event(), vmm.partition.memory.map

    def slowly(gfns: GfnRange, uaddrs: UaddrRange, access: Access, start_pfn: int | None = None) -> None:
        if gfns.overlaps(bar.gfns) and not asked.is_set():
            asked.set()
            wait()
        carry_out(gfns, uaddrs, access, start_pfn)

    vmm.partition.memory.map = slowly  # type: ignore[method-assign]
    return asked


@pytest.fixture
def impatient(kvm: None, tmp_path: Path) -> Iterator[DaemonProcess]:  # noqa: ARG001 - for its skip
    """A daemon that waits for no map for long."""
    with DaemonProcess(tmp_path, config=DEADLINE) as process:
        yield process.wait_serving()


@contextmanager
def touching(vmm: SmallVmm, bar: Bar) -> Iterator[Future[Stop]]:
    """A guest that writes to `bar`, in a thread."""
    guest = vmm.add_vcpu(STORE, esi=bar.gpa, ebx=7)
    with ThreadPoolExecutor(1) as threads:
        yield threads.submit(guest.run)


def test_while_one_map_stalls_mapped_pages_and_other_partitions_are_served(start_vmm: StartVmm) -> None:
    slow, other = start_vmm(), start_vmm()
    mapped, stalled = slow.add_bar(1), slow.add_bar(1, at=SLOW_GFN)
    slow.add_vcpu(WATCH, esi=mapped.gpa)
    slow.start()
    slow.reports.wait()
    go_on = threading.Event()
    asked = before_mapping(slow, stalled, lambda: _require(go_on.wait(PATIENCE)))
    fault = build_memory_intercept(gpa=mapped.gpa, access=Access.READ)
    with touching(slow, stalled) as touched:
        assert asked.wait(PATIENCE)

        with BlockingVp.open(slow.path, slow.partition.credentials, vp_index=9, timeout=PATIENCE) as vp:
            assert vp.intercept(fault) is Answer.ALREADY_MAPPED
        slow.reports.wait(10)
        bar = other.add_bar(16)
        assert run(other.add_vcpu(SWEEP, esi=bar.gpa, ecx=16, ebx=1)).reason is StopReason.HALTED
        assert not touched.done()

        go_on.set()
        assert touched.result(PATIENCE).reason is StopReason.HALTED
    assert stalled.word(0) == 7


def test_a_late_map_stops_the_vcpu_and_is_undone(impatient: DaemonProcess) -> None:
    with SmallVmm(impatient.socket, PartitionSetting()) as vmm:
        bar = vmm.add_bar(1)
        before_mapping(vmm, bar, lambda: _until_asked_again(vmm))
        with touching(vmm, bar) as touched:
            stop = touched.result(PATIENCE)

        assert (stop.reason, stop.answer) == (StopReason.FAILED, Answer.HYPERVISOR_ERROR)
        assert not vmm.partition.memory.reaches(bar.gfns.start, Access.READ)
        assert vmm.partition.lost_because is None


def test_a_map_never_carried_out_loses_the_partition_and_the_vmm_learns_why(
    impatient: DaemonProcess,
) -> None:
    go_on, told = threading.Event(), threading.Event()
    with SmallVmm(impatient.socket, PartitionSetting(), lambda _: told.set()) as vmm:
        bar = vmm.add_bar(1)
        before_mapping(vmm, bar, lambda: _require(go_on.wait(PATIENCE)))
        with touching(vmm, bar) as touched:
            assert touched.result(PATIENCE).reason in {StopReason.DAEMON_LOST, StopReason.FAILED}
            impatient.wait_event("partition_lost")
            go_on.set()

        assert told.wait(PATIENCE)
        assert not vmm.partition.memory.reaches(bar.gfns.start, Access.READ)


def test_closing_the_hypervisor_connection_in_the_middle_stops_the_guest(impatient: DaemonProcess) -> None:
    with SmallVmm(impatient.socket, PartitionSetting()) as vmm:
        bar = vmm.add_bar(1)
        before_mapping(vmm, bar, vmm.partition.hang_up)
        with touching(vmm, bar) as touched:
            assert touched.result(PATIENCE).reason in {StopReason.DAEMON_LOST, StopReason.FAILED}
        impatient.wait_event("partition_lost")

        assert vmm.partition.lost_because


def test_a_map_that_the_vmm_refuses_stops_the_vcpu_with_the_reason(start_vmm: StartVmm) -> None:
    vmm = start_vmm()
    bar = vmm.add_bar(1)

    def refuse() -> None:
        vmm.partition.memory.freeze("no map today")

    before_mapping(vmm, bar, refuse)
    guest = vmm.add_vcpu(STORE, esi=bar.gpa, ebx=7)

    stop = run(guest)

    assert (stop.reason, stop.answer) == (StopReason.FAILED, Answer.HYPERVISOR_ERROR)
    assert vmm.partition.lost_because is None


def _until_asked_again(vmm: SmallVmm) -> None:
    """Until the deadline has passed, which shows in the next request on the connection."""
    readable, _, _ = select.select([vmm.partition.hypervisor_descriptor], [], [], PATIENCE)
    _require(bool(readable))


def _require(happened: bool) -> None:
    assert happened
