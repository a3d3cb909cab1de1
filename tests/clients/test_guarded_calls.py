"""Every guarded call begins an invalidation, makes its system call, and ends it, also if the call fails."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes.scripted_daemon import Hear, Refuse, ScriptedDaemon, hello, replies
from intercept_client import BlockingNotifier, libc, memory
from intercept_client.libc import Sharing
from intercept_protocol.addresses import PAGE_SIZE, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import PartitionCredentials
from intercept_protocol.outcomes import Access

PARTITION = PartitionCredentials(partition_id=7, token=bytes(16))
RW = Access.READ | Access.WRITE
NOWHERE = UaddrRange(start=1, end=3)
"""Below mmap_min_addr, where nothing can be mapped."""
NO_FILE = -1
Guarded = Callable[[BlockingNotifier], object]


@pytest.fixture
def mapping() -> Iterator[UaddrRange]:
    uaddrs = libc.mmap(UaddrRange.of_pages(0, 4), RW, Sharing.PRIVATE)
    yield uaddrs
    libc.munmap(uaddrs)


def announced(socket_path: Path, act: Guarded, ranges: int = 1) -> list[tuple[str, UaddrRange]]:
    """What the daemon hears while `act` is made, which may raise an `OSError` of its system call."""
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(*[None] * (2 * ranges))],)) as daemon,
        BlockingNotifier.open(socket_path, PARTITION) as notifier,
    ):
        act(notifier)
    return heard(daemon)


def heard(daemon: ScriptedDaemon) -> list[tuple[str, UaddrRange]]:
    said = []
    for method, params in daemon.heard[1:]:
        (fields,) = params
        assert isinstance(fields, dict)
        said.append((method, UaddrRange.of_bytes(fields["start_uaddr"], fields["length"])))
    return said


def begun_and_ended(uaddrs: UaddrRange) -> list[tuple[str, UaddrRange]]:
    return [("invalidate_begin", uaddrs), ("invalidate_end", uaddrs)]


def within(outer: UaddrRange, inner: UaddrRange) -> list[tuple[str, UaddrRange]]:
    begin, end = begun_and_ended(outer)
    return [begin, *begun_and_ended(inner), end]


@pytest.mark.parametrize(
    ("act", "number"),
    [
        (lambda notifier: memory.mprotect(notifier, NOWHERE, RW), errno.ENOMEM),
        (lambda notifier: memory.madvise(notifier, NOWHERE, mmap.MADV_DONTNEED), errno.ENOMEM),
        (lambda notifier: memory.mremap(notifier, NOWHERE, 4), errno.EFAULT),
        (lambda notifier: memory.map_fixed(notifier, NOWHERE, RW, Sharing.SHARED, file=1 << 20), errno.EBADF),
        (lambda notifier: memory.fallocate_punch_hole(notifier, NO_FILE, 0, 4096, [NOWHERE]), errno.EBADF),
        (lambda notifier: memory.ftruncate(notifier, NO_FILE, 0, [NOWHERE]), errno.EBADF),
    ],
)
def test_a_guarded_call_that_the_kernel_refuses_raises_its_errno_and_ends(
    socket_path: Path, act: Guarded, number: int
) -> None:
    def refused(notifier: BlockingNotifier) -> None:
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is what counts
            act(notifier)
        assert caught.value.errno == number

    assert announced(socket_path, refused) == begun_and_ended(NOWHERE)


def test_mremap_to_a_place_announces_the_old_range_and_the_place(
    socket_path: Path, mapping: UaddrRange
) -> None:
    target = libc.mmap(UaddrRange.of_pages(0, 2), RW, Sharing.PRIVATE)
    old = UaddrRange(start=mapping.start, end=mapping.start + 2)
    said = announced(
        socket_path, lambda notifier: memory.mremap(notifier, old, 2, start_uaddr=target.start_uaddr), 2
    )
    assert said == within(old, target)
    libc.munmap(target)


def test_mremap_returns_where_the_memory_is_now(socket_path: Path, mapping: UaddrRange) -> None:
    moved: list[UaddrRange] = []
    announced(socket_path, lambda notifier: moved.append(memory.mremap(notifier, mapping, 8)))
    assert moved[0].page_count == 8
    libc.munmap(moved[0])


def test_ftruncate_announces_every_range_that_is_named(socket_path: Path, mapping: UaddrRange) -> None:
    first, second = (
        UaddrRange(start=mapping.start, end=mapping.start + 1),
        UaddrRange(start=mapping.start + 2, end=mapping.end),
    )
    file = os.memfd_create("cut")
    os.ftruncate(file, 8 * PAGE_SIZE)
    said = announced(
        socket_path, lambda notifier: memory.ftruncate(notifier, file, PAGE_SIZE, [first, second]), 2
    )
    assert said == within(first, second)
    assert os.fstat(file).st_size == PAGE_SIZE
    os.close(file)


def test_the_begin_of_a_second_range_that_is_refused_ends_the_first_and_changes_nothing(
    socket_path: Path, mapping: UaddrRange
) -> None:
    file = os.memfd_create("cut")
    os.ftruncate(file, 8 * PAGE_SIZE)
    script = [*hello(), *replies(None), Hear(), Refuse(WireError(errno.ENOSPC, "too many")), *replies(None)]
    with (
        ScriptedDaemon(socket_path, (script,)) as daemon,
        BlockingNotifier.open(socket_path, PARTITION) as notifier,
        pytest.raises(WireError, match="ENOSPC"),
    ):
        memory.ftruncate(notifier, file, 0, [mapping, NOWHERE])
    assert heard(daemon)[-1] == ("invalidate_end", mapping)
    assert os.fstat(file).st_size == 8 * PAGE_SIZE
    os.close(file)
