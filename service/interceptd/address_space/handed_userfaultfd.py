"""Proves that a descriptor is a userfaultfd that can be served, and has the kernel check its regions.

Owns the proof. Must not know who serves them. Both functions belong in a worker: the second waits for the
mmap lock of the VMM.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from intercept_protocol.handoff import HandoffRegion, Refused
from intercept_protocol.text import sentence
from interceptd.address_space.userfaultfd import LINK, UFFDIO_REGISTER

FEATURE_EVENT_REMOVE: Final = 1 << 3
_UNFIT: Final = {
    "UFFD_FEATURE_EVENT_FORK": 1 << 1,
    "UFFD_FEATURE_EVENT_REMAP": 1 << 2,
    "UFFD_FEATURE_SIGBUS": 1 << 7,
}
"""With the first two the memory would be in places that no hand-off tells; with the last there are no
faults."""
_INITIALISED: Final = 1 << 31
_API: Final = re.compile(r"^API:\s+[0-9a-f]+:([0-9a-f]+):[0-9a-f]+$", re.MULTILINE)
"""Of its fdinfo (userfaultfd_show_fdinfo): the API, its features, those that the kernel has."""
_REGISTER: Final = struct.Struct("<4Q")
"""struct uffdio_register: start, len, mode, ioctls."""
_REGISTER_MODE_MISSING: Final = 1
_OFFERS_ZEROPAGE: Final = 1 << 4
"""Among the ioctls of a registered range: not of huge pages."""


def prove(descriptor: int) -> None:
    """Raises `Refused` unless it is an initialised userfaultfd that reports removed pages."""
    link = os.readlink(f"/proc/self/fd/{descriptor}")
    if link != LINK:
        raise Refused(f"the descriptor is no userfaultfd, but {link[:80]}")
    found = _API.search(Path(f"/proc/self/fdinfo/{descriptor}").read_text())
    features = 0 if found is None else int(found[1], 16)
    if not features & _INITIALISED:
        raise Refused("the userfaultfd is not initialised")
    if not features & FEATURE_EVENT_REMOVE:
        raise Refused("the userfaultfd does not report removed pages (UFFD_FEATURE_EVENT_REMOVE)")
    for name, bit in _UNFIT.items():
        if features & bit:
            raise Refused(f"the userfaultfd has {name}, which cannot be served")


def check_regions(descriptor: int, regions: Iterable[HandoffRegion]) -> None:
    """Raises `Refused` for a region that the kernel does not let this userfaultfd fill, or whose pages have
    another size.

    To register again what is registered changes nothing, and tells.
    """
    for index, region in enumerate(regions):
        request = bytearray(
            _REGISTER.pack(region.base_host_virt_addr, region.size, _REGISTER_MODE_MISSING, 0)
        )
        try:
            fcntl.ioctl(descriptor, UFFDIO_REGISTER, request)
        except OSError as error:
            raise Refused(
                f"region {index} is no memory of the VMM that can be filled: {sentence(error)}"
            ) from error
        small = bool(_REGISTER.unpack(request)[3] & _OFFERS_ZEROPAGE)
        if small != (region.page_size == 4096):
            raise Refused(f"region {index} has other pages than of {region.page_size} bytes")
