"""Memory of either kind, and how a VMM puts one in the place of the other.

Owns the places, of one page, and the verbs. Must not know what kind they are.
"""

from __future__ import annotations

from collections.abc import Callable

from fakes import device_memory
from fakes.live_vmm import GFN, RW, LiveVmm
from intercept_client import libc
from intercept_client.libc import Sharing
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access

Place = Callable[[UaddrRange], None]


def ram(page: UaddrRange) -> None:
    libc.mmap(page, RW, Sharing.PRIVATE, flags=libc.MAP_FIXED)


def ring(page: UaddrRange) -> None:
    device_memory.map_at(device_memory.perf_ring(), page)


def run_page(page: UaddrRange) -> None:
    device_memory.map_at(device_memory.vcpu(), page)


# ------------------------------------------------ verbs


def reserve(vmm: LiveVmm) -> UaddrRange:
    return vmm.map(1, access=Access.NONE)


def put(_: LiveVmm, page: UaddrRange, place: Place) -> None:
    place(page)


def announce_and_put(vmm: LiveVmm, page: UaddrRange, place: Place) -> None:
    with vmm.notifier.invalidation(page):
        place(page)


def add_while_open_and_put(vmm: LiveVmm, page: UaddrRange, place: Place) -> None:
    """Another region is added when the change has been announced and not been made."""
    with vmm.notifier.invalidation(page):
        vmm.add_region(2 * GFN, page, "auto")
        place(page)
