"""What a VMM has to say before its guest can run: a partition on declared memory, and a region of it.

Owns these calls, for whoever is a VMM in Python. Must not know what is measured.
"""

from __future__ import annotations

from intercept_client import BlockingVmm
from intercept_protocol.messages import (
    AddRegion,
    AddressSpaceKind,
    CreatePartition,
    HypervisorKind,
    MapVma,
    PartitionCredentials,
    RequestedKind,
)


def create_partition(vmm: BlockingVmm) -> PartitionCredentials:
    return vmm.call(
        CreatePartition(address_space=AddressSpaceKind.DECLARED, hypervisor=HypervisorKind.SOFTWARE)
    )


def add_backed_region(vmm: BlockingVmm, start_gfn: int, page_count: int) -> None:
    """Device memory at uaddr 0, mapped whole, and the region that it stands behind."""
    vmm.call(
        MapVma(
            start_uaddr=0,
            page_count=page_count,
            start_pfn=0,
            readable=True,
            writable=True,
            executable=False,
            io=True,
        )
    )
    vmm.call(
        AddRegion(
            start_gfn=start_gfn,
            page_count=page_count,
            start_uaddr=0,
            kind=RequestedKind.MMIO,
            writable=True,
            executable=False,
        )
    )
