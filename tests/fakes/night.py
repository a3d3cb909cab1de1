"""The VMMs of a bad night: many that do what VMMs do, and a few that do what wakes an operator up.

Owns what each does, in a process of its own (`HostileTenant`): first its partition, then its deed. All have
the tests' own uid, as where libvirt runs every VM. Must not know how a guilty one is found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from fakes.hostile_tenant import Attack, Size
from fakes.live_vmm import LiveVmm
from fakes.raw_client import READ, RawConnection, intercept_message, request
from intercept_client import BlockingNotifier, BlockingVmm, ConnectionEnded, NewRegion
from intercept_client.memory import Watch
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import (
    AddressSpaceKind,
    HypervisorKind,
    InvalidateBegin,
    MmioGranularity,
    PartitionCredentials,
    RequestedKind,
)
from intercept_protocol.outcomes import Access

ROOM: Final = 64
"""`partitions_per_uid`; sixty VMMs have one each, and `leak` takes the others."""
CONFIG: Final = f"[limits]\npartitions_per_uid = {ROOM}\n"
PAGES, PFN = 16, 0x5000
GFNS, UADDRS = GfnRange.of(0x100, PAGES), UaddrRange(start=0x7F000, end=0x7F000 + PAGES)
ONE_PAGE: Final = UaddrRange(start=0x7F000, end=0x7F001)
PATIENT_MS: Final = 600_000
"""Longer than the night."""
HOARDED: Final = 24
"""Times that 128 regions are added: they take more memory than what `leak` has."""
FLOOD: Final = 800
"""Requests that the log has a line of, more than a uid's share has room for."""


class Guest(NamedTuple):
    vmm: BlockingVmm
    partition: PartitionCredentials
    vp: RawConnection


@contextmanager
def guest(path: Path, name: str) -> Iterator[Guest]:
    """A partition with memory, of which the guest has touched a page."""
    with BlockingVmm.open(path, name=name) as vmm:
        partition = create(vmm)
        vmm.map_vma(UADDRS, PFN, Access.READ | Access.WRITE)
        vmm.add_region(GFNS, UADDRS, RequestedKind.MOVABLE, writable=True, executable=False)
        with RawConnection(path) as vp:
            vp.say_hello("vp", vp_index=0, partition_id=partition.partition_id, token=partition.token)
            assert vp.intercept(GFNS.start)[0] == "resume"
            yield Guest(vmm, partition, vp)


def create(vmm: BlockingVmm) -> PartitionCredentials:
    return vmm.create_partition(
        AddressSpaceKind.DECLARED, HypervisorKind.SOFTWARE, invalidate_timeout_ms=PATIENT_MS
    )


def ordinary(path: Path, _: Size) -> Iterator[None]:
    """Begins and ends invalidations."""
    with (
        guest(path, "ordinary") as own,
        BlockingNotifier.open(path, own.partition) as notifier,
    ):
        yield
        while True:
            with notifier.invalidation(UADDRS):
                pass
            own.vp.intercept(GFNS.start)  # `retry restarted` once after a restart
            yield


def live(path: Path, _: Size) -> Iterator[None]:
    """Of a process's own memory."""
    vmm = LiveVmm()
    vmm.connect(path)
    vmm.attach(Watch.IF_POSSIBLE, promise=True)
    yield
    yield


def slow(path: Path, _: Size) -> Iterator[None]:
    """Has an invalidation open, too, but nobody waits for it yet."""
    with (
        guest(path, "slow") as own,
        BlockingNotifier.open(path, own.partition) as notifier,
    ):
        yield
        with notifier.invalidation(UADDRS):
            yield


def stuck(path: Path, _: Size) -> Iterator[None]:
    """Begins an invalidation, and never ends it."""
    with (
        guest(path, "stuck") as own,
        BlockingNotifier.open(path, own.partition) as notifier,
    ):
        yield
        notifier.call(InvalidateBegin(start_uaddr=UADDRS.start_uaddr, length=UADDRS.length))
        own.vp.send(request("intercept", intercept_message(GFNS.start, READ)))
        yield


def hoard(path: Path, _: Size) -> Iterator[None]:
    """Adds regions without end."""
    with guest(path, "hoard") as own:
        yield
        gfns = itertools.count(0x1000)
        for _again in range(HOARDED):
            own.vmm.add_regions([
                NewRegion(
                    gfns=GfnRange.of(next(gfns), 1), uaddrs=ONE_PAGE, kind=RequestedKind.MOVABLE,
                    writable=True, executable=False,
                )
                for _again in range(128)
            ])  # fmt: skip
        yield


def leak(path: Path, _: Size) -> Iterator[None]:
    """Makes a partition again and again, and ends none."""
    with ExitStack() as opened, guest(path, "leak"):
        yield
        refused = 0
        while refused < 3:
            try:
                create(opened.enter_context(BlockingVmm.open(path, name="leaked")))
            except WireError:
                refused += 1
        yield


def flood(path: Path, _: Size) -> Iterator[None]:
    """Asks for what the log has a line of."""
    with guest(path, "flood") as own:
        yield
        for _again in range(FLOOD):
            own.vmm.set_policy(mmio_granularity=MmioGranularity.PAGE)
        yield


def poison(path: Path, _: Size) -> Iterator[None]:
    """Sends a request that daemons die of, as the test has planned."""
    with guest(path, "poison") as own:
        yield
        with pytest.raises(ConnectionEnded, match="EIO"):
            own.vmm.unmap_vma(UADDRS)
        yield


GUILTY: Final[tuple[Attack, ...]] = (stuck, hoard, leak, flood, poison)
OTHERS: Final[tuple[Attack, ...]] = (slow, *[live] * 4, *[ordinary] * 50)
