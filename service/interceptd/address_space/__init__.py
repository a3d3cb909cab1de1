"""The port to what stands behind a VMM's addresses.

Owns the contract, seen from the intercept path. An address space knows uaddrs only: no gfns, no regions, no
rights but the VMA's own.
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
    """Nothing was found out: ask again later. A fault is RETRY; a VMM's own call is refused with `number`."""

    def __init__(self, why: str, number: int = errno.EAGAIN) -> None:
        super().__init__(why)
        self.number = number

    @classmethod
    def because(cls, cause: Cause, detail: str = "") -> Undecided:
        """As the table says."""
        return cls(f"{cause.text} ({detail})" if detail else cause.text, cause.number)


class KindUnknown(Exception):
    """What was handed over cannot answer this question, now or later."""


class Unresolved(msgspec.Struct, frozen=True):
    """Why a question found nothing; whether that decides it is the table's to say."""

    cause: Cause
    detail: str = ""


class Caller(Enum):
    """On whose behalf a question is put: what may block keeps the two apart, so that neither waits in the
    other's queue."""

    GUEST = "guest"
    """A fault, of which there can be as many as VPs. Its intercept has a deadline."""
    VMM = "vmm"
    """A call of the VMM's own, which makes one at a time."""


class AddressSpace(Protocol):
    """Where uaddrs lead. Called without any lock held; both questions may block, for the VMM with a deadline
    of their own, for a guest until the caller's."""

    async def resolve(
        self, page: int, window: UaddrRange, region: UaddrRange, caller: Caller = Caller.GUEST
    ) -> Extent | None:
        """The part of `window` around `page` that the VMA there really backs; None where there is no VMA.

        `window` is what may be mapped, `region` the whole range that `page` was registered in, `page` a page
        number of the VMM. The frames are contiguous within the extent. The answer is true at some instant of
        the call; the caller finds out by its attempt whether it still is. Raises `Undecided`.
        """

    async def is_io(self, page: int, caller: Caller = Caller.GUEST) -> bool | None:
        """Whether the VMA at `page` is VM_IO | VM_PFNMAP; None where there is no VMA. Raises `Undecided`, and
        `KindUnknown` where it cannot be told of any VMA."""

    @property
    def may_block(self) -> bool:
        """Whether a question can be held up by the VMM."""

    @property
    def vma_count(self) -> int:
        """VMAs that this address space keeps a record of."""
