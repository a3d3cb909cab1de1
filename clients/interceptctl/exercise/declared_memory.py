"""Memory in model mode: VMAs and host pages that are only declared to the daemon.

Owns how the fake VMM's memory changes in this mode, and the allocation of host pages: none is ever reused, so
an old frame can be recognised. Must not know regions or guests.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from intercept_protocol import messages
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access

from .link import Link
from .truth import Truth
from .world import Backing, Frame

_FIRST_PFN: Final = 0x100000
_BACKING: Final = "host"


class DeclaredMemory:
    """See `Memory`."""

    def __init__(self, link: Link, truth: Truth) -> None:
        self._link = link
        self._truth = truth
        self._next_pfn = _FIRST_PFN

    async def map(self, uaddrs: UaddrRange, access: Access, *, io: bool) -> None:
        first = Backing(Frame(_BACKING, self._next_pfn), access, io)
        self._next_pfn += uaddrs.page_count + 1  # the gap keeps two VMAs from looking like one
        call = messages.MapVma(
            start_uaddr=uaddrs.start_uaddr,
            page_count=uaddrs.page_count,
            start_pfn=first.frame.page,
            readable=Access.READ in access,
            writable=Access.WRITE in access,
            executable=Access.EXECUTE in access,
            io=io,
        )
        await self._link.change(call, partial(self._truth.ask_map, uaddrs, first))

    async def unmap(self, uaddrs: UaddrRange) -> None:
        call = messages.UnmapVma(start_uaddr=uaddrs.start_uaddr, page_count=uaddrs.page_count)
        await self._link.change(call, partial(self._truth.ask_unmap, uaddrs))

    async def protect(self, uaddrs: UaddrRange, access: Access) -> None:
        call = messages.ProtectVma(
            start_uaddr=uaddrs.start_uaddr,
            page_count=uaddrs.page_count,
            readable=Access.READ in access,
            writable=Access.WRITE in access,
            executable=Access.EXECUTE in access,
        )
        await self._link.change(call, partial(self._truth.ask_protect, uaddrs, access))
