"""The other half of a VMM on KVM, for x86-64: vCPUs, memslots and devices, with guest memory decided by the
daemon.

Begin with `GuestPartition.open`: it creates the partition, hands over this process's memory and serves the
daemon's map and unmap requests with memslots. `add_vcpu` then returns a `GuestVcpu` that only has to be run.

KVM cannot withhold execution from readable memory. What the CPU reads by itself (page tables, descriptor
tables) cannot be completed for it, so it must be mapped already: pin it, or touch it first.
"""

from __future__ import annotations

from intercept_client._showing import show_as_from

from ._daemon_loss import OnDaemonLoss
from ._devices import Bus, Device, Window
from ._guest_vcpu import GuestVcpu
from ._machine import KvmUnavailable, Machine
from ._partition import Coverage, GuestPartition, PartitionSetting
from ._registers import Register, StartState
from ._stop import Stop, StopReason

__all__ = [
    "Bus",
    "Coverage",
    "Device",
    "GuestPartition",
    "GuestVcpu",
    "KvmUnavailable",
    "Machine",
    "OnDaemonLoss",
    "PartitionSetting",
    "Register",
    "StartState",
    "Stop",
    "StopReason",
    "Window",
]

show_as_from(__name__, [value for name, value in globals().items() if name in __all__])
