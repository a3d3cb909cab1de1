"""A userfaultfd as an MMU notifier: it reports every munmap in the ranges that it watches.

Owns the negotiation, registration and the event format (include/uapi/linux/userfaultfd.h). Must not know
partitions. `register` and `unregister` wait for the VMM's mmap lock and belong in a worker thread; the rest
never blocks.

Ranges are registered in write-protect mode and never protected, so no fault is raised. We request only UNMAP:
mremap and MAP_FIXED report the old range as UNMAP too; REMOVE comes before the zap and does not change the
identity of a backing; FORK needs privilege and can hang the VMM's fork.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Mapping
from typing import Final

from intercept_protocol.addresses import PAGE_SHIFT, PAGE_SIZE, UaddrRange
from interceptd.address_space.refusals import Call, Cause, cause_of

UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_UNREGISTER = 0x8010AA01
UFFD_API = 0xAA
FEATURE_EVENT_UNMAP = 1 << 6
REGISTER_MODE_WP = 2
EVENT_UNMAP = 0x16
_API = struct.Struct("<3Q")
"""struct uffdio_api: api, features, ioctls."""
_REGISTER = struct.Struct("<4Q")
"""struct uffdio_register: start, len, mode, ioctls."""
_RANGE = struct.Struct("<2Q")
"""struct uffdio_range: start, len."""
_EVENT = struct.Struct("<B7xQQQ")
"""struct uffd_msg, 32 bytes: the event, and for UNMAP its start and end."""
EVENT_BYTES = _EVENT.size
EVENTS_PER_READ = 1
"""Each event that is read wakes all threads that wait for theirs (userfaultfd_event_complete(),
fs/userfaultfd.c). With a thousand of them a read of 64 events would take tens of milliseconds."""
LINK = "anon_inode:[userfaultfd]"
"""Its link in /proc/self/fd."""


REQUIRED_FEATURES: Final[Mapping[str, int]] = {
    "UFFD_FEATURE_EVENT_UNMAP": FEATURE_EVENT_UNMAP,  # Linux 4.11
    "UFFD_FEATURE_PAGEFAULT_FLAG_WP": 1 << 0,  # write-protect mode: x86-64 5.7, arm64 6.10
    "UFFD_FEATURE_WP_HUGETLBFS_SHMEM": 1 << 12,  # of memfds, shared memory and hugetlb pages too: 5.19
}
"""Without the first nothing is reported; without the others the kernel always refuses to register some or all
guest memory. Only the first must be requested: the kernel lists all that it has."""
REQUIRED_IOCTLS: Final[Mapping[str, int]] = {"UFFDIO_REGISTER": 1 << 0}


class AlreadyInitialised(Exception):
    """UFFDIO_API was called before, so its features are already chosen."""


class FeaturesMissing(Exception):
    """This kernel cannot watch all guest memory; `names` are the kernel's names of the missing features."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


class NotReadable(Exception):
    """This kernel cannot guarantee a non-blocking read (RWF_NOWAIT on a userfaultfd: Linux 6.10)."""


