"""While a VMM delays a map, VPs that need no map are served; their latency is printed, not judged."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE
from intercept_client import BlockingVp
from intercept_client.kvm import KvmUnavailable, Machine, PartitionSetting
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.hv_message import build_memory_intercept
from intercept_protocol.outcomes import Access, Answer
from interceptctl.guest.small_vmm import Bar, SmallVmm

pytestmark = [pytest.mark.verify, pytest.mark.alone]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    try:
        Machine.open().close()  # the small VMM maps by memslots
    except KvmUnavailable as reason:
        pytest.skip(str(reason))
    with DaemonProcess(tmp_path, config="timeouts.hypervisor_ms = 600000") as process:
        yield process.wait_serving()


def test_while_a_map_stalls_others_are_served(daemon: DaemonProcess) -> None:
    setting, go_on = PartitionSetting(), threading.Event()
    with SmallVmm(daemon.socket, setting) as slow, SmallVmm(daemon.socket, setting) as other:
        mapped, stalled, elsewhere = slow.add_bar(1), slow.add_bar(1, at=0x800), other.add_bar(1)
        with attached(slow, 7) as own, attached(other, 7) as foreign, attached(slow, 8) as victim:
            touch(own, mapped)
            touch(foreign, elsewhere)
            before = p99(own, mapped), p99(foreign, elsewhere)

            stall_maps(slow, go_on)
            waiting = threading.Thread(target=touch, args=(victim, stalled))
            waiting.start()
            during = p99(own, mapped), p99(foreign, elsewhere)
            assert waiting.is_alive()  # both were measured while the map was out
            go_on.set()
            waiting.join()

    names = "the partition's mapped pages", "another partition"
    for name, calm, stalling in zip(names, before, during, strict=True):
        print(f"\n{name}: p99 {calm * 1e6:.0f} us before, {stalling * 1e6:.0f} us while a map stalls")


def attached(vmm: SmallVmm, vp_index: int) -> BlockingVp:
    return BlockingVp.open(vmm.path, vmm.partition.credentials, vp_index=vp_index, timeout=PATIENCE)


def touch(vp: BlockingVp, bar: Bar) -> None:
    assert vp.intercept(build_memory_intercept(gpa=bar.gpa, access=Access.READ)) is Answer.MAPPED


def p99(vp: BlockingVp, bar: Bar, count: int = 1500) -> float:
    """Seconds; the two kinds of access take turns, so that the progress guard has nothing to say."""
    faults = [build_memory_intercept(gpa=bar.gpa, access=access) for access in (Access.READ, Access.WRITE)]
    samples = []
    for index in range(count):
        asked = time.perf_counter()
        assert vp.intercept(faults[index % 2]) is Answer.ALREADY_MAPPED
        samples.append(time.perf_counter() - asked)
    return sorted(samples)[len(samples) * 99 // 100]


def stall_maps(vmm: SmallVmm, go_on: threading.Event) -> None:
    carry_out = vmm.partition.memory.map

    def late(gfns: GfnRange, uaddrs: UaddrRange, access: Access, start_pfn: int | None = None) -> None:
        assert go_on.wait(PATIENCE)
        carry_out(gfns, uaddrs, access, start_pfn)

    vmm.partition.memory.map = late  # type: ignore[method-assign]  # the stall is the test's
