"""A userfaultfd is shown to watch the process whose maps came with it, or is refused; nothing is changed."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator

import pytest

from fakes.live_handovers import child_with_a_userfaultfd
from fakes.live_vmm import MAP_FIXED_NOREPLACE, QUIET_PAGE, RW
from fakes.procmaps_parsed import asking_by_parsing
from intercept_client import libc
from intercept_client.libc import Sharing
from intercept_client.memory import open_userfaultfd
from intercept_protocol.addresses import UaddrRange
from interceptd.address_space import Undecided
from interceptd.address_space.live_vma import LiveVma
from interceptd.address_space.mm_proof import NotOfThisMm, prove
from interceptd.address_space.procmaps import ProcMaps
from interceptd.address_space.userfaultfd import Userfaultfd

AT = UaddrRange(start=QUIET_PAGE + 0x1000, end=QUIET_PAGE + 0x1009)


class TheseMaps(ProcMaps):
    """Shows the experiment the VMAs at these places and no others."""

    def __init__(self, *places: UaddrRange) -> None:
        super().__init__(os.open("/proc/self/maps", os.O_RDONLY))
        self._places = places

    def first(self, wanted: Callable[[LiveVma], bool], most: int) -> list[LiveVma]:
        vmas = [self.vma_at(place.start) for place in self._places]
        return [vma for vma in vmas if vma is not None and wanted(vma)][:most]


def is_proved(userfaultfd: Userfaultfd, maps: ProcMaps) -> bool:
    try:
        prove(userfaultfd, maps)
    except NotOfThisMm:
        return False
    return True


@pytest.fixture
def ours() -> Iterator[Userfaultfd]:
    """A userfaultfd of this process."""
    userfaultfd = Userfaultfd(open_userfaultfd())
    yield userfaultfd
    userfaultfd.close()


@pytest.fixture
def memory() -> Iterator[UaddrRange]:
    """Nine pages of ordinary memory, all present."""
    libc.mmap(AT, RW, Sharing.PRIVATE, flags=MAP_FIXED_NOREPLACE)
    ctypes.memset(AT.start_uaddr, 1, AT.length)
    yield AT
    libc.munmap(AT)


@pytest.fixture
def maps(memory: UaddrRange) -> Iterator[ProcMaps]:
    """Of this process, as if it had nothing but `memory`."""
    these = TheseMaps(memory)
    yield these
    these.close()


def test_ones_own_is_proved_and_leaves_the_vma_as_it_was(
    ours: Userfaultfd, maps: ProcMaps, memory: UaddrRange
) -> None:
    before = maps.vma_at(memory.start)
    assert is_proved(ours, maps)
    assert maps.vma_at(memory.start) == before


def test_ones_own_is_proved_by_reading_the_maps_where_the_kernel_has_no_query(ours: Userfaultfd) -> None:
    maps = asking_by_parsing(ProcMaps(os.open("/proc/self/maps", os.O_RDONLY)))
    assert is_proved(ours, maps)
    maps.close()


def test_a_childs_userfaultfd_proves_nothing_even_with_memory_at_the_same_address(maps: ProcMaps) -> None:
    with child_with_a_userfaultfd() as descriptor:
        theirs = Userfaultfd(os.dup(descriptor))
        assert not is_proved(theirs, maps)
        theirs.close()


def test_a_userfaultfd_of_an_exited_process_proves_nothing(maps: ProcMaps) -> None:
    with child_with_a_userfaultfd() as descriptor:
        theirs = Userfaultfd(os.dup(descriptor))
    assert not is_proved(theirs, maps)
    theirs.close()


def test_memory_that_another_userfaultfd_holds_is_passed_over(ours: Userfaultfd, memory: UaddrRange) -> None:
    other = Userfaultfd(open_userfaultfd())
    held = UaddrRange(start=memory.start, end=memory.start + 3)
    other.register(held)
    maps = TheseMaps(held, UaddrRange(start=held.end, end=memory.end))
    assert is_proved(ours, maps)
    other.close()
    maps.close()


def test_memory_fully_held_by_other_userfaultfds_is_retried_later(
    ours: Userfaultfd, maps: ProcMaps, memory: UaddrRange
) -> None:
    other = Userfaultfd(open_userfaultfd())
    other.register(memory)
    with pytest.raises(Undecided, match="another userfaultfd still holds the VMA"):
        prove(ours, maps)
    other.close()
    assert is_proved(ours, maps)


def test_a_process_without_memory_to_try_it_on_proves_nothing(ours: Userfaultfd) -> None:
    maps = TheseMaps()
    assert not is_proved(ours, maps)
    maps.close()


class Full(Userfaultfd):
    """Of a process at vm.max_map_count: no VMA can be split."""

    def register(self, uaddrs: UaddrRange) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory", str(uaddrs))


def test_a_process_at_its_vma_limit_is_retried_later(maps: ProcMaps) -> None:
    full = Full(open_userfaultfd())
    with pytest.raises(Undecided, match="max_map_count"):
        prove(full, maps)
    full.close()
