"""A VMM on KVM whose guest memory is decided by the daemon.

Owns everything between /dev/kvm and the daemon's wire, for x86-64. In the order of reading: `ioctls`,
`machine`, `vcpu`, `exits`, `registers` and `binary_stats` are KVM; `memslots` and `guest_memory`, with
`run_gate`, are what the guest reaches; `hypervisor_session` and `hypervisor_connection` let the daemon change
it; `asking`, `copying`, `devices`, `guest_access`, `fetch_fault`, `locked` and `vcpu_loop` are one exit;
`daemon_loss` and `guest_notifier` are life without the daemon; `guest_vcpu` and `partition` put it together,
and are where to begin.

What KVM cannot do: execution cannot be withheld from memory that may be read, and what the CPU reads by
itself (page tables, descriptor tables) is no access that could be completed, so it must be mapped already:
pin it, or touch it first.
"""

from __future__ import annotations

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
