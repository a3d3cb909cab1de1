"""What tests with the small VMM need besides it: running to the end, KVM's own counters, and a stranger's
memory.

Owns no behaviour of the VMM; must not know what is right.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from fakes.eventually import PATIENCE
from intercept_client import libc
from intercept_client.kvm import GuestVcpu, PartitionSetting, Stop
from intercept_client.libc import Sharing
from intercept_protocol.addresses import PAGE_SIZE, UaddrRange
from intercept_protocol.outcomes import Access
from interceptctl.guest.small_vmm import SmallVmm

FLOATING: Final = 0xFFFFFFFF
"""What a guest reads where no device answers."""
OURS: Final = 0x42424242
STRANGERS: Final = 0x99999999


class StartVmm(Protocol):
    def __call__(self, setting: PartitionSetting | None = None) -> SmallVmm: ...


def run(vcpu: GuestVcpu) -> Stop:
    """Run a vCPU until it stops, in a new thread, so that a hang is a failure."""
    return vcpu.start().result(PATIENCE)


@contextmanager
def mmio_exits(vcpu: GuestVcpu) -> Iterator[list[int]]:
    """KVM's own count of MMIO exits within the block, in the list when it has ended."""
    statistics, counted = vcpu.vcpu.statistics(), list[int]()
    try:
        before = statistics.read("mmio_exits")
        yield counted
        counted.append(statistics.read("mmio_exits") - before)
    finally:
        statistics.close()


def map_stranger(uaddrs: UaddrRange) -> UaddrRange:
    """Memory of somebody else's instead of what is mapped there, full of `STRANGERS`: an munmap and an mmap
    in one, or another thread's mmap could come between them."""
    stranger = libc.mmap(uaddrs, Access.READ | Access.WRITE, Sharing.PRIVATE, flags=libc.MAP_FIXED)
    ctypes.memset(stranger.start_uaddr, STRANGERS & 0xFF, stranger.length)
    return stranger


def has_only(uaddrs: UaddrRange, byte: int) -> bool:
    """Whether that memory of ours is untouched."""
    return ctypes.string_at(uaddrs.start_uaddr, uaddrs.length) == bytes([byte]) * (
        uaddrs.page_count * PAGE_SIZE
    )
