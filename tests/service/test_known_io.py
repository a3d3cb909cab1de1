"""What one pass over smaps learned about a VMA is valid until an invalidation overlaps it."""

from __future__ import annotations

import pytest

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.address_space.known_io import GONE_PIECES, KNOWN_VMAS, KnownIo, KnownVma
from interceptd.address_space.live_vma import LiveVma
from interceptd.memory_budget import CACHES, CacheShare, MemoryBudget, MemoryShare


def vma(start: int, end: int, name: bytes = b"") -> LiveVma:
    """Memory without an inode."""
    return LiveVma(start, end, Access.READ, 0, (0, 0), 0, False, name)


def perf_ring(start: int, end: int) -> LiveVma:
    return LiveVma(start, end, Access.READ, 0, (0, 16), 1038, True, b"anon_inode:[perf_event]")


def learned(vma: LiveVma, *, io: bool = False) -> KnownVma:
    return KnownVma(vma.start, vma.end, vma.identity, io)


@pytest.fixture
def known() -> KnownIo:
    """Of ordinary pages 10 to 20, device memory from 20 to 30, and nothing else."""
    io = KnownIo()
    io.learn([learned(vma(10, 20)), learned(perf_ring(20, 30), io=True)])
    return io


def test_a_learned_vma_is_known_for_all_its_pages_and_no_others(known: KnownIo) -> None:
    pages = {9: vma(9, 10), 10: vma(10, 20), 19: vma(10, 20), 20: perf_ring(20, 30), 30: vma(30, 40)}
    answers = [known.io_of(at, page) for page, at in pages.items()]
    assert answers == [None, False, False, True, None]


def test_a_part_of_a_vma_that_was_split_since_is_known(known: KnownIo) -> None:
    assert known.io_of(vma(14, 16), 15) is False


@pytest.mark.parametrize("other", [vma(20, 30), vma(20, 30, b"[vvar]"), perf_ring(20, 30)])
def test_another_vma_at_the_same_place_is_not_known(other: LiveVma) -> None:
    """Unannounced, as where a region was removed and another is added."""
    io = KnownIo()
    vcpu = LiveVma(20, 30, Access.READ, 0, (0, 16), 1038, True, b"anon_inode:kvm-vcpu:0")
    io.learn([learned(vcpu)])
    assert io.io_of(vcpu, 20) is False
    assert io.io_of(other, 20) is None


def test_an_invalidation_forgets_only_what_it_overlaps(known: KnownIo) -> None:
    known.forget(UaddrRange(start=15, end=21))
    answers = [known.io_of(vma(10, 20), page) for page in (14, 15)]
    answers += [known.io_of(perf_ring(20, 30), page) for page in (20, 21)]
    assert answers == [False, None, None, True]


def test_a_vma_invalidated_during_its_read_is_not_learned(known: KnownIo) -> None:
    known.read_on(30)
    known.forget(UaddrRange(start=45, end=46))
    known.learn([learned(vma(40, 50))])
    assert [known.io_of(vma(40, 50), page) for page in (44, 45)] == [False, None]


def test_a_vma_read_after_its_invalidation_is_known(known: KnownIo) -> None:
    known.forget(UaddrRange(start=15, end=50))
    known.read_on(30)
    known.learn([learned(vma(40, 50))])
    assert known.io_of(vma(40, 50), 45) is False
    assert known.io_of(vma(10, 20), 15) is None


def test_a_new_pass_knows_nothing_of_the_last_one(known: KnownIo) -> None:
    known.forget(UaddrRange(start=15, end=16))
    known.start_over()
    assert known.io_of(vma(10, 20), 10) is None
    known.learn([learned(vma(10, 20))])
    assert known.io_of(vma(10, 20), 15) is False


