"""The coherency contract: each way in which a process changes its memory, and when the guest loses what.

`clients/README.md` has the table that these tests hold to. A VMM of 16 shared pages of a memfd (or as many
anonymous ones) changes pages 4 to 8, after its guest has touched them all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from fakes import live_changes as changes
from fakes import live_locks as locks
from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.live_changes import PAGES, Glimpse, glimpses
from fakes.live_vmm import GFN, LiveVmm, Memory
from fakes.outside import Frame, frame_at
from fakes.puppet import Puppet, StartVmm
from fakes.raw_client import WRITE
from intercept_client.memory import Watch
from intercept_protocol.messages import HypervisorKind, RequestedKind
from intercept_protocol.outcomes import Access, Answer
from interceptd.memory.region import FAULT_IN_PAGES

Change = Callable[[LiveVmm, Memory], None]
ALL = list(range(PAGES))
PART, REST = [4, 5, 6, 7], [n for n in ALL if not 4 <= n < 8]
HEAD, TAIL = ALL[:4], ALL[4:]


def share(vmm: Puppet) -> Memory:
    """A memfd that the guest has touched."""
    return touched(vmm, vmm.do(LiveVmm.map_memfd, PAGES))


def own(vmm: Puppet, page_count: int = PAGES) -> Memory:
    """Anonymous memory that the guest has touched."""
    return touched(vmm, Memory(vmm.do(LiveVmm.map, page_count)))


def touched(vmm: Puppet, memory: Memory) -> Memory:
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    assert vmm.do(LiveVmm.fault, GFN, WRITE) is Answer.MAPPED
    return memory


def reached(vmm: Puppet) -> list[int]:
    return vmm.do(LiveVmm.reached, GFN, PAGES)


def frames(vmm: Puppet) -> dict[int, Frame]:
    """What the guest reaches, by the daemon's word."""
    seen = {n: vmm.do(LiveVmm.translate, GFN + n) for n in ALL}
    return {n: (str(it.frame[0]), it.frame[1]) for n, it in seen.items() if it is not None}


def frames_outside(vmm: Puppet, memory: Memory, pages: list[int]) -> dict[int, Frame | None]:
    """What the process has there, by the kernel's word."""
    return {n: frame_at(vmm.pid, memory.uaddrs.start + n) for n in pages}


# ------------------------------------------------ cooperative


@pytest.mark.parametrize(
    ("change", "memory", "left", "next_fault"),
    [
        (changes.announced_munmap, share, [], Answer.UNBACKED),
        (changes.announced_munmap_of_a_part, share, REST, Answer.UNBACKED),
        (changes.announced_map_fixed, share, REST, Answer.MAPPED),
        (changes.announced_mremap_that_moves, share, REST, Answer.UNBACKED),
        (changes.announced_mremap_over, share, REST, Answer.MAPPED),
        (changes.announced_mremap_that_shrinks, share, [], Answer.UNBACKED),
        (changes.announced_mremap_dontunmap, own, REST, Answer.MAPPED),
        (changes.announced_madvise_dontneed, share, REST, Answer.MAPPED),
        (changes.announced_madvise_remove, share, REST, Answer.MAPPED),
        (changes.announced_shm_remap, share, REST, Answer.MAPPED),
        (changes.announced_remap_file_pages, share, REST, Answer.MAPPED),
        (changes.announced_mprotect, share, REST, Answer.PERMISSION),
        (changes.announced_punch_hole, share, REST, Answer.MAPPED),
        (changes.announced_ftruncate, share, HEAD, Answer.MAPPED),
    ],
)
def test_an_announced_change_is_out_of_the_guests_reach_before_and_after_the_system_call(
    cooperative: Puppet,
    change: Change,
    memory: Callable[[Puppet], Memory],
    left: list[int],
    next_fault: Answer,
) -> None:
    changed = memory(cooperative)
    seen = cooperative.do(glimpses, change, changed, GFN)
    assert seen[-1] == Glimpse(before=left, after=left)
    assert cooperative.do(LiveVmm.fault, GFN + 5, WRITE) is next_fault
    assert frames(cooperative) == frames_outside(cooperative, changed, reached(cooperative))


# ------------------------------------------------ userfaultfd


@pytest.mark.parametrize(
    ("change", "left", "next_fault"),
    [
        (changes.munmap, [], Answer.UNBACKED),
        (changes.munmap_of_a_part, REST, Answer.UNBACKED),
        (changes.map_fixed, REST, Answer.MAPPED),
        (changes.mremap_that_moves, REST, Answer.UNBACKED),
        (changes.mremap_over, REST, Answer.MAPPED),
        (changes.mremap_that_shrinks, HEAD, Answer.UNBACKED),
        (changes.shm_remap, REST, Answer.UNBACKED),
        (changes.remap_file_pages, REST, Answer.MAPPED),
        (changes.mprotect, REST, Answer.PERMISSION),
    ],
)
def test_a_watched_change_of_mappings_is_revoked_from_the_guest(
    watched: Puppet, change: Change, left: list[int], next_fault: Answer
) -> None:
    changed = share(watched)
    watched.do(change, changed)
    watched.do(LiveVmm.drain)
    assert reached(watched) == left
    assert watched.do(LiveVmm.fault, GFN + 5, WRITE) is next_fault
    assert frames(watched) == frames_outside(watched, changed, reached(watched))


