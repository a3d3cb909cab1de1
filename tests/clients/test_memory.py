"""Mappings are changed within an invalidation, seen from the daemon's side."""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.scripted_daemon import Answer, Hear, Look, Refuse, ScriptedDaemon, hello, replies
from intercept_client import BlockingNotifier, memory
from intercept_protocol.addresses import PAGE_SIZE, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import PartitionCredentials

PARTITION = PartitionCredentials(partition_id=7, token=bytes(16))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@pytest.fixture
def mapping() -> Iterator[UaddrRange]:
    """Three pages that no Python object looks into."""
    length = 3 * PAGE_SIZE
    uaddr = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, -1, 0)
    yield UaddrRange.of_bytes(uaddr, length)
    _libc.munmap(uaddr, length)


def is_mapped(uaddrs: UaddrRange) -> bool:
    """Whether this process has a mapping that covers the range."""
    spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(
        int(start, 16) <= uaddrs.start_uaddr and uaddrs.start_uaddr + uaddrs.length <= int(end, 16)
        for start, end in spans
    )


def test_munmap_unmaps_after_the_begin_is_answered_and_before_the_end_is_sent(
    socket_path: Path, mapping: UaddrRange
) -> None:
    seen: list[bool] = []
    look = Look(lambda: seen.append(is_mapped(mapping)))
    script = [*hello(), Hear(), look, Answer(), Hear(), look, Answer()]
    with (
        ScriptedDaemon(socket_path, (script,)) as daemon,
        BlockingNotifier.open(socket_path, PARTITION) as notifier,
    ):
        memory.munmap(notifier, mapping)

    fields = {"start_uaddr": mapping.start_uaddr, "length": mapping.length}
    assert daemon.heard[1:] == [("invalidate_begin", [fields]), ("invalidate_end", [fields])]
    assert seen == [True, False]


def test_munmap_leaves_the_mapping_when_the_begin_is_refused(socket_path: Path, mapping: UaddrRange) -> None:
    with (
        ScriptedDaemon(socket_path, ([*hello(), Hear(), Refuse(WireError(errno.ENOSPC, "too many"))],)),
        BlockingNotifier.open(socket_path, PARTITION) as notifier,
        pytest.raises(WireError, match="ENOSPC"),
    ):
        memory.munmap(notifier, mapping)

    assert is_mapped(mapping)


def test_munmap_that_the_kernel_refuses_raises_its_errno_and_ends_the_invalidation(socket_path: Path) -> None:
    beyond = UaddrRange.of_bytes(1 << 63, PAGE_SIZE)
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(None, None)],)) as daemon,
        BlockingNotifier.open(socket_path, PARTITION) as notifier,
        pytest.raises(OSError, match=r"munmap \[0x8000000000000000, 0x8000000000001000\)") as caught,
    ):
        memory.munmap(notifier, beyond)

    assert caught.value.errno == errno.EINVAL
    assert daemon.methods == ["hello", "invalidate_begin", "invalidate_end"]