def test_too_many_pieces_leave_nothing_known(known: KnownIo) -> None:
    for page in range(100, 100 + 2 * GONE_PIECES, 2):
        known.forget(UaddrRange(start=page, end=page + 1))
    assert known.io_of(vma(10, 20), 10) is False
    known.forget(UaddrRange(start=50, end=51))
    assert known.io_of(vma(10, 20), 10) is None


def test_a_vma_that_was_merged_with_those_before_it_takes_their_place(known: KnownIo) -> None:
    """The pass continues at an address that is inside it by now."""
    known.read_on(30)
    known.learn([learned(vma(15, 40)), learned(vma(50, 60))])
    assert [known.io_of(vma(15, 40), page) for page in (15, 39)] == [False, False]
    assert known.io_of(vma(50, 60), 50) is False


def test_more_vmas_than_are_kept_leave_the_last_ones_known() -> None:
    io = KnownIo()
    vmas = [vma(page, page + 1) for page in range(0, 2 * KNOWN_VMAS + 2, 2)]
    io.learn([learned(each) for each in vmas])
    assert [io.io_of(each, each.start) for each in (vmas[0], vmas[-1])] == [None, False]


def test_neighbours_that_are_alike_count_as_one() -> None:
    io = KnownIo()
    io.learn([learned(vma(page, page + 1)) for page in range(KNOWN_VMAS + 2)])
    assert io.io_of(vma(0, 1), 0) is False


# ------------------------------------------------ how much is remembered


ENTRIES = 20


@pytest.fixture
def memory() -> MemoryShare:
    """With room for so many entries of a byte each."""
    return MemoryShare(1, MemoryBudget(lambda: ENTRIES * (CACHES + 1)))


def bounded(memory: MemoryShare) -> KnownIo:
    io = KnownIo()
    io.share = CacheShare(memory, cost=1)
    return io


def apart(count: int) -> list[LiveVma]:
    return [vma(page, page + 1) for page in range(0, 2 * count, 2)]


def test_no_more_is_remembered_than_the_uids_memory_has_room_for(memory: MemoryShare) -> None:
    io, vmas = bounded(memory), apart(ENTRIES + 1)
    io.learn([learned(each) for each in vmas[:-1]])
    assert (io.io_of(vmas[0], 0), memory.cached) == (False, ENTRIES)
    io.learn([learned(vmas[-1])])
    assert [io.io_of(each, each.start) for each in (vmas[0], vmas[-1])] == [None, False]
    assert memory.cached == 1


def test_another_partition_of_the_uid_leaves_less_room(memory: MemoryShare) -> None:
    one, other, vmas = bounded(memory), bounded(memory), apart(ENTRIES)
    one.learn([learned(each) for each in vmas[:-1]])
    for each in vmas[:3]:
        other.learn([learned(each)])
    assert [other.io_of(each, each.start) for each in vmas[:3]] == [None, None, False]
    one.start_over()
    other.learn([learned(vmas[3])])
    assert [other.io_of(each, each.start) for each in vmas[2:4]] == [False, False]


def test_what_is_forgotten_counts_too_and_leaves_nothing_known_without_room(memory: MemoryShare) -> None:
    io, vmas = bounded(memory), apart(ENTRIES - 1)
    io.learn([learned(each) for each in vmas])
    io.forget(UaddrRange(start=0, end=1))
    assert (io.io_of(vmas[1], 2), memory.cached) == (False, ENTRIES)
    io.forget(UaddrRange(start=2, end=3))
    assert (io.io_of(vmas[2], 4), memory.cached) == (None, 1)
    io.read_on(0)
    io.learn([learned(vmas[2])])
    assert (io.io_of(vmas[2], 4), memory.cached) == (False, 1)


def test_a_closed_cache_counts_nothing_whatever_comes(memory: MemoryShare) -> None:
    io = bounded(memory)
    io.learn([learned(vma(0, 1))])
    io.close()
    io.forget(UaddrRange(start=0, end=1))
    io.learn([learned(vma(2, 3))])
    assert memory.cached == 0
