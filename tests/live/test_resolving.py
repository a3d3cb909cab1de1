"""What stands behind a page of a real process is found: the VMA's part, its rights, its file or itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fakes.live_vmm import GFN, RW, LiveVmm
from fakes.outside import content_of, frame_at
from fakes.puppet import Puppet, VmmFailed
from fakes.raw_client import EXECUTE, READ, WRITE
from intercept_client.libc import Sharing
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access, Answer

PAGES = 16
NOWHERE = [
    pytest.param(UaddrRange(start=1, end=1 + PAGES), id="below mmap_min_addr"),
    pytest.param(
        UaddrRange(start=1 << 35, end=(1 << 35) + PAGES), id="between user space and the kernel's half"
    ),
    pytest.param(UaddrRange(start=0xFFFF_FFFF_FF600, end=0xFFFF_FFFF_FF601), id="vsyscall"),
    pytest.param(UaddrRange(start=(1 << 52) - PAGES, end=1 << 52), id="the last pages of 64 bits"),
]


@pytest.fixture(params=["watched", "cooperative"])
def vmm(request: pytest.FixtureRequest) -> Puppet:
    puppet: Puppet = request.getfixturevalue(request.param)
    return puppet


@pytest.fixture
def file_on_disk(tmp_path: Path) -> Path:
    path = tmp_path / "bar"
    path.write_bytes(bytes(4096 * PAGES))
    return path


def reached(vmm: Puppet, page_count: int = PAGES) -> list[int]:
    return vmm.do(LiveVmm.reached, GFN, page_count)


def assert_same_frames(vmm: Puppet, uaddrs: UaddrRange, pages: list[int]) -> None:
    for page in pages:
        held = vmm.do(LiveVmm.translate, GFN + page)
        assert held is not None
        assert tuple(held.frame) == frame_at(vmm.pid, uaddrs.start + page)


def test_prefault_maps_what_is_there_and_passes_over_what_is_not(vmm: Puppet) -> None:
    uaddrs = vmm.do(LiveVmm.map, PAGES)
    vmm.do(LiveVmm.munmap, UaddrRange(start=uaddrs.start + 4, end=uaddrs.start + 6))
    vmm.do(LiveVmm.add_region, GFN, uaddrs)
    assert vmm.do(LiveVmm.prefault, GFN - 1, PAGES + 2) == PAGES - 2
    pages = [*range(4), *range(6, PAGES)]
    assert reached(vmm) == pages
    assert_same_frames(vmm, uaddrs, pages)
    listed = vmm.do(LiveVmm.list_mappings)
    assert [(each.start_gfn - GFN, each.page_count) for each in listed] == [(0, 4), (6, PAGES - 6)]
    assert [each.frame for each in listed] == [frame_at(vmm.pid, uaddrs.start + page) for page in (0, 6)]


def test_a_memfds_frame_holds_what_was_written_at_that_offset(vmm: Puppet) -> None:
    file = vmm.do(LiveVmm.memfd, PAGES)
    uaddrs = vmm.do(LiveVmm.map, 8, file=file, first_page=5)
    vmm.do(LiveVmm.add_region, GFN, uaddrs)
    assert vmm.do(LiveVmm.fault, GFN + 2) is Answer.MAPPED
    for page in range(8):
        held = vmm.do(LiveVmm.translate, GFN + page)
        assert held is not None
        backing, file_page = held.frame
        assert content_of(vmm.pid, (str(backing), file_page)).startswith(f"bar {5 + page}.".encode())


def test_a_private_files_frame_is_the_vmms_own(vmm: Puppet) -> None:
    file = vmm.do(LiveVmm.memfd, PAGES)
    uaddrs = vmm.do(LiveVmm.map, PAGES, file=file, sharing=Sharing.PRIVATE)
    vmm.do(LiveVmm.add_region, GFN, uaddrs)
    assert vmm.do(LiveVmm.fault, GFN, WRITE) is Answer.MAPPED
    assert_same_frames(vmm, uaddrs, list(range(PAGES)))


def test_a_system_v_segments_frame_is_named_by_its_id(cooperative: Puppet) -> None:
    identifier, uaddrs = cooperative.do(LiveVmm.attach_segment, PAGES)
    cooperative.do(LiveVmm.add_region, GFN, uaddrs)
    assert cooperative.do(LiveVmm.fault, GFN, WRITE) is Answer.MAPPED
    held = cooperative.do(LiveVmm.translate, GFN + 3)
    assert held is not None
    assert re.fullmatch(rf"sysv \d+:\d+:{identifier}", str(held.frame[0]))
    assert_same_frames(cooperative, uaddrs, list(range(PAGES)))


def test_a_page_that_is_not_present_resolves_like_one_that_is(vmm: Puppet) -> None:
    uaddrs = vmm.do(LiveVmm.map, PAGES)
    vmm.do(LiveVmm.touch, UaddrRange(start=uaddrs.start, end=uaddrs.start + 2))
    vmm.do(LiveVmm.add_region, GFN, uaddrs)
    assert vmm.do(LiveVmm.fault, GFN + 9) is Answer.MAPPED
    assert_same_frames(vmm, uaddrs, list(range(PAGES)))


def test_a_hole_is_unbacked_and_ends_the_extent_on_both_sides(vmm: Puppet) -> None:
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    vmm.do(LiveVmm.munmap, memory.part(6, 9))
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    assert vmm.do(LiveVmm.fault, GFN + 7) is Answer.UNBACKED
    assert vmm.do(LiveVmm.fault, GFN) is Answer.MAPPED
    assert reached(vmm) == [0, 1, 2, 3, 4, 5]
    assert vmm.do(LiveVmm.fault, GFN + 12) is Answer.MAPPED
    assert_same_frames(vmm, memory.uaddrs, reached(vmm))


def test_several_vmas_behind_one_region_each_give_their_own_frames(vmm: Puppet) -> None:
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    vmm.do(LiveVmm.map, 4, at=memory.part(4, 8))
    vmm.do(LiveVmm.map, 4, file=vmm.do(LiveVmm.memfd, 9, "other"), first_page=3, at=memory.part(8, 12))
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    answers = [vmm.do(LiveVmm.fault, GFN + page) for page in (0, 4, 8, 12)]
    assert answers == [Answer.MAPPED] * 4
    assert_same_frames(vmm, memory.uaddrs, list(range(PAGES)))


def test_a_vma_that_is_larger_than_the_region_is_cut_to_it(vmm: Puppet) -> None:
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    vmm.do(LiveVmm.add_region, GFN, memory.part(3, 7))
    assert vmm.do(LiveVmm.fault, GFN) is Answer.MAPPED
    assert reached(vmm) == [0, 1, 2, 3]
    assert vmm.do(LiveVmm.fault, GFN + 4) is Answer.NO_REGION


def test_read_only_memory_is_read_and_not_written(vmm: Puppet) -> None:
    memory = vmm.do(LiveVmm.map_memfd, PAGES, access=Access.READ)
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    assert vmm.do(LiveVmm.fault, GFN, WRITE) is Answer.PERMISSION
    assert vmm.do(LiveVmm.fault, GFN, READ) is Answer.MAPPED
    held = vmm.do(LiveVmm.translate, GFN)
    assert held is not None
    assert held.access == 1


def test_memory_without_rights_is_permission_and_not_mapped(vmm: Puppet) -> None:
    uaddrs = vmm.do(LiveVmm.map, PAGES, access=Access.NONE)
    vmm.do(LiveVmm.add_region, GFN, uaddrs)
    assert [vmm.do(LiveVmm.fault, GFN, access) for access in (READ, WRITE, EXECUTE)] == [
        Answer.PERMISSION
    ] * 3
    assert reached(vmm) == []


def test_two_regions_over_the_same_memory_reach_the_same_frames(vmm: Puppet) -> None:
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    for start_gfn in (GFN, 2 * GFN):
        vmm.do(LiveVmm.add_region, start_gfn, memory.uaddrs)
        assert vmm.do(LiveVmm.fault, start_gfn + 3) is Answer.MAPPED
    assert vmm.do(LiveVmm.translate, GFN + 3) == vmm.do(LiveVmm.translate, 2 * GFN + 3)


def test_two_mappings_of_one_file_reach_the_same_frames(vmm: Puppet) -> None:
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    alias = vmm.do(LiveVmm.map, PAGES, file=memory.file)
    for start_gfn, uaddrs in ((GFN, memory.uaddrs), (2 * GFN, alias)):
        vmm.do(LiveVmm.add_region, start_gfn, uaddrs)
        assert vmm.do(LiveVmm.fault, start_gfn + 3) is Answer.MAPPED
    assert vmm.do(LiveVmm.translate, GFN + 3) == vmm.do(LiveVmm.translate, 2 * GFN + 3)


def test_memory_advised_to_huge_pages_is_mapped_by_the_window(vmm: Puppet) -> None:
    uaddrs = vmm.do(LiveVmm.map, 2048)
    vmm.do(LiveVmm.use_huge_pages, uaddrs)
    vmm.do(LiveVmm.add_region, GFN, uaddrs)
    assert vmm.do(LiveVmm.fault, GFN + 600) is Answer.MAPPED
    assert vmm.do(LiveVmm.counter, "mapped_gfns") == 512
    held = vmm.do(LiveVmm.translate, GFN + 600)
    assert held is not None
    assert tuple(held.frame) == frame_at(vmm.pid, uaddrs.start + 600)


@pytest.mark.parametrize("uaddrs", NOWHERE)
def test_a_uaddr_outside_the_process_is_unbacked(vmm: Puppet, uaddrs: UaddrRange) -> None:
    vmm.do(LiveVmm.add_region, GFN, uaddrs)
    assert vmm.do(LiveVmm.fault, GFN) is Answer.UNBACKED


@pytest.mark.parametrize("uaddrs", NOWHERE)
def test_kind_auto_over_nothing_is_einval(vmm: Puppet, uaddrs: UaddrRange) -> None:
    with pytest.raises(VmmFailed) as refused:
        vmm.do(LiveVmm.add_region, GFN, uaddrs, "auto")
    assert (refused.value.number, "no VMA" in refused.value.text) == (22, True)


def test_a_pfn_mapped_vma_is_mmio_by_kind_auto(cooperative: Puppet) -> None:
    vvar = cooperative.do(LiveVmm.vma_named, "[vvar]")
    assert cooperative.do(LiveVmm.add_region, GFN, vvar, "auto") == "mmio"
    assert cooperative.do(LiveVmm.fault, GFN, WRITE) is Answer.PERMISSION
    assert cooperative.do(LiveVmm.fault, GFN, READ) is Answer.MAPPED


def test_a_special_vma_that_cannot_be_watched_is_not_mapped_blind(watched: Puppet) -> None:
    vvar = watched.do(LiveVmm.vma_named, "[vvar]")
    watched.do(LiveVmm.add_region, GFN, vvar, "mmio")
    assert watched.do(LiveVmm.fault, GFN) is Answer.UNBACKED


def test_device_memory_in_a_region_of_kind_auto_that_began_as_ram_is_unbacked(cooperative: Puppet) -> None:
    both = cooperative.do(LiveVmm.vvar_and_the_page_before)
    assert cooperative.do(LiveVmm.add_region, GFN, both, "auto") == "movable"
    assert cooperative.do(LiveVmm.fault, GFN) is Answer.MAPPED
    assert cooperative.do(LiveVmm.fault, GFN + 1) is Answer.UNBACKED


def test_a_file_on_disk_that_is_promised_is_mapped(cooperative: Puppet, file_on_disk: Path) -> None:
    uaddrs = cooperative.do(LiveVmm.map_path, file_on_disk, PAGES)
    cooperative.do(LiveVmm.add_region, GFN, uaddrs)
    assert cooperative.do(LiveVmm.fault, GFN) is Answer.MAPPED
    assert_same_frames(cooperative, uaddrs, list(range(PAGES)))


def test_a_file_on_disk_that_cannot_be_watched_is_not_mapped(watched: Puppet, file_on_disk: Path) -> None:
    watched.do(LiveVmm.add_region, GFN, watched.do(LiveVmm.map_path, file_on_disk, PAGES))
    assert watched.do(LiveVmm.fault, GFN) is Answer.UNBACKED


def test_a_pinned_region_is_mapped_whole_when_it_is_added(vmm: Puppet) -> None:
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    vmm.do(LiveVmm.map, 4, at=memory.part(4, 8))
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs, "pinned")
    assert_same_frames(vmm, memory.uaddrs, list(range(PAGES)))


def test_a_pinned_region_with_a_hole_is_efault_and_leaves_nothing(vmm: Puppet) -> None:
    memory = vmm.do(LiveVmm.map_memfd, PAGES)
    vmm.do(LiveVmm.munmap, memory.part(6, 7))
    with pytest.raises(VmmFailed) as refused:
        vmm.do(LiveVmm.add_region, GFN, memory.uaddrs, "pinned")
    assert (refused.value.number, reached(vmm), vmm.do(LiveVmm.counter, "regions")) == (14, [], 0)


def test_memory_that_is_mapped_again_after_a_munmap_is_watched_again(watched: Puppet) -> None:
    memory = watched.do(LiveVmm.map_memfd, PAGES)
    watched.do(LiveVmm.add_region, GFN, memory.uaddrs)
    for _ in range(3):
        assert watched.do(LiveVmm.fault, GFN) is Answer.MAPPED
        watched.do(LiveVmm.munmap, memory.uaddrs)
        watched.do(LiveVmm.drain)
        assert reached(watched) == []
        watched.do(LiveVmm.map, PAGES, file=memory.file, at=memory.uaddrs, access=RW)
