"""A storm of events: the daemon reads them all, and its memory does not grow."""

from __future__ import annotations

import pytest

from fakes import live_storms as storms
from fakes.daemon_process import DaemonProcess
from fakes.live_vmm import GFN, LiveVmm
from fakes.puppet import Puppet
from fakes.witness import Witness
from intercept_protocol.outcomes import Answer

THREADS = 4
PATIENCE = 300.0
"""Seconds for a storm: 100,000 calls that each wait for a reader, on a machine that does other things."""
GROWTH_KIB = 2 * 1024


@pytest.mark.parametrize("calls", [20_000, pytest.param(100_000, marks=pytest.mark.verify)])
def test_a_storm_of_madvise_and_munmap_calls_costs_no_memory(
    own_daemon: DaemonProcess, unattached_to_own: Puppet, calls: int
) -> None:
    vmm = unattached_to_own
    vmm.do(storms.attach_and_map, GFN, calls // 2)
    with Witness(own_daemon.socket) as witness:
        assert witness.serve() == Witness.SERVED
        before = own_daemon.resident_kib()
        running = [vmm.start(storms.discard_and_unmap, thread, THREADS) for thread in range(THREADS)]
        assert sum(storm.result(PATIENCE) for storm in running) == calls
        vmm.do(LiveVmm.drain)
        grown = own_daemon.resident_kib() - before
        print(f"\n{calls} calls: {grown} KiB more")
        assert grown < GROWTH_KIB
        assert witness.serve() == Witness.SERVED
    assert vmm.do(LiveVmm.counter, "mapped_gfns") == 0
    assert vmm.do(LiveVmm.counter, "slat_extents") == 1
    assert vmm.do(LiveVmm.counter, "invalidations") > calls // 2


def test_events_for_ranges_that_no_region_covers_any_more_are_read_and_harm_nothing(watched: Puppet) -> None:
    memory = watched.do(LiveVmm.map_memfd, 16)
    kept = watched.do(LiveVmm.map_memfd, 16)
    watched.do(LiveVmm.add_region, GFN, memory.uaddrs)
    watched.do(LiveVmm.add_region, 2 * GFN, kept.uaddrs)
    assert watched.do(LiveVmm.fault, GFN) is Answer.MAPPED
    assert watched.do(LiveVmm.fault, 2 * GFN) is Answer.MAPPED
    watched.do(LiveVmm.remove_region, GFN, memory.uaddrs)
    before = watched.do(LiveVmm.counter, "invalidations")
    watched.do(LiveVmm.munmap, memory.uaddrs)
    watched.do(LiveVmm.drain)
    assert watched.do(LiveVmm.counter, "invalidations") == before + 2  # the event, and the drain
    assert watched.do(LiveVmm.reached, 2 * GFN, 16) == list(range(16))
