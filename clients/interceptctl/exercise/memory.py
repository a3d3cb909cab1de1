"""The settings that an exercise can run in: where the fake VMM's memory comes from.

Owns the port and the choice; must not know how either kind of memory changes.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import AddressSpaceKind, CreatePartition, HypervisorKind
from intercept_protocol.outcomes import Access


class Setting(Enum):
    """How it is called, and how long an intercept may wait in it, in milliseconds."""

    DECLARED = ("model: declared + software", AddressSpaceKind.DECLARED, 50)
    LIVE = ("live memory: process + software", AddressSpaceKind.PROCESS, 1000)

    def __init__(self, title: str, address_space: AddressSpaceKind, timeout_ms: int) -> None:
        self.title = title
        self.partition = CreatePartition(
            address_space=address_space,
            hypervisor=HypervisorKind.SOFTWARE,
            # short enough for some to be told RETRY: what gives up midway is tried too
            invalidate_timeout_ms=timeout_ms,
        )


class Memory(Protocol):
    """The fake VMM's memory. Each change is in the truth from when it is asked for until it is made."""

    async def map(self, uaddrs: UaddrRange, access: Access, *, io: bool) -> None:
        """Put new frames behind `uaddrs`, where nothing is. None is ever used again."""

    async def unmap(self, uaddrs: UaddrRange) -> None:
        """Leave nothing behind `uaddrs`; returns when no guest can reach what was there."""

    async def protect(self, uaddrs: UaddrRange, access: Access) -> None:
        """Give what is behind `uaddrs` other rights; returns when no guest has the old ones."""
