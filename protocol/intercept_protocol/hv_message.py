"""The hypervisor's 256-byte intercept message, byte for byte, on x86-64 and arm64.

Owns the header of a message (Hyper-V's hv_message), its types, and the gfn and access that the daemon reads
from one. Must not know regions or how an intercept is answered. Unknown types and reserved bytes survive a
round trip.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import IntEnum
from struct import Struct
from typing import ClassVar, Self

import msgspec

from .addresses import PAGE_SHIFT
from .memory_intercept import (
    AccessType,
    Arm64MemoryIntercept,
    CacheType,
    MemoryAccessInfo,
    MemoryIntercept,
    X64MemoryIntercept,
    exactly,
    pack,
)
from .messages import Architecture
from .outcomes import Access

__all__ = [
    "FAULT_LAYOUTS",
    "MEMORY_INTERCEPTS",
    "MESSAGE_SIZE",
    "PAYLOAD_SIZE",
    "AccessType",
    "Arm64MemoryIntercept",
    "CacheType",
    "InterceptMessage",
    "MemoryAccess",
    "MemoryAccessInfo",
    "MemoryIntercept",
    "MessageType",
    "X64MemoryIntercept",
    "access_wanted",
    "build_memory_intercept",
    "memory_access",
]

MESSAGE_SIZE = 256
PAYLOAD_SIZE = 240
"""HV_MESSAGE_PAYLOAD_BYTE_COUNT: the bytes after the 16-byte header."""


class MessageType(IntEnum):
    """HVMSG_*: why the VP stopped."""

    NONE = 0x00000000
    UNMAPPED_GPA = 0x80000000
    GPA_INTERCEPT = 0x80000001
    UNACCEPTED_GPA = 0x80000003
    GPA_ATTRIBUTE_INTERCEPT = 0x80000004
    TIMER_EXPIRED = 0x80000010
    INVALID_VP_REGISTER_VALUE = 0x80000020
    UNRECOVERABLE_EXCEPTION = 0x80000021
    UNSUPPORTED_FEATURE = 0x80000022
    OPAQUE_INTERCEPT = 0x8000003F
    EVENTLOG_BUFFERCOMPLETE = 0x80000040
    HYPERCALL_INTERCEPT = 0x80000050
    SYNIC_EVENT_INTERCEPT = 0x80000060
    SYNIC_SINT_INTERCEPT = 0x80000061
    SYNIC_SINT_DELIVERABLE = 0x80000062
    ASYNC_CALL_COMPLETION = 0x80000070
    SCHEDULER_VP_SIGNAL_BITSET = 0x80000100
    SCHEDULER_VP_SIGNAL_PAIR = 0x80000101
    X64_IO_PORT_INTERCEPT = 0x80010000
    X64_MSR_INTERCEPT = 0x80010001
    X64_CPUID_INTERCEPT = 0x80010002
    X64_EXCEPTION_INTERCEPT = 0x80010003
    X64_APIC_EOI = 0x80010004
    X64_LEGACY_FP_ERROR = 0x80010005
    X64_IOMMU_PRQ = 0x80010006
    X64_HALT = 0x80010007
    X64_INTERRUPTION_DELIVERABLE = 0x80010008
    X64_SIPI_INTERCEPT = 0x80010009
    ARM64_RESET_INTERCEPT = 0x8001000C
    X64_SEV_VMGEXIT_INTERCEPT = 0x80010013


MEMORY_INTERCEPTS = frozenset(
    {MessageType.UNMAPPED_GPA, MessageType.GPA_INTERCEPT, MessageType.UNACCEPTED_GPA}
)
"""The types whose payload is a memory intercept. The daemon cannot resolve UNACCEPTED_GPA."""


class InterceptMessage(msgspec.Struct, frozen=True, kw_only=True):
    """hv_message: all 256 bytes, with the payload as received."""

    LAYOUT: ClassVar[Struct] = Struct(f"<IBB2sQ{PAYLOAD_SIZE}s")

    message_type: int
    payload_size: int
    message_flags: int = 0
    reserved: bytes = bytes(2)
    sender: int = 0
    payload: bytes

    @classmethod
    def parse(cls, message: bytes) -> Self:
        if len(message) != MESSAGE_SIZE:
            raise _wrong_size(message)
        message_type, payload_size, flags, reserved, sender, payload = cls.LAYOUT.unpack(message)
        return cls(
            message_type=message_type,
            payload_size=payload_size,
            message_flags=flags,
            reserved=reserved,
            sender=sender,
            payload=payload,
        )

    @classmethod
    def of_memory(cls, message_type: int, intercept: MemoryIntercept) -> Self:
        """The message as the hypervisor sends it: the intercept, padded with zeroes."""
        body = intercept.build()
        return cls(message_type=message_type, payload_size=len(body), payload=body.ljust(PAYLOAD_SIZE, b"\0"))

    def build(self) -> bytes:
        """The 256 bytes. Raises ValueError if a field does not fit."""
        return pack(
            self.LAYOUT,
            self.message_type,
            self.payload_size,
            self.message_flags,
            exactly(2, self.reserved),
            self.sender,
            exactly(PAYLOAD_SIZE, self.payload),
        )

    @property
    def known_type(self) -> MessageType | None:
        """The type; None for a number that this version does not know."""
        try:
            return MessageType(self.message_type)
        except ValueError:
            return None

    def memory(self, architecture: Architecture) -> MemoryIntercept | None:
        """The memory intercept in the payload; None if the type has none."""
        if self.message_type not in MEMORY_INTERCEPTS:
            return None
        return _MEMORY_FORMS[architecture].parse(self.payload)


_MEMORY_FORMS: Mapping[Architecture, type[MemoryIntercept]] = {
    Architecture.X86_64: X64MemoryIntercept,
    Architecture.ARM64: Arm64MemoryIntercept,
}
FAULT_LAYOUTS: Mapping[Architecture, str] = {
    Architecture.X86_64: "<I17xB50xQ176x",
    Architecture.ARM64: "<I17xB42xQ184x",
}
"""`struct` layouts of all that is read: the message type (byte 0), the access type (byte 21) and the gpa."""
MemoryAccess = tuple[int, Access]
"""The gfn, and the one right that the guest needs."""
_SERVED = frozenset({int(MessageType.UNMAPPED_GPA), int(MessageType.GPA_INTERCEPT)})
_WANTED = tuple(kind.access for kind in AccessType)
_LAST_ACCESS_TYPE = len(_WANTED) - 1


def memory_access(message: bytes, architecture: Architecture) -> MemoryAccess | None:
    """The gfn and the one right that a fault needs; None if it is not a memory fault.

    Ignores gva_gpa_valid, which is about the gva, and vp_index: the connection determines the VP. Raises
    ValueError unless `message` has 256 bytes.
    """
    if len(message) != MESSAGE_SIZE:
        raise _wrong_size(message)
    return access_wanted(*struct.unpack(FAULT_LAYOUTS[architecture], message))


def access_wanted(message_type: int, access_type: int, gpa: int) -> MemoryAccess | None:
    """`memory_access` from the three numbers of `FAULT_LAYOUTS`. Hot path: no enum look-ups."""
    if message_type not in _SERVED or access_type > _LAST_ACCESS_TYPE:
        return None
    return gpa >> PAGE_SHIFT, _WANTED[access_type]


def build_memory_intercept(
    *,
    gpa: int,
    access: Access | AccessType,
    architecture: Architecture = Architecture.X86_64,
    message_type: int = MessageType.UNMAPPED_GPA,
    gva: int | None = None,
    vp_index: int = 0,
    instruction_pointer: int = 0,
    instruction: bytes = b"",
    cache_type: int = CacheType.WRITE_BACK,
) -> bytes:
    """The 256 bytes that the hypervisor would send for one access; for VMMs on other hypervisors, and fakes.

    `access` is one right, or the access type that needs it. With a `gva`, the message says that `gpa` is its
    translation. Raises ValueError if a value does not fit.
    """
    access_type = access if isinstance(access, AccessType) else AccessType.wanting(access)
    translated = MemoryAccessInfo.GVA_VALID | MemoryAccessInfo.GVA_GPA_VALID
    access_info = MemoryAccessInfo.NONE if gva is None else translated
    intercept: MemoryIntercept
    if architecture is Architecture.X86_64:
        intercept = X64MemoryIntercept(
            vp_index=vp_index,
            instruction_length=len(instruction),
            access_type=access_type,
            rip=instruction_pointer,
            cache_type=cache_type,
            instruction_byte_count=len(instruction),
            access_info=access_info,
            gva=gva or 0,
            gpa=gpa,
            instruction_bytes=instruction.ljust(16, b"\0"),
        )
    else:
        intercept = Arm64MemoryIntercept(
            vp_index=vp_index,
            instruction_length=len(instruction),
            access_type=access_type,
            pc=instruction_pointer,
            cache_type=cache_type,
            instruction_byte_count=len(instruction),
            access_info=access_info,
            instruction_bytes=instruction.ljust(4, b"\0"),
            gva=gva or 0,
            gpa=gpa,
        )
    return InterceptMessage.of_memory(message_type, intercept).build()


def _wrong_size(message: bytes) -> ValueError:
    return ValueError(f"a hypervisor message has {MESSAGE_SIZE} bytes, got {len(message)}")