class Userfaultfd:
    """Owns the descriptor. Does not rely on O_NONBLOCK: the VMM can change the flags of the open file."""

    def __init__(self, descriptor: int, *, negotiated: bool = False) -> None:
        """Negotiate, unless a predecessor has. Raises `AlreadyInitialised`, `FeaturesMissing`, `NotReadable`,
        and `OSError` for passing errors; the caller then keeps the descriptor."""
        if not negotiated and (lacking := missing(*_negotiate(descriptor))):
            raise FeaturesMissing(lacking)
        self._descriptor = descriptor
        self._buffer: bytearray | memoryview = bytearray(EVENTS_PER_READ * _EVENT.size)
        if not negotiated:
            self._require_readable()

    def _require_readable(self) -> None:
        try:
            self.read_events()
        except OSError as error:
            if cause_of(Call.READ_EVENTS, error) is Cause.NOT_OFFERED:
                raise NotReadable from error
            raise

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        """Idempotent. The kernel lets every waiting munmap continue. Blocks for the process's mmap lock."""
        if self._descriptor >= 0:
            os.close(self.detach())

    def detach(self) -> int:
        """Give up the descriptor, which is the caller's to close."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def register(self, uaddrs: UaddrRange) -> None:
        """Watch a range of whole pages of one VMA, which may be watched already.

        Raises `OSError`, classified by `refusals`; EINVAL may also mean that the VMA is gone."""
        request = bytearray(_REGISTER.pack(uaddrs.start_uaddr, uaddrs.length, REGISTER_MODE_WP, 0))
        fcntl.ioctl(self._descriptor, UFFDIO_REGISTER, request)

    def unregister(self, uaddrs: UaddrRange) -> None:
        """Stop watching. Raises `OSError`; does nothing if the range is not watched."""
        fcntl.ioctl(self._descriptor, UFFDIO_UNREGISTER, _RANGE.pack(uaddrs.start_uaddr, uaddrs.length))

    def read_events(self) -> list[UaddrRange]:
        """The ranges of up to `EVENTS_PER_READ` unmaps, which then continue; empty without events.

        Never blocks, even if the VMM cleared O_NONBLOCK. Raises `OSError` when the mm is gone.
        """
        try:
            size = os.preadv(self._descriptor, [self._buffer], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return []
        return parse_events(memoryview(self._buffer)[:size])

    def read_into(self, buffer: memoryview) -> None:
        """From now on read events to `buffer`, of `EVENT_BYTES`, where a successor finds one that was read
        and not forgotten."""
        self._buffer = buffer

    def forget_event(self) -> None:
        """The events of the last read are recorded."""
        self._buffer[:] = bytes(len(self._buffer))

    def restore_nonblocking(self) -> bool:
        """Set O_NONBLOCK, without which poll(2) reports an error forever; returns whether it was cleared."""
        return restore_nonblocking(self._descriptor)


def restore_nonblocking(descriptor: int) -> bool:
    """See `Userfaultfd.restore_nonblocking`."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if flags & os.O_NONBLOCK:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    return True


def missing(features: int, ioctls: int) -> list[str]:
    """The kernel's names of what is missing from its answer to UFFDIO_API."""
    wanted = [(REQUIRED_FEATURES, features), (REQUIRED_IOCTLS, ioctls)]
    return [name for required, offered in wanted for name, bit in required.items() if not bit & offered]


def _negotiate(descriptor: int) -> tuple[int, int]:
    """Call UFFDIO_API; returns the kernel's features and ioctls. Raises `AlreadyInitialised`, `OSError`.

    The kernel returns the same errno for an initialised descriptor and for an unknown feature. A second call
    without features fails only in the first case; in the second its answer shows the missing feature.
    """
    for features in (FEATURE_EVENT_UNMAP, 0):
        try:
            return _call_api(descriptor, features)
        except OSError as error:
            if cause_of(Call.UFFDIO_API, error) is not Cause.NOT_VIRGIN:
                raise
    raise AlreadyInitialised


def _call_api(descriptor: int, features: int) -> tuple[int, int]:
    request = bytearray(_API.pack(UFFD_API, features, 0))
    fcntl.ioctl(descriptor, UFFDIO_API, request)
    _, offered, ioctls = _API.unpack(request)
    return offered, ioctls


def parse_events(data: bytes | memoryview) -> list[UaddrRange]:
    """The ranges of the UNMAP events in `data`; skips other events, which were not requested."""
    return [
        UaddrRange(start=start >> PAGE_SHIFT, end=(end + PAGE_SIZE - 1) >> PAGE_SHIFT)
        for event, start, end, _ in _EVENT.iter_unpack(data)
        if event == EVENT_UNMAP and start < end
    ]
