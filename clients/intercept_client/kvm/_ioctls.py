"""KVM's ioctls on x86-64: numbers and structures, as include/uapi/linux/kvm.h has them.

Owns how a request and its bytes look; must not know what they are used for. Every call raises the `OSError`
of its ioctl, and lets other threads run during it. They work only in the process that created the VM.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from struct import Struct
from typing import Final

_KVMIO: Final = 0xAE


def _io(number: int) -> int:
    return _KVMIO << 8 | number


def _iow(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | _io(number)


def _ior(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | _io(number)


API_VERSION: Final = 12
"""Stable since Linux 2.6.22; every other one is to be refused."""

CAP_NR_MEMSLOTS: Final = 10
CAP_READONLY_MEM: Final = 81

MEM_READONLY: Final = 2
"""A guest's write to the slot is KVM_EXIT_MMIO."""

MEMORY_REGION: Final = Struct("<IIQQQ")
"""kvm_userspace_memory_region: slot, flags, gpa, size, uaddr. Size 0 deletes."""
TRANSLATION: Final = Struct("<QQBBB5x")
"""kvm_translation: linear address; then physical address, valid, writeable, usermode."""
REGISTERS: Final = Struct("<18Q")
"""kvm_regs: rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags."""
SIGNAL_MASK: Final = Struct("<IQ")
"""kvm_signal_mask: length of the set, the set."""
SPECIAL_REGISTERS_SIZE: Final = 312

_GET_API_VERSION = _io(0x00)
_CREATE_VM = _io(0x01)
_CHECK_EXTENSION = _io(0x03)
_GET_VCPU_MMAP_SIZE = _io(0x04)
_CREATE_VCPU = _io(0x41)
_SET_USER_MEMORY_REGION = _iow(0x46, MEMORY_REGION.size)
_RUN = _io(0x80)
_GET_REGS = _ior(0x81, REGISTERS.size)
_SET_REGS = _iow(0x82, REGISTERS.size)
_GET_SREGS = _ior(0x83, SPECIAL_REGISTERS_SIZE)
_SET_SREGS = _iow(0x84, SPECIAL_REGISTERS_SIZE)
_TRANSLATE = _ior(0x85, TRANSLATION.size) | 1 << 30
_SET_SIGNAL_MASK = _iow(0x8B, 4)
_GET_STATS_FD = _io(0xCE)


def api_version(kvm: int) -> int:
    return fcntl.ioctl(kvm, _GET_API_VERSION, 0)


def check_extension(descriptor: int, capability: int) -> int:
    """0 where it is missing; for some capabilities the number that it stands for."""
    return fcntl.ioctl(descriptor, _CHECK_EXTENSION, capability)


def create_vm(kvm: int) -> int:
    return fcntl.ioctl(kvm, _CREATE_VM, 0)


def vcpu_mmap_size(kvm: int) -> int:
    return fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0)


def create_vcpu(vm: int, index: int) -> int:
    return fcntl.ioctl(vm, _CREATE_VCPU, index)


def set_user_memory_region(
    vm: int, *, slot: int, flags: int = 0, gpa: int = 0, size: int = 0, uaddr: int = 0
) -> None:
    """Returns when no vCPU uses the slot's old translations any more."""
    fcntl.ioctl(vm, _SET_USER_MEMORY_REGION, MEMORY_REGION.pack(slot, flags, gpa, size, uaddr))


def run(vcpu: int) -> None:
    """Run the guest until it exits; EINTR for a signal or `immediate_exit`."""
    fcntl.ioctl(vcpu, _RUN, 0)


def set_signal_mask(vcpu: int, blocked: Iterable[int]) -> None:
    """The signals that are blocked while the guest runs, instead of the thread's own mask."""
    mask = sum(1 << number - 1 for number in blocked)
    fcntl.ioctl(vcpu, _SET_SIGNAL_MASK, SIGNAL_MASK.pack(SIGNAL_MASK.size - 4, mask))


def get_registers(vcpu: int) -> tuple[int, ...]:
    data = bytearray(REGISTERS.size)
    fcntl.ioctl(vcpu, _GET_REGS, data)
    return REGISTERS.unpack(data)


def set_registers(vcpu: int, values: tuple[int, ...]) -> None:
    fcntl.ioctl(vcpu, _SET_REGS, REGISTERS.pack(*values))


def get_special_registers(vcpu: int) -> bytearray:
    data = bytearray(SPECIAL_REGISTERS_SIZE)
    fcntl.ioctl(vcpu, _GET_SREGS, data)
    return data


def set_special_registers(vcpu: int, data: bytearray) -> None:
    fcntl.ioctl(vcpu, _SET_SREGS, bytes(data))


def translate(vcpu: int, linear: int) -> int | None:
    """The gpa of a linear address under the vCPU's own page tables; None where they have nothing."""
    data = bytearray(TRANSLATION.pack(linear, 0, 0, 0, 0))
    fcntl.ioctl(vcpu, _TRANSLATE, data)
    _, gpa, valid, _, _ = TRANSLATION.unpack(data)
    return int(gpa) if valid else None


def stats_descriptor(vm_or_vcpu: int) -> int:
    """A descriptor of the binary statistics (Linux 5.14)."""
    return fcntl.ioctl(vm_or_vcpu, _GET_STATS_FD, 0)
