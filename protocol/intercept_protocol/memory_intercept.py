"""The memory intercept: a payload of a hypervisor message, on x86-64 and arm64.

Owns the two layouts (Hyper-V's hv_x64_memory_intercept_message and its arm64 counterpart: little endian,
packed) and the enumerations in them. Must not know the message around them. Unknown values and reserved bits
survive a round trip.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from struct import error as StructError
from typing import ClassVar, Self

import msgspec

from .outcomes import Access


class AccessType(IntEnum):
    """hv_intercept_access_type: what the guest tried. Not the encoding of `Access`."""

    READ = 0
    WRITE = 1
    EXECUTE = 2

    @property
    def access(self) -> Access:
        """The one right that this access needs: the access type is the number of its bit."""
        return Access(1 << self)

    @classmethod
    def wanting(cls, access: Access) -> AccessType:
        """The access type that needs exactly this one right. Raises ValueError for none or several."""
        for kind in cls:
            if kind.access == access:
                return kind
        raise ValueError(f"an access type is one right, got {access!r}")


class CacheType(IntEnum):
    """hv_cache_type."""

    UNCACHED = 0
    WRITE_COMBINING = 1
    WRITE_THROUGH = 4
    WRITE_PROTECTED = 5
    """x86-64 only."""
    WRITE_BACK = 6


class MemoryAccessInfo(IntFlag):
    """The access-info byte of a memory intercept. No bit says whether the gpa itself is valid."""

    NONE = 0x00
    GVA_VALID = 0x01
    GVA_GPA_VALID = 0x02
    """The gpa is the translation of the gva. Not set for page-table walks, whose gpa is valid too."""
    HYPERCALL_OUTPUT_PENDING = 0x04
    TLB_LOCKED_NO_OVERLAY = 0x08
    """x86-64 only; reserved on arm64."""


class Segment(msgspec.Struct, frozen=True):
    """hv_x64_segment_register."""

    base: int = 0
    limit: int = 0
    selector: int = 0
    attributes: int = 0


class X64MemoryIntercept(msgspec.Struct, frozen=True, kw_only=True):
    """hv_x64_memory_intercept_message: message bytes 16 to 95."""

    LAYOUT: ClassVar[Struct] = Struct("<IBBHQIHHQQIBBBBQQ16s")

    vp_index: int = 0
    instruction_length: int = 0
    cr8: int = 0
    access_type: int
    execution_state: int = 0
    cs_segment: Segment = Segment()
    rip: int = 0
    rflags: int = 0
    cache_type: int = CacheType.WRITE_BACK
    instruction_byte_count: int = 0
    access_info: MemoryAccessInfo = MemoryAccessInfo.NONE
    tpr_priority: int = 0
    reserved1: int = 0
    gva: int = 0
    gpa: int
    instruction_bytes: bytes = bytes(16)

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Read the first 80 bytes of a payload."""
        (
            vp_index, length_and_cr8, access_type, execution_state,
            base, limit, selector, attributes, rip, rflags,
            cache_type, byte_count, access_info, tpr_priority, reserved1, gva, gpa, instruction_bytes,
        ) = cls.LAYOUT.unpack_from(payload)  # fmt: skip
        return cls(
            vp_index=vp_index,
            instruction_length=length_and_cr8 & 0x0F,
            cr8=length_and_cr8 >> 4,
            access_type=access_type,
            execution_state=execution_state,
            cs_segment=Segment(base, limit, selector, attributes),
            rip=rip,
            rflags=rflags,
            cache_type=cache_type,
            instruction_byte_count=byte_count,
            access_info=MemoryAccessInfo(access_info),
            tpr_priority=tpr_priority,
            reserved1=reserved1,
            gva=gva,
            gpa=gpa,
            instruction_bytes=instruction_bytes,
        )

    def build(self) -> bytes:
        """The 80 bytes. Raises ValueError if a field does not fit."""
        length_and_cr8 = (
            _nibble("instruction_length", self.instruction_length) | _nibble("cr8", self.cr8) << 4
        )
        segment = self.cs_segment
        return pack(
            self.LAYOUT,
            self.vp_index, length_and_cr8, self.access_type, self.execution_state,
            segment.base, segment.limit, segment.selector, segment.attributes, self.rip, self.rflags,
            self.cache_type, self.instruction_byte_count, self.access_info, self.tpr_priority, self.reserved1,
            self.gva, self.gpa, exactly(16, self.instruction_bytes),
        )  # fmt: skip


class Arm64MemoryIntercept(msgspec.Struct, frozen=True, kw_only=True):
    """hv_arm64_memory_intercept_message: message bytes 16 to 79."""

    LAYOUT: ClassVar[Struct] = Struct("<IBBHQQIBBH4sIQQQ")

    vp_index: int = 0
    instruction_length: int = 0
    access_type: int
    execution_state: int = 0
    pc: int = 0
    cpsr: int = 0
    cache_type: int = CacheType.WRITE_BACK
    instruction_byte_count: int = 0
    access_info: MemoryAccessInfo = MemoryAccessInfo.NONE
    reserved1: int = 0
    instruction_bytes: bytes = bytes(4)
    reserved2: int = 0
    gva: int = 0
    gpa: int
    syndrome: int = 0

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Read the first 64 bytes of a payload."""
        (
            vp_index, instruction_length, access_type, execution_state, pc, cpsr,
            cache_type, byte_count, access_info, reserved1, instruction_bytes, reserved2, gva, gpa, syndrome,
        ) = cls.LAYOUT.unpack_from(payload)  # fmt: skip
        return cls(
            vp_index=vp_index,
            instruction_length=instruction_length,
            access_type=access_type,
            execution_state=execution_state,
            pc=pc,
            cpsr=cpsr,
            cache_type=cache_type,
            instruction_byte_count=byte_count,
            access_info=MemoryAccessInfo(access_info),
            reserved1=reserved1,
            instruction_bytes=instruction_bytes,
            reserved2=reserved2,
            gva=gva,
            gpa=gpa,
            syndrome=syndrome,
        )

    def build(self) -> bytes:
        """The 64 bytes. Raises ValueError if a field does not fit."""
        return pack(
            self.LAYOUT,
            self.vp_index, self.instruction_length, self.access_type, self.execution_state,
            self.pc, self.cpsr,
            self.cache_type, self.instruction_byte_count, self.access_info, self.reserved1,
            exactly(4, self.instruction_bytes), self.reserved2, self.gva, self.gpa, self.syndrome,
        )  # fmt: skip


MemoryIntercept = X64MemoryIntercept | Arm64MemoryIntercept


def pack(layout: Struct, *values: int | bytes) -> bytes:
    """`layout.pack`, but raises ValueError for a value that does not fit."""
    try:
        return layout.pack(*values)
    except StructError as error:
        raise ValueError(f"a field does not fit: {error}") from error


def exactly(size: int, value: bytes) -> bytes:
    """`value`, if it has `size` bytes; else ValueError. `struct` would silently truncate or pad it."""
    if len(value) != size:
        raise ValueError(f"expected {size} bytes, got {len(value)}")
    return value


def _nibble(name: str, value: int) -> int:
    if not 0 <= value <= 0x0F:
        raise ValueError(f"{name} has 4 bits, got {value}")
    return value
