"""What a VMM has to say before its guest can run: a partition on declared memory, and a region of it.

Owns these calls, for benchmarks whose VMM is in Python. Must not know what is measured.
"""

from __future__ import annotations

from intercept_client import (
    Access,
    AddressSpaceKind,
    BlockingVmm,
    GfnRange,
    HypervisorKind,
    PartitionCredentials,
    RequestedKind,
    UaddrRange,
)


def create_partition(vmm: BlockingVmm) -> PartitionCredentials:
    return vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.SOFTWARE)


def add_backed_region(vmm: BlockingVmm, start_gfn: int, page_count: int) -> None:
    """Device memory at uaddr 0, mapped whole, and the region that it stands behind."""
    uaddrs = UaddrRange.of_pages(0, page_count)
    vmm.map_vma(uaddrs, 0, Access.READ | Access.WRITE, io=True)
    vmm.add_region(
        GfnRange.of(start_gfn, page_count), uaddrs, RequestedKind.MMIO, writable=True, executable=False
    )
