"""The modes of an exercise: where the fake VMM's memory comes from.

Owns the port and the choice; must not know how either kind of memory changes.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import AddressSpaceKind, CreatePartition, HypervisorKind
from intercept_protocol.outcomes import Access


class Mode(Enum):
    """Its title, and how long an intercept may wait, in milliseconds."""

    DECLARED = ("model (declared + software)", AddressSpaceKind.DECLARED, 50)
    LIVE = ("live memory (process + software)", AddressSpaceKind.PROCESS, 1000)

    def __init__(self, title: str, address_space: AddressSpaceKind, timeout_ms: int) -> None:
        self.title = title
        self.partition = CreatePartition(
            address_space=address_space,
            hypervisor=HypervisorKind.SOFTWARE,
            # short enough for some to get RETRY: giving up midway is exercised too
            invalidate_timeout_ms=timeout_ms,
        )


class Memory(Protocol):
    """The fake VMM's memory. Each change is recorded in the truth when requested and when made."""

    async def map(self, uaddrs: UaddrRange, access: Access, *, io: bool) -> None:
        """Map new frames at `uaddrs`, where nothing is mapped. Frames are never reused."""

    async def unmap(self, uaddrs: UaddrRange) -> None:
        """Unmap `uaddrs`; returns when no guest can reach the old frames."""

    async def protect(self, uaddrs: UaddrRange, access: Access) -> None:
        """Change the rights of `uaddrs`; returns when no guest has the old ones."""
