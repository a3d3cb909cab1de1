"""A KVM virtual machine: its memslots and its vCPUs.

Owns /dev/kvm, the VM's descriptor and what KVM says it can do; must not know which slots there are.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from intercept_client import libc
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.outcomes import Access

from . import _ioctls as ioctls
from ._memslots import Memslot
from ._vcpu import Vcpu

DEVICE = "/dev/kvm"


class KvmUnavailable(OSError):
    """This process cannot use KVM; the text says why."""


class Machine:
    """One KVM virtual machine. `slot_limit` is how many memslots it can have."""

    def __init__(self, kvm: int) -> None:
        self._vcpus: list[Vcpu] = []
        self._run_size = ioctls.vcpu_mmap_size(kvm)
        self._vm = ioctls.create_vm(kvm)
        self.slot_limit = ioctls.check_extension(self._vm, ioctls.CAP_NR_MEMSLOTS)
        self.has_read_only_slots = bool(ioctls.check_extension(self._vm, ioctls.CAP_READONLY_MEM))
        self._prime()

    @classmethod
    def open(cls, device: str | None = None) -> Self:
        """Create a VM; `device` is /dev/kvm by default. Raises `KvmUnavailable`."""
        device = device or DEVICE
        if not Path(device).exists():
            raise KvmUnavailable(f"{device} is not there: no KVM on this machine")
        try:
            kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KvmUnavailable(error.errno, f"{device} cannot be opened: {error.strerror}") from error
        try:
            require_api_version(ioctls.api_version(kvm))
            return cls(kvm)
        except OSError as error:
            if isinstance(error, KvmUnavailable):
                raise
            raise KvmUnavailable(error.errno, f"{device} gives no VM: {error.strerror}") from error
        finally:
            os.close(kvm)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the vCPUs and the VM. No vCPU may be running. May be repeated."""
        for vcpu in self._vcpus:
            vcpu.close()
        if self._vm >= 0:
            os.close(self._vm)
            self._vm = -1

    def create_vcpu(self, index: int) -> Vcpu:
        """A new vCPU, which is closed with the machine."""
        vcpu = Vcpu(ioctls.create_vcpu(self._vm, index), self._run_size, index)
        self._vcpus.append(vcpu)
        return vcpu

    def set_memslot(self, slot: Memslot) -> None:
        """Create a memslot, whose id must be free. Raises `OSError`."""
        ioctls.set_user_memory_region(
            self._vm,
            slot=slot.slot_id,
            flags=0 if slot.is_writable else ioctls.MEM_READONLY,
            gpa=slot.gpa,
            size=slot.uaddrs.length,
            uaddr=slot.uaddrs.start_uaddr,
        )

    def delete_memslot(self, slot: Memslot) -> None:
        """Delete a memslot. Returns when no vCPU reaches it any more. Raises `OSError`."""
        ioctls.set_user_memory_region(self._vm, slot=slot.slot_id, size=0)

    def _prime(self) -> None:
        """Let a guest run before it has a memslot: with shadow paging KVM_RUN is ENOSPC until the first one
        came, because KVM sizes its page-table cache when slots change, and to no less than 64 pages."""
        page = GfnRange(start=0, end=1)
        uaddrs = libc.mmap(UaddrRange.of_pages(0, 1), Access.READ, libc.Sharing.PRIVATE)
        try:
            slot = Memslot(0, page, uaddrs, Access.READ | Access.WRITE)
            self.set_memslot(slot)
            self.delete_memslot(slot)
        finally:
            libc.munmap(uaddrs)


def require_api_version(version: int) -> None:
    """Raises `KvmUnavailable` for another version than this library knows."""
    if version != ioctls.API_VERSION:
        raise KvmUnavailable(f"KVM has API version {version}, and only {ioctls.API_VERSION} is known here")
