"""The costs of live memory: watching, for faults of the VMM; a large VMM that forks, for other VMMs.

The costs are printed, not judged: what is judged is that everybody was served.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from fakes import live_costs as costs
from fakes.daemon_process import DaemonProcess
from fakes.live_vmm import LiveVmm
from fakes.puppet import Puppet
from intercept_client.memory import Watch

pytestmark = [pytest.mark.verify, pytest.mark.alone]

SWEPT_PAGES = 1 << 14
UNMAPPED_PAGES = 1 << 12
SAMPLES = 3000
PATIENCE = 120.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path) as process:
        yield process.wait_serving()


@pytest.mark.parametrize("of_a_file", [True, False], ids=["a cached memfd", "anonymous memory"])
def test_the_cost_of_watching_to_the_vmms_own_faults(daemon: DaemonProcess, of_a_file: bool) -> None:
    with Puppet() as vmm:
        attach(daemon, vmm)
        bare, watched = (
            median(vmm.do(costs.sweeps, SWEPT_PAGES, watched=watched, of_a_file=of_a_file))
            for watched in (False, True)
        )
    ns = 1e9 / SWEPT_PAGES
    print(f"\nfirst touch of a page: {bare * ns:.0f} ns bare, {watched * ns:.0f} ns watched")
    assert min(bare, watched) > 0


def test_the_cost_of_a_munmap_and_that_each_watched_one_is_reported(daemon: DaemonProcess) -> None:
    with Puppet() as vmm:
        attach(daemon, vmm)
        bare, watched = (
            median(vmm.do(costs.munmaps, UNMAPPED_PAGES, watched=watched)) * 1e6 for watched in (False, True)
        )
        vmm.do(LiveVmm.drain)
        reported = vmm.do(LiveVmm.counter, "invalidations")
    print(f"\nmunmap of a page: {bare:.1f} us bare, {watched:.1f} us watched")
    assert reported >= UNMAPPED_PAGES


def test_another_partition_is_served_beside_a_vmm_of_4_gib_that_forks(daemon: DaemonProcess) -> None:
    """Its p99 is compared with that beside a VMM that forks and is not asked: the machine is as busy then."""
    with Puppet() as huge, Puppet() as neighbour:
        attach(daemon, neighbour)
        attach(daemon, huge)
        huge.start(costs.become_huge).result(PATIENCE)
        quiet = neighbour.start(costs.latencies_us, SAMPLES).result(PATIENCE)
        forking = huge.start(costs.fork_in_a_loop)
        unasked = neighbour.start(costs.latencies_us, SAMPLES).result(PATIENCE)
        faulting = huge.start(costs.fault_anew_in_a_loop)
        asked = neighbour.start(costs.latencies_us, SAMPLES).result(PATIENCE)
        huge.do(costs.stop_forking)
        forks, faults = forking.result(PATIENCE), faulting.result(PATIENCE)
    print(
        f"\nmedian and p99 in us: quiet {quiet}, beside forks {unasked}, beside forks that are asked {asked}"
    )
    print(f"p99 {asked[1] / unasked[1]:.2f}x of beside forks, {asked[1] / quiet[1]:.2f}x of quiet")
    print(f"{forks} forks, {faults} faults of the one that forks")
    assert min(forks, faults) > 0


def attach(daemon: DaemonProcess, vmm: Puppet) -> None:
    vmm.do(LiveVmm.connect, daemon.socket)
    vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
