"""A hypervisor that waits is not broken off, and so must be one that only waits for chaos."""

from __future__ import annotations

import random

import trio

from intercept_protocol.addresses import GfnRange
from intercept_protocol.messages import Remap
from intercept_protocol.outcomes import Access
from interceptd.hypervisor.software import SoftwareHypervisor
from interceptd.pages.mapping import HOST_BACKING, Frame, Mapping
from interceptd.partition.chaos import Chaos, ChaoticHypervisor


class Longest(random.Random):
    def randint(self, a: int, b: int) -> int:
        return max(a, b)


async def test_a_call_that_is_cancelled_meanwhile_is_completed() -> None:
    inner = SoftwareHypervisor(remap=Remap.ERROR, pool_pages=1, pool_limit=lambda: 1)
    chaotic = ChaoticHypervisor(inner, Chaos(2, Longest()))
    mapping = Mapping(
        start=0x10, end=0x12, start_uaddr_page=0x20, frame=Frame(HOST_BACKING, 0x30), access=Access.READ
    )
    with trio.CancelScope() as scope:
        scope.cancel()
        await chaotic.map_gpas([mapping])
    assert inner.translate(0x11) == mapping
    with trio.CancelScope() as scope:
        scope.cancel()
        await chaotic.unmap_gpas([GfnRange(start=0x10, end=0x12)])
    assert inner.translate(0x11) is None
