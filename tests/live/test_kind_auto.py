"""Kind auto is what the VMA is now: what was there before it, and what looks like it, count for nothing.

A region of one page that is ordinary memory, a perf ring (device memory) or a vCPU's run page (ordinary, with
the same device and inode as the ring).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import pytest

from fakes import device_memory
from fakes.live_kinds import (
    Place,
    add_while_open_and_put,
    announce_and_put,
    put,
    ram,
    reserve,
    ring,
    run_page,
)
from fakes.live_vmm import GFN, LiveVmm
from fakes.puppet import Puppet
from intercept_client.memory import Watch
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Answer


def unavailable(make: Callable[[], int]) -> str:
    """Why it is; nothing if it is not."""
    try:
        os.close(make())
    except OSError as error:
        return f"{make.__name__}: {error}"
    return ""


no_ring, no_vcpu = unavailable(device_memory.perf_ring), unavailable(device_memory.vcpu)
needs_ring = pytest.mark.skipif(bool(no_ring), reason=no_ring or "there is one")
needs_vcpu = pytest.mark.skipif(bool(no_ring or no_vcpu), reason=no_ring or no_vcpu or "there is one")
RAM_TO_RING = pytest.param(ram, ring, id="ram to ring", marks=needs_ring)
RING_TO_RAM = pytest.param(ring, ram, id="ring to ram", marks=needs_ring)
RING_TO_RUN_PAGE = pytest.param(ring, run_page, id="ring to run page", marks=needs_vcpu)
RUN_PAGE_TO_RING = pytest.param(run_page, ring, id="run page to ring", marks=needs_vcpu)
KINDS: Mapping[Place, str] = {ram: "movable", ring: "mmio", run_page: "movable"}


@pytest.mark.parametrize(("first", "second"), [RAM_TO_RING, RING_TO_RAM, RING_TO_RUN_PAGE, RUN_PAGE_TO_RING])
@pytest.mark.parametrize("change", [announce_and_put, add_while_open_and_put])
def test_memory_replaced_by_another_kind_is_not_mapped(
    cooperative: Puppet, first: Place, second: Place, change: Callable[[LiveVmm, UaddrRange, Place], None]
) -> None:
    page = cooperative.do(reserve)
    cooperative.do(put, page, first)
    assert cooperative.do(LiveVmm.add_region, GFN, page, "auto") == KINDS[first]
    assert cooperative.do(LiveVmm.fault, GFN) is Answer.MAPPED
    cooperative.do(change, page, second)
    assert cooperative.do(LiveVmm.fault, GFN) is Answer.UNBACKED


@pytest.mark.parametrize(("first", "second"), [RAM_TO_RING, pytest.param(ram, run_page, marks=needs_vcpu)])
def test_memory_that_replaces_watched_memory_has_its_own_kind(
    unattached: Puppet, first: Place, second: Place
) -> None:
    unattached.do(LiveVmm.attach, Watch.REQUIRED, promise=True)
    page = unattached.do(reserve)
    unattached.do(put, page, first)
    unattached.do(LiveVmm.add_region, GFN, page, "auto")
    assert unattached.do(LiveVmm.fault, GFN) is Answer.MAPPED
    unattached.do(put, page, second)
    unattached.do(LiveVmm.drain)
    expected = {"movable": Answer.MAPPED, "mmio": Answer.UNBACKED}[KINDS[second]]
    assert unattached.do(LiveVmm.fault, GFN) is expected


@pytest.mark.parametrize(("first", "second"), [RAM_TO_RING, RING_TO_RAM, RING_TO_RUN_PAGE, RUN_PAGE_TO_RING])
def test_a_region_added_again_has_the_kind_of_the_current_memory(
    cooperative: Puppet, first: Place, second: Place
) -> None:
    """Nobody announces a change of what is in no region."""
    page = cooperative.do(reserve)
    cooperative.do(put, page, first)
    cooperative.do(LiveVmm.add_region, GFN, page, "auto")
    cooperative.do(LiveVmm.fault, GFN)
    cooperative.do(LiveVmm.remove_region, GFN, page)
    cooperative.do(put, page, second)
    assert cooperative.do(LiveVmm.add_region, GFN, page, "auto") == KINDS[second]
    assert cooperative.do(LiveVmm.fault, GFN) is Answer.MAPPED


@needs_ring
def test_two_files_without_a_path_are_two_memories(cooperative: Puppet) -> None:
    pages = [cooperative.do(reserve) for _ in range(2)]
    frames = []
    for number, page in enumerate(pages):
        cooperative.do(put, page, ring)
        cooperative.do(LiveVmm.add_region, GFN + number, page)
        assert cooperative.do(LiveVmm.fault, GFN + number) is Answer.MAPPED
        held = cooperative.do(LiveVmm.translate, GFN + number)
        assert held is not None
        frames.append(tuple(held.frame))
    assert frames == [("anonymous", page.start) for page in pages]
