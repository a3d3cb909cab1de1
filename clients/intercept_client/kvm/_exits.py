"""Why KVM_RUN returned.

Owns the exits that this VMM distinguishes, and their layout in the kvm_run page; must not know how they are
handled.
"""

from __future__ import annotations

from dataclasses import dataclass
from mmap import mmap
from struct import Struct
from typing import Final

_EXIT_REASON: Final = Struct("<8xI")
_PAYLOAD: Final = 32
"""Where the exit's own structure starts in kvm_run."""
_MMIO: Final = Struct("<Q8sIB")
"""phys_addr, data, len, is_write."""
MMIO_DATA_AT: Final = _PAYLOAD + 8
_PORT: Final = Struct("<BBHIQ")
"""direction, size, port, count, data_offset."""
_INTERNAL: Final = Struct("<I")
_ENTRY_FAILURE: Final = Struct("<Q")
_MEMORY_FAULT: Final = Struct("<QQQ")
"""flags, gpa, size."""

_PORT_OUT: Final = 1
_MEMORY_FAULT_EXIT: Final = 39
_SUBERROR_EMULATION: Final = 1


RunPage = mmap | bytearray
"""The kvm_run page of a vCPU; a bytearray in tests."""


@dataclass(frozen=True, slots=True)
class MmioRead:
    """The guest waits for `size` bytes from `gpa`, at most 8 and within one page on x86-64."""

    gpa: int
    size: int


@dataclass(frozen=True, slots=True)
class MmioWrite:
    """The guest wrote, and its instruction is complete."""

    gpa: int
    data: bytes


@dataclass(frozen=True, slots=True)
class PortRead:
    port: int
    size: int
    count: int
    data_at: int
    """Where in kvm_run the answer goes."""


@dataclass(frozen=True, slots=True)
class PortWrite:
    port: int
    size: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Halted:
    pass


@dataclass(frozen=True, slots=True)
class Shutdown:
    """A triple fault."""


@dataclass(frozen=True, slots=True)
class NotEmulated:
    """KVM_INTERNAL_ERROR_EMULATION, with the program counter unchanged: the instruction could not be
    fetched, or KVM does not know it."""


@dataclass(frozen=True, slots=True)
class HostFault:
    """KVM_RUN was -EFAULT: the memory behind a memslot faults. `gpa` is None where the kernel does not say
    (before KVM_CAP_MEMORY_FAULT_INFO)."""

    gpa: int | None


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A signal, or a kick."""


@dataclass(frozen=True, slots=True)
class Broken:
    """KVM cannot go on; `why` says what it reported."""

    why: str


Exit = (
    MmioRead
    | MmioWrite
    | PortRead
    | PortWrite
    | Halted
    | Shutdown
    | NotEmulated
    | HostFault
    | Interrupted
    | Broken
)


def read_exit(run_page: RunPage) -> Exit:
    """Decode the kvm_run page after KVM_RUN succeeded."""
    (reason,) = _EXIT_REASON.unpack_from(run_page)
    match reason:
        case 6:  # KVM_EXIT_MMIO
            gpa, data, size, is_write = _MMIO.unpack_from(run_page, _PAYLOAD)
            return MmioWrite(gpa, data[:size]) if is_write else MmioRead(gpa, size)
        case 2:  # KVM_EXIT_IO
            direction, size, port, count, data_at = _PORT.unpack_from(run_page, _PAYLOAD)
            if direction == _PORT_OUT:
                return PortWrite(port, size, bytes(run_page[data_at : data_at + size * count]))
            return PortRead(port, size, count, data_at)
        case 5:  # KVM_EXIT_HLT
            return Halted()
        case 8:  # KVM_EXIT_SHUTDOWN
            return Shutdown()
        case 17:  # KVM_EXIT_INTERNAL_ERROR
            (suberror,) = _INTERNAL.unpack_from(run_page, _PAYLOAD)
            return NotEmulated() if suberror == _SUBERROR_EMULATION else Broken(f"internal error {suberror}")
        case 9:  # KVM_EXIT_FAIL_ENTRY
            (why,) = _ENTRY_FAILURE.unpack_from(run_page, _PAYLOAD)
            return Broken(f"entry failed: {why:#x}")
        case _:
            return Broken(f"exit reason {reason}")


def read_host_fault(run_page: RunPage) -> HostFault:
    """Decode the kvm_run page after KVM_RUN was -EFAULT."""
    (reason,) = _EXIT_REASON.unpack_from(run_page)
    if reason != _MEMORY_FAULT_EXIT:
        return HostFault(None)
    _, gpa, _ = _MEMORY_FAULT.unpack_from(run_page, _PAYLOAD)
    return HostFault(gpa)
