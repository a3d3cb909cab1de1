"""A kernel whose userfaultfd lacks something, as far as UFFDIO_API shows it.

Owns the answers of that one ioctl (userfaultfd_api, fs/userfaultfd.c) and whether the descriptor is virgin.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Final

API: Final = struct.Struct("<3Q")
"""struct uffdio_api: api, features, ioctls."""
EVENT_UNMAP, PAGEFAULT_FLAG_WP, WP_HUGETLBFS_SHMEM = 1 << 6, 1 << 0, 1 << 12
ALL: Final = EVENT_UNMAP | PAGEFAULT_FLAG_WP | WP_HUGETLBFS_SHMEM
REGISTER, UNREGISTER, API_IOCTL = 1 << 0, 1 << 1, 1 << 0x3F
IOCTLS: Final = REGISTER | UNREGISTER | API_IOCTL


class UserfaultfdKernel:
    """Takes the place of `fcntl.ioctl`. `refusing` is an errno that it answers with instead."""

    def __init__(self, features: int = ALL, ioctls: int = IOCTLS, refusing: int | None = None) -> None:
        self._features = features
        self._ioctls = ioctls
        self._refusing = refusing
        self._virgin = True

    def __call__(self, _: int, __: int, request: bytearray) -> int:
        api, wanted, _ioctls = API.unpack(request)
        if self._refusing is not None:
            raise OSError(self._refusing, os.strerror(self._refusing))
        if not self._virgin or wanted & ~self._features:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._virgin = False
        API.pack_into(request, 0, api, self._features, self._ioctls)
        return 0
