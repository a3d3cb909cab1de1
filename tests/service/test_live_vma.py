"""Which frames two VMAs share, by what the maps file shows of them."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from intercept_protocol.outcomes import Access
from interceptd.address_space.live_vma import RIGHTS, LiveVma

SHMEM = (0, 1)
"""The device of memfds, of shared anonymous memory and of System V segments."""
MEMFD = LiveVma(100, 110, Access.READ, 5, SHMEM, 7, True, b"/memfd:ram (deleted)")
SEGMENT = replace(MEMFD, name=b"/SYSV00000000 (deleted)")
SHARED_ANONYMOUS = replace(MEMFD, name=b"/dev/zero (deleted)")
NAMED_ANONYMOUS = replace(MEMFD, name=b"[anon_shmem:ram]")
RING = replace(MEMFD, device=(0, 16), name=b"anon_inode:[perf_event]")
SOCKET = replace(MEMFD, device=(0, 8), name=b"socket:[4711]")
PRIVATE = replace(MEMFD, shared=False)
HEAP = LiveVma(100, 110, Access.READ, 0, (0, 0), 0, False, b"[heap]")


def frame(vma: LiveVma, page: int) -> tuple[str, int]:
    return vma.backing, vma.backing_page(page)


@pytest.mark.parametrize("vma", [MEMFD, SHARED_ANONYMOUS, NAMED_ANONYMOUS])
def test_a_shared_mapping_of_a_file_has_the_files_frames(vma: LiveVma) -> None:
    assert frame(vma, 103) == ("file 0:1:7", 8)


def test_a_system_v_segment_has_its_own_frames_even_if_its_id_equals_a_memfds_inode() -> None:
    assert frame(SEGMENT, 103) == ("sysv 0:1:7", 8)


def test_the_first_system_v_segment_after_boot_has_its_own_frames_though_its_id_is_0() -> None:
    assert frame(replace(SEGMENT, inode=0), 103) == ("sysv 0:1:0", 8)


@pytest.mark.parametrize("vma", [PRIVATE, RING, SOCKET, HEAP])
def test_any_other_memory_has_the_frames_of_its_place(vma: LiveVma) -> None:
    assert frame(vma, 103) == ("anonymous", 103)


@pytest.mark.parametrize("vma", [MEMFD, PRIVATE, RING, HEAP])
def test_a_part_of_a_vma_continues_it(vma: LiveVma) -> None:
    offset = vma.offset_page + 2 if vma.inode else 0
    part = replace(vma, start=102, end=105, offset_page=offset)
    assert part.continues(vma)
    assert part.identity == vma.identity


@pytest.mark.parametrize(
    ("vma", "other"),
    [
        (MEMFD, replace(MEMFD, inode=8)),
        (MEMFD, replace(MEMFD, offset_page=6)),
        (MEMFD, replace(MEMFD, access=Access.READ | Access.WRITE)),
        (MEMFD, PRIVATE),
        (MEMFD, SEGMENT),
        (PRIVATE, replace(PRIVATE, access=Access.NONE)),
    ],
)
def test_a_vma_with_other_frames_or_rights_does_not_continue_one(vma: LiveVma, other: LiveVma) -> None:
    assert not other.continues(vma)


def test_a_private_mapping_of_another_file_continues_one() -> None:
    """Its frames are named by their place, as those of any private memory: an invalidation parts them."""
    assert replace(PRIVATE, inode=8).continues(PRIVATE)


@pytest.mark.parametrize(
    ("letters", "access"),
    [
        (b"---", Access.NONE),
        (b"r--", Access.READ),
        (b"rw-", Access.READ | Access.WRITE),
        (b"--x", Access.EXECUTE),
        (b"rwx", Access.READ | Access.WRITE | Access.EXECUTE),
    ],
)
def test_letters_are_rights(letters: bytes, access: Access) -> None:
    assert RIGHTS[letters] == access