@pytest.mark.parametrize(
    ("change", "memory"),
    [
        (changes.mremap_dontunmap, own),
        (changes.madvise_dontneed, share),
        (changes.madvise_remove, share),
        (changes.punch_hole, share),
        (changes.ftruncate, share),
        (changes.copy_on_write, own),
        (changes.first_write_to_the_zero_page, own),
        (changes.fork_whose_child_unmaps, share),
    ],
)
def test_a_change_of_a_frames_contents_keeps_the_mapping(
    watched: Puppet, change: Change, memory: Callable[[Puppet], Memory]
) -> None:
    changed = memory(watched)
    before = frames(watched)
    watched.do(change, changed)
    watched.do(LiveVmm.drain)
    assert frames(watched) == before == frames_outside(watched, changed, ALL)


def test_a_collapse_into_a_huge_page_leaves_the_guest_the_same_frames(watched: Puppet) -> None:
    memory = own(watched, page_count=1024)
    watched.do(LiveVmm.write, memory.uaddrs)
    before = frames(watched)
    watched.do(changes.collapse_into_a_huge_page, memory)
    watched.do(LiveVmm.drain)
    assert frames(watched) == before == frames_outside(watched, memory, ALL)


@pytest.mark.parametrize("change", [changes.shm_remap, changes.remap_file_pages, changes.mprotect])
def test_a_watched_change_without_event_is_revoked_without_announcement(
    watched: Puppet, change: Change
) -> None:
    """The daemon compares once a second."""
    watched.do(change, share(watched))
    eventually(lambda: reached(watched), REST)


def test_a_watched_change_without_event_counts_for_pages_that_are_not_mapped_yet(watched: Puppet) -> None:
    """What was learned of their VMA at the first touch is forgotten before the daemon compares."""
    memory = Memory(watched.do(LiveVmm.map, 2 * FAULT_IN_PAGES))
    watched.do(LiveVmm.add_region, GFN, memory.uaddrs, RequestedKind.MOVABLE)
    assert watched.do(LiveVmm.fault, GFN, WRITE) is Answer.MAPPED
    watched.do(LiveVmm.mprotect, memory.uaddrs, Access.READ)
    watched.do(LiveVmm.drain)
    assert watched.do(LiveVmm.fault, GFN + FAULT_IN_PAGES, WRITE) is Answer.PERMISSION


@pytest.mark.parametrize("change", [changes.shm_remap, changes.remap_file_pages, changes.mprotect])
def test_a_watched_change_without_event_is_revoked_by_the_vmms_hypervisor_too(
    daemon: DaemonProcess, start_vmm: StartVmm, tmp_path: Path, change: Change
) -> None:
    vmm = start_vmm()
    vmm.do(LiveVmm.connect, daemon.socket, hypervisor=HypervisorKind.VMM)
    vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    vmm.start(locks.serve_the_hypervisor_under_the_lock, tmp_path / "served")
    eventually((tmp_path / "served").exists, True)
    vmm.do(change, share(vmm))
    vmm.do(LiveVmm.drain)
    assert vmm.do(locks.reached_through_the_link) == [GFN + page for page in REST]


# ------------------------------------------------ neither


@pytest.mark.parametrize("kind", ["movable", "mmio"])
def test_memory_that_is_neither_watched_nor_promised_is_never_mapped(
    unattached: Puppet, kind: Literal["movable", "mmio"]
) -> None:
    unattached.do(LiveVmm.attach, Watch.NONE, promise=False)
    memory = unattached.do(LiveVmm.map_memfd, PAGES)
    unattached.do(LiveVmm.add_region, GFN, memory.uaddrs, kind)
    assert unattached.do(LiveVmm.fault, GFN) is Answer.UNBACKED
    assert unattached.do(LiveVmm.counter, "mapped_gfns") == 0


# ------------------------------------------------ both


def test_memory_watched_and_announced_is_revoked_again_by_the_event(unattached: Puppet) -> None:
    unattached.do(LiveVmm.attach, Watch.REQUIRED, promise=True)
    changed = share(unattached)
    seen = unattached.do(glimpses, changes.announced_munmap_of_a_part, changed, GFN)
    assert seen[-1] == Glimpse(before=REST, after=REST)
    assert unattached.do(LiveVmm.counter, "invalidations") == 2
    assert reached(unattached) == REST
