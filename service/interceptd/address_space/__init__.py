"""The port to the memory behind a VMM's addresses.

Owns the contract, as seen from the fault handler. An address space knows uaddrs only: no gfns, no regions,
and no rights except those of the VMA.
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import Protocol

import msgspec

from intercept_protocol.addresses import UaddrRange
from interceptd.address_space.refusals import Cause
from interceptd.pages.mapping import Extent


class Undecided(Exception):
    """No answer now; ask again later. A fault becomes RETRY; a VMM's own call is refused with `number`."""

    def __init__(self, why: str, number: int = errno.EAGAIN, cause: Cause = Cause.OTHER) -> None:
        super().__init__(why)
        self.number = number
        self.cause = cause

    @classmethod
    def because(cls, cause: Cause, detail: str = "") -> Undecided:
        """With the text and the errno of a `Cause`."""
        return cls(cause.with_detail(detail), cause.number, cause)


class KindUnknown(Exception):
    """The descriptors that were handed over can never answer this question."""


class Unresolved(msgspec.Struct, frozen=True):
    """Why a question has no result; its `cause` says whether that is permanent."""

    cause: Cause
    detail: str = ""


class Caller(Enum):
    """On whose behalf a question is asked. Each has its own queue, so that neither waits for the other."""

    GUEST = "guest"
    """A fault, of up to one per VP. Its intercept has a deadline."""
    VMM = "vmm"
    """A call of the VMM, which makes one at a time."""


class AddressSpace(Protocol):
    """What backs the uaddrs of a VMM. Called without locks held. Both questions may block: for the VMM up to
    a deadline of the implementation, for a guest up to the caller's."""

    async def resolve(
        self, page: int, window: UaddrRange, region: UaddrRange, caller: Caller = Caller.GUEST
    ) -> Extent | None:
        """The part of `window` around `page` that the VMA there backs; None without a VMA.

        `page` is a page number of the VMM, `window` the range that may be mapped, `region` the whole range of
        the region around it. The frames are contiguous within the extent. The answer is true at some instant
        during the call; whether it still is, the caller learns from its attempt. Raises `Undecided`.
        """

    async def is_io(self, page: int, caller: Caller = Caller.GUEST) -> bool | None:
        """Whether the VMA at `page` is VM_IO | VM_PFNMAP; None without a VMA. Raises `Undecided`, and
        `KindUnknown` if it cannot be determined for any VMA."""

    def drain_nowait(self) -> bool:
        """Announce the changes that were reported so far. False if there were any or may be more: what was
        learned before must not be used now. Never blocks."""

    @property
    def may_block(self) -> bool:
        """Whether the VMM can make a question block."""

    @property
    def vma_count(self) -> int:
        """The number of VMAs that this address space records."""
