"""A userfaultfd as an MMU notifier: told of every munmap in the ranges that it watches.

Owns the negotiation, registration and the event format (include/uapi/linux/userfaultfd.h). Must not know
partitions; `register` and `unregister` wait for the VMM's mmap lock and belong in a worker thread, the rest
never blocks.

Ranges are registered in write-protect mode and never protected, so no fault is raised. UNMAP alone is asked
for: mremap and MAP_FIXED report the old range as UNMAP too; REMOVE comes before the zap and says nothing that
a backing's identity does not survive; FORK needs privilege and can hang the VMM's fork.
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
EVENTS_PER_READ = 64
LINK = "anon_inode:[userfaultfd]"
"""What /proc/self/fd shows for one."""


REQUIRED_FEATURES: Final[Mapping[str, int]] = {
    "UFFD_FEATURE_EVENT_UNMAP": FEATURE_EVENT_UNMAP,  # Linux 4.11
    "UFFD_FEATURE_PAGEFAULT_FLAG_WP": 1 << 0,  # write-protect mode: x86-64 5.7, arm64 6.10
    "UFFD_FEATURE_WP_HUGETLBFS_SHMEM": 1 << 12,  # of memfds, shared memory and hugetlb pages too: 5.19
}
"""Without the first nothing is reported; without the others the kernel refuses to register some guest memory
or all, for good. Only the first must be asked for: the kernel tells of all that it has."""
REQUIRED_IOCTLS: Final[Mapping[str, int]] = {"UFFDIO_REGISTER": 1 << 0}


class NotVirgin(Exception):
    """Somebody has called UFFDIO_API before and so has chosen the features."""


class FeaturesMissing(Exception):
    """This kernel cannot watch all guest memory: `names` is what it lacks, by the kernel's names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


class NotReadable(Exception):
    """This kernel has no read that is sure not to block (RWF_NOWAIT on a userfaultfd: Linux 6.10)."""


class Userfaultfd:
    """Owns the descriptor. The VMM can change the open file's flags, so O_NONBLOCK is not relied on."""

    def __init__(self, descriptor: int) -> None:
        """Negotiate. Raises `NotVirgin`, `FeaturesMissing`, `NotReadable`, and `OSError` for what passes;
        the descriptor stays the caller's then."""
        if lacking := missing(*_negotiate(descriptor)):
            raise FeaturesMissing(lacking)
        self._descriptor = descriptor
        self._buffer = bytearray(EVENTS_PER_READ * _EVENT.size)
        try:
            self.read_events()
        except OSError as error:
            if cause_of(Call.READ_EVENTS, error) is Cause.NOT_OFFERED:
                raise NotReadable from error
            raise

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        """Idempotent. The kernel lets every munmap that waits go on."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def register(self, uaddrs: UaddrRange) -> None:
        """Watch a range of whole pages of one VMA, which may be watched already.

        Raises `OSError`: `refusals` has the cause; EINVAL can also mean that nothing is mapped any more."""
        request = bytearray(_REGISTER.pack(uaddrs.start_uaddr, uaddrs.length, REGISTER_MODE_WP, 0))
        fcntl.ioctl(self._descriptor, UFFDIO_REGISTER, request)

    def unregister(self, uaddrs: UaddrRange) -> None:
        """Watch it no more. Raises `OSError`; where it is not watched, nothing happens."""
        fcntl.ioctl(self._descriptor, UFFDIO_UNREGISTER, _RANGE.pack(uaddrs.start_uaddr, uaddrs.length))

    def read_events(self) -> list[UaddrRange]:
        """The ranges of up to `EVENTS_PER_READ` unmaps, which may go on now; empty when there are none.

        Never blocks, whatever the VMM did to O_NONBLOCK. Raises `OSError` when the mm is gone.
        """
        try:
            size = os.preadv(self._descriptor, [self._buffer], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return []
        return parse_events(memoryview(self._buffer)[:size])

    def restore_nonblocking(self) -> bool:
        """Set O_NONBLOCK if it was cleared, and say so: without it poll(2) reports an error for ever."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        if flags & os.O_NONBLOCK:
            return False
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_NONBLOCK)
        return True


def missing(features: int, ioctls: int) -> list[str]:
    """What a kernel lacks that answers UFFDIO_API with these, by the kernel's names."""
    wanted = [(REQUIRED_FEATURES, features), (REQUIRED_IOCTLS, ioctls)]
    return [name for required, offered in wanted for name, bit in required.items() if not bit & offered]


def _negotiate(descriptor: int) -> tuple[int, int]:
    """Call UFFDIO_API; returns the kernel's features and ioctls. Raises `NotVirgin`, `OSError`.

    The kernel gives one errno for a descriptor that was initialised before and for a feature that it does not
    know. Asked again for no feature, it refuses the first again, and shows that the second is missing.
    """
    for features in (FEATURE_EVENT_UNMAP, 0):
        try:
            return _call_api(descriptor, features)
        except OSError as error:
            if cause_of(Call.UFFDIO_API, error) is not Cause.NOT_VIRGIN:
                raise
    raise NotVirgin


def _call_api(descriptor: int, features: int) -> tuple[int, int]:
    request = bytearray(_API.pack(UFFD_API, features, 0))
    fcntl.ioctl(descriptor, UFFDIO_API, request)
    _, offered, ioctls = _API.unpack(request)
    return offered, ioctls


def parse_events(data: bytes | memoryview) -> list[UaddrRange]:
    """The ranges of the UNMAP events in what was read; other events are not asked for and passed over."""
    return [
        UaddrRange(start=start >> PAGE_SHIFT, end=(end + PAGE_SIZE - 1) >> PAGE_SHIFT)
        for event, start, end, _ in _EVENT.iter_unpack(data)
        if event == EVENT_UNMAP and start < end
    ]
