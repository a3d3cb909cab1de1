"""A KVM guest as a partition of the daemon: its connections, its regions and its vCPUs.

Owns opening and closing everything in order. Must not know guest programs or devices. Use it like this::

    with Machine.open() as machine, GuestPartition.open(path, machine, PartitionSetting()) as partition:
        partition.add_region(gfns, uaddrs, RequestedKind.MMIO, writable=True, executable=False)
        vcpu = partition.add_vcpu(0, StartState(entry=0x1000))
        stop = vcpu.run()

Memory is changed through `intercept_client.memory` with `partition.notifier`, whatever the coverage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Final, Self

from intercept_client._blocking_clients import BlockingVmm, BlockingVp
from intercept_client._blocking_hypervisor import BlockingHypervisor
from intercept_client._connecting import StrPath
from intercept_client._own_memory import Watch, own_memory
from intercept_client._vmm_requests import NewRegion
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import (
    AddressSpaceKind,
    HypervisorKind,
    MmioGranularity,
    PartitionCredentials,
    RegionKind,
    RequestedKind,
)

from ._copying import AnnouncedCopier, CheckedCopier, Copier
from ._daemon_loss import DaemonLoss, OnDaemonLoss
from ._devices import Bus
from ._guest_memory import GuestMemory
from ._guest_notifier import GuestNotifier
from ._guest_vcpu import GuestVcpu
from ._hypervisor_thread import HypervisorThread
from ._machine import Machine
from ._registers import StartState

ANSWER_SECONDS: Final = 30.0
"""The daemon bounds every answer by a few times 5 s; beyond this it hangs, and counts as gone."""


class Coverage(Enum):
    """How the daemon learns that memory goes away; also decides how accesses are completed."""

    ANNOUNCED = "every change is wrapped in begin and end: no window at all"
    WATCHED = "the kernel reports unmaps after the fact, through a userfaultfd: a window that is short"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionSetting:
    """How a `GuestPartition` is set up; `answer_timeout` is in seconds."""

    name: str = ""
    mmio_granularity: MmioGranularity = MmioGranularity.VMA
    coverage: Coverage = Coverage.ANNOUNCED
    on_daemon_loss: OnDaemonLoss = OnDaemonLoss.KEEP_RAM
    answer_timeout: float | None = ANSWER_SECONDS


_PRESUMED: Mapping[RequestedKind, RegionKind] = {
    RequestedKind.AUTO: RegionKind.MMIO,
    RequestedKind.MMIO: RegionKind.MMIO,
    RequestedKind.MOVABLE: RegionKind.MOVABLE,
    RequestedKind.PINNED: RegionKind.PINNED,
}
"""What a region counts as until the daemon has said: what may be MMIO is unmapped at its loss."""


def _nothing(_why: str) -> None:
    """For a VMM that reads `lost_because`, or why its vCPUs stopped."""


class GuestPartition:
    """A partition whose hypervisor is this process's KVM.

    Thread-safe, but for `close`, before which every vCPU has to be stopped. `vmm` and `notifier` are its
    connections.
    """

    def __init__(
        self, path: StrPath, machine: Machine, setting: PartitionSetting, on_lost: Callable[[str], None]
    ) -> None:
        self.memory: Final = GuestMemory(machine)
        self._path = path
        self._machine = machine
        self._setting = setting
        self._loss = DaemonLoss(self.memory, setting.on_daemon_loss, on_lost)
        with ExitStack() as opened:
            self.vmm: Final = opened.enter_context(
                BlockingVmm.open(path, name=setting.name, timeout=setting.answer_timeout)
            )
            self._partition: PartitionCredentials = self.vmm.create_partition(
                AddressSpaceKind.PROCESS,
                HypervisorKind.VMM,
                mmio_granularity=setting.mmio_granularity,
            )
            self._hypervisor = BlockingHypervisor.open(
                path, self._partition, self.memory, regions=self.vmm.regions
            )
            self._hypervisor_thread = HypervisorThread(self._hypervisor, self._loss.lose)
            opened.callback(self._hypervisor_thread.close)
            self._attach_memory()
            self.notifier: Final = GuestNotifier.open_for(
                path, self._partition, self._loss, timeout=setting.answer_timeout
            )
            opened.pop_all()
        self._vps: list[BlockingVp] = []

    @classmethod
    def open(
        cls,
        path: StrPath,
        machine: Machine,
        setting: PartitionSetting,
        on_lost: Callable[[str], None] = _nothing,
    ) -> Self:
        """Create the partition. `on_lost` is called once, in some thread, with the reason if the daemon is
        lost.

        Raises an `OSError` that names the path, or `WireError` if the daemon refuses.
        """
        return cls(path, machine, setting, on_lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def lost_because(self) -> str | None:
        """Why the daemon is lost; None while it is there."""
        return self._loss.why

    @property
    def credentials(self) -> PartitionCredentials:
        """What opens the partition's other connections."""
        return self._partition

    @property
    def hypervisor_descriptor(self) -> int:
        """The hypervisor connection's descriptor: readable when the daemon asks for something, or is gone."""
        return self._hypervisor.fileno()

    def hang_up(self) -> None:
        """Close the hypervisor connection at once: the partition is lost, and the daemon forgets it."""
        self._hypervisor_thread.close()

    def add_region(
        self,
        gfns: GfnRange,
        uaddrs: UaddrRange,
        kind: RequestedKind | RegionKind = RequestedKind.AUTO,
        *,
        writable: bool,
        executable: bool,
    ) -> RegionKind:
        """Let the guest reach `uaddrs` at `gfns`; returns the kind that the region has.

        Raises `WireError` if the daemon refuses, and then nothing was added. Any other error ended the
        connection; the region then counts as added when `OnDaemonLoss` decides what the guest loses.
        """
        region = self._loss.region_added(gfns, _PRESUMED[RequestedKind(kind)])
        try:
            found = self.vmm.add_region(gfns, uaddrs, kind, writable=writable, executable=executable)
        except WireError:
            self._loss.region_refused(region)
            raise
        region.kind = found
        return found

    def remove_region(self, gfns: GfnRange, uaddrs: UaddrRange) -> None:
        """Remove a region. Returns when the guest reaches nothing of it; raises as `add_region`."""
        self.vmm.remove_region(gfns, uaddrs)
        self._loss.region_removed(gfns)

    def change_regions(
        self, *, remove: Sequence[tuple[GfnRange, UaddrRange]] = (), add: Sequence[NewRegion] = ()
    ) -> list[RegionKind]:
        """Remove regions and add others in one step, as `BlockingVmm.change_regions` does. Raises as
        `add_region`, and then nothing was removed either."""
        coming = [self._loss.region_added(each.gfns, _PRESUMED[RequestedKind(each.kind)]) for each in add]
        try:
            kinds = self.vmm.change_regions(remove=remove, add=add)
        except WireError:
            for region in coming:
                self._loss.region_refused(region)
            raise
        for region, kind in zip(coming, kinds, strict=True):
            region.kind = kind
        for gfns, _ in remove:
            self._loss.region_removed(gfns)
        return kinds

    def add_vcpu(
        self, index: int, start: StartState, *, devices: Bus | None = None, ports: Bus | None = None
    ) -> GuestVcpu:
        """Attach the VP of this index, and create its vCPU, ready to run.

        `devices` are on the memory bus, `ports` on the port bus.
        """
        vp = BlockingVp.open(
            self._path, self._partition, vp_index=index, timeout=self._setting.answer_timeout
        )
        self._vps.append(vp)
        vcpu = self._machine.create_vcpu(index)
        vcpu.start_at(start)
        return GuestVcpu(
            vcpu,
            vp,
            memory=self.memory,
            copier=self._copier(),
            devices=devices or Bus(),
            ports=ports or Bus(),
            on_lost=self._loss.lose,
            kick=self._kick,
        )

    def close(self) -> None:
        """End the partition. The hypervisor connection goes last: the daemon unmaps everything over it."""
        self._loss.expect()
        for vp in self._vps:
            vp.close()
        self.notifier.close()
        self.vmm.close()
        self._hypervisor_thread.wait_ended()
        self._hypervisor_thread.close()

    def _attach_memory(self) -> None:
        announced = self._setting.coverage is Coverage.ANNOUNCED
        with own_memory(Watch.NONE if announced else Watch.REQUIRED) as memory:
            self.vmm.attach_memory(memory, promise_begin_end=announced)

    def _copier(self) -> Copier:
        return AnnouncedCopier() if self._setting.coverage is Coverage.ANNOUNCED else CheckedCopier()

    def _kick(self, vp_index: int) -> None:
        with suppress(OSError, ProtocolViolation, WireError):  # a daemon that is gone has nobody waiting
            self.vmm.kick(vp_index)
