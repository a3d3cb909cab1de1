"""What a VMM does while its daemon is killed.

Each deed prepares, yields, and does one thing; a test plans the kills at the yield. What must be true then is
asserted here where it is about this deed, and by `SurvivingVmm.check` where it is always true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from fakes.eventually import PATIENCE, eventually
from fakes.kept_daemon import KeptDaemon
from fakes.surviving_vmm import DECLARED, OWN_HYPERVISOR, Mode, Region, SurvivingVmm
from intercept_client import BlockingOperator, ConnectionLost
from intercept_protocol.errors import WireError
from intercept_protocol.messages import MmioGranularity, RequestedKind, VpSelection
from intercept_protocol.outcomes import Access

Deed = Callable[[SurvivingVmm, KeptDaemon], Iterator[None]]
MANY = 100
"""VMAs in one request, which has some ten kibibytes."""
LONG = 100
"""Invalidations that fill some kibibytes of a log."""


def operator(kept: KeptDaemon) -> BlockingOperator:
    return BlockingOperator.open(kept.operator_socket, timeout=PATIENCE)


def partitions(kept: KeptDaemon) -> int | None:
    """How many there are; None while the daemon is away."""
    try:
        with operator(kept) as asking:
            return len(asking.list_partitions())
    except (ConnectionLost, OSError):
        return None


def comes_and_goes(vmm: SurvivingVmm, kept: KeptDaemon) -> Iterator[None]:
    """A VMM of its own, from its first hello on."""
    yield
    with SurvivingVmm(vmm.path, vmm.mode) as other:
        region = other.add(other.new_region(2))
        other.touch(region)
        other.check()
    eventually(lambda: partitions(kept), 1)


def leaves(vmm: SurvivingVmm, kept: KeptDaemon) -> Iterator[None]:
    """Another VMM, with all that it has."""
    with SurvivingVmm(vmm.path, vmm.mode) as other:
        for _ in range(2):
            other.touch(other.add(other.new_region(2)))
        yield
    eventually(lambda: partitions(kept), 1)


def joins_a_vp(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    yield
    vmm.open_vp()


def loses_a_vp(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    """Another one has its index at once, or as soon as the daemon has noticed."""
    vmm.open_vp()
    index, vp = vmm.vps.popitem()
    yield
    vp.close()
    while index not in vmm.vps:
        with suppress(WireError):  # EEXIST
            vmm.open_vp()


def loses_a_notifier_that_has_begun(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    region = vmm.add(vmm.new_region(2))
    vmm.touch(region)
    notifier = vmm.open_notifier()
    begun = notifier.invalidation(region.uaddrs)
    begun.__enter__()
    yield
    notifier.close()
    eventually(lambda: vmm.vmm.statistics().open_invalidations, 0)
    vmm.touch(region)


def joins_a_notifier(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    yield
    with vmm.open_notifier() as notifier:
        notifier.kick(VpSelection.ALL)


def touches(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    region = vmm.add(vmm.new_region(2))
    yield
    vmm.touch(region)


def touches_again(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    """What is answered without a change."""
    region = vmm.add(vmm.new_region(1))
    vmm.touch(region)
    yield
    vmm.touch(region)


def announces(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    """Within the invalidation nothing is reached, after it everything is."""
    region = vmm.add(vmm.new_region(2))
    vmm.touch(region)
    yield
    with vmm.invalidation(region.uaddrs):
        vmm.check_reaches_nothing_of(region.uaddrs)
    vmm.touch(region)


def works_for_long(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    """Until its log is worth a compaction."""
    region = vmm.add(vmm.new_region(2))
    yield
    for _round in range(LONG):
        with vmm.invalidation(region.uaddrs):
            pass
    vmm.touch(region)


def declares_much(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    """A request that is read in several pieces."""
    yield
    vmm.declare(MANY)


def invalidates(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    region = vmm.add(vmm.new_region(2))
    vmm.touch(region)
    yield
    vmm.notifier.invalidate(region.uaddrs)
    vmm.check_reaches_nothing_of(region.uaddrs)
    vmm.touch(region)


def unmaps(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    """Memory of which the guest reached two pieces."""
    region = vmm.add(vmm.new_region(2))
    other = vmm.new_region(2, uaddrs=region.uaddrs)
    vmm.add(other)
    vmm.touch(region)
    vmm.touch(other)
    yield
    vmm.unmap(region.uaddrs)
    vmm.check_reaches_nothing_of(region.uaddrs)


def adds(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    region = vmm.new_region(2)
    yield
    vmm.add(region)
    vmm.touch(region)


def adds_pinned(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    region = vmm.new_region(2, RequestedKind.PINNED)
    yield
    vmm.add(region)
    assert vmm.vmm.translate(region.gfns.start + 1) is not None
    vmm.touch(region)


def removes(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    region = vmm.add(vmm.new_region(2))
    vmm.touch(region)
    yield
    vmm.remove(region)
    vmm.check_reaches_nothing_of(region.uaddrs)


def changes(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    """Regions in one step: one goes, one gets other memory, one of another kind comes."""
    going, moving = (vmm.add(vmm.new_region(2)) for _ in range(2))
    vmm.touch(going)
    vmm.touch(moving)
    coming = vmm.new_region(2, RequestedKind.PINNED)
    moved = Region(moving.gfns, vmm.memory(2), RequestedKind.MOVABLE)
    yield
    vmm.change([going, moving], [moved, coming])
    for region in (moved, coming):
        vmm.touch(region)
    for region in (going, moving):
        vmm.check_reaches_nothing_of(region.uaddrs)


def changes_in_vain(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    """Its hypervisor refuses the last new region, and all is as before; but a pinned region of which a dead
    daemon had taken something away faults again."""
    movable, pinned = vmm.add(vmm.new_region(2)), vmm.add(vmm.new_region(2, RequestedKind.PINNED))
    vmm.touch(movable)
    moved = Region(movable.gfns, vmm.memory(2), RequestedKind.MOVABLE)
    coming = Region(pinned.gfns, vmm.memory(2), RequestedKind.PINNED)
    refused = coming.uaddrs.start
    yield
    vmm.table.refuse(refused)
    try:
        vmm.change([movable, pinned], [moved, coming])
    except WireError as error:
        assert "no slot is free" in error.message, error  # noqa: PT017
    else:
        raise AssertionError("it was not refused")
    finally:
        vmm.table.refuse(None)
    for region in (movable, pinned):
        vmm.touch(region)
    vmm.check_reaches_nothing_of(moved.uaddrs)


def protects(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    """The guest may no longer write, and then it may again."""
    region = vmm.add(vmm.new_region(2))
    vmm.touch(region)
    yield
    vmm.vmm.protect_vma(region.uaddrs, Access.READ)
    assert vmm.ask(region.gfns.start) == ("forward", "permission")
    vmm.vmm.protect_vma(region.uaddrs, Access.READ | Access.WRITE)
    vmm.touch(region)


def sets_the_policy(vmm: SurvivingVmm, kept: KeptDaemon) -> Iterator[None]:
    """Operators, who have to connect again, see it."""
    before = _granularity(vmm, kept)
    wanted = next(each for each in MmioGranularity if each.value != before)
    yield
    vmm.vmm.set_policy(mmio_granularity=wanted)
    assert _granularity(vmm, kept) == wanted.value


def has_its_policy_set(vmm: SurvivingVmm, kept: KeptDaemon) -> Iterator[None]:
    """By an operator, whose connection ends with a daemon that dies, and who asks again."""
    before = _granularity(vmm, kept)
    wanted = next(each for each in MmioGranularity if each.value != before)
    yield
    while _granularity(vmm, kept) != wanted.value:
        with suppress(ConnectionLost, OSError), operator(kept) as asking:
            asking.set_policy(vmm.partition.partition_id, mmio_granularity=wanted)


def _granularity(vmm: SurvivingVmm, kept: KeptDaemon) -> str:
    while True:
        with suppress(ConnectionLost, OSError), operator(kept) as asking:
            return asking.inspect_partition(vmm.partition.partition_id).mmio_granularity


def prefaults(vmm: SurvivingVmm, _: KeptDaemon) -> Iterator[None]:
    region = vmm.add(vmm.new_region(2))
    yield
    vmm.vmm.prefault(region.gfns)
    vmm.touch(region)


ALL = list(Mode)
DEEDS: dict[Deed, list[Mode]] = {
    comes_and_goes: ALL, leaves: ALL, joins_a_vp: ALL, loses_a_vp: ALL, joins_a_notifier: ALL,
    loses_a_notifier_that_has_begun: ALL, touches: ALL, touches_again: ALL, announces: ALL, invalidates: ALL,
    works_for_long: ALL, unmaps: ALL, adds: ALL, adds_pinned: ALL, removes: ALL, changes: ALL,
    changes_in_vain: OWN_HYPERVISOR, protects: DECLARED, declares_much: DECLARED, sets_the_policy: ALL,
    has_its_policy_set: ALL, prefaults: ALL,
}  # fmt: skip
"""Each with the modes in which it can be done."""


def do(kept: KeptDaemon, vmm: SurvivingVmm, deed: Deed, *steps: tuple[str, int]) -> None:
    """Do it while daemons die at these points."""
    doing = deed(vmm, kept)
    next(doing)
    kept.plan(*steps)
    for _ in doing:
        raise AssertionError("a deed yields once")
    vmm.check()


def killed(kept: KeptDaemon, vmm: SurvivingVmm, deed: Deed, *steps: tuple[str, int]) -> bool:
    """Do it while daemons die at these points, and look at everything. Returns whether each was reached."""
    do(kept, vmm, deed, *steps)
    reached = kept.reached
    kept.plan()
    vmm.check()
    assert not kept.troubles()
    return reached
