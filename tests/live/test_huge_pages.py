"""Guest RAM of hugetlb pages, in regions that begin or end within one: the kernel watches whole ones only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fakes.huge_pages import HUGE, map_huge, reserved
from fakes.live_vmm import GFN, LiveVmm
from fakes.outside import frame_at
from fakes.puppet import Puppet
from fakes.raw_client import WRITE
from intercept_client.libc import Sharing
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access, Answer
from interceptd.address_space.live_vma import LiveVma

COUNT = 2


@pytest.fixture
def huge_pages() -> Iterator[None]:
    with reserved(COUNT) as there:
        if not there:
            pytest.skip(f"vm.nr_hugepages: {COUNT} huge pages of 2 MiB are not available")
        yield


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("sharing", Sharing)
@pytest.mark.parametrize(
    ("start", "end"),
    [
        pytest.param(0, COUNT * HUGE, id="whole"),
        pytest.param(HUGE // 2, COUNT * HUGE, id="from within one"),
        pytest.param(0, HUGE + 0x9F, id="to within another"),
        pytest.param(16, 32, id="within one"),
    ],
)
def test_a_region_over_parts_of_huge_pages_is_mapped_and_revoked_when_they_are_unmapped(
    watched: Puppet, sharing: Sharing, start: int, end: int
) -> None:
    memory = watched.do(map_huge, COUNT, sharing)
    uaddrs = UaddrRange(start=memory.start + start, end=memory.start + end)
    watched.do(LiveVmm.add_region, GFN, uaddrs)
    assert watched.do(LiveVmm.fault, GFN + 5, WRITE) is Answer.MAPPED
    held = watched.do(LiveVmm.translate, GFN + 5)
    assert held is not None
    assert tuple(held.frame) == frame_at(watched.pid, uaddrs.start + 5)
    watched.do(LiveVmm.munmap, memory)
    watched.do(LiveVmm.drain)
    assert watched.do(LiveVmm.reached, GFN, min(16, end - start)) == []


@pytest.mark.parametrize(
    ("unit", "part", "widened"),
    [
        (1, (3, 5), (3, 5)),
        (HUGE, (3, 5), (0, HUGE)),
        (HUGE, (0, HUGE), (0, HUGE)),
        (HUGE, (HUGE - 1, HUGE + 1), (0, 2 * HUGE)),
        (HUGE, (HUGE, 3 * HUGE), (HUGE, 3 * HUGE)),
        (3 * HUGE, (HUGE, HUGE + 1), (0, 3 * HUGE)),
    ],
)
def test_part_of_a_vma_is_widened_to_whole_huge_pages(
    unit: int, part: tuple[int, int], widened: tuple[int, int]
) -> None:
    """The last one is a VMA whose pages' size is not known: all of it."""
    at = 0x1000 * HUGE
    vma = LiveVma(at, at + 3 * HUGE, Access.READ, 0, (0, 0), 0, False, b"", unit)
    assert vma.whole_units(UaddrRange(start=at + part[0], end=at + part[1])) == UaddrRange(
        start=at + widened[0], end=at + widened[1]
    )
