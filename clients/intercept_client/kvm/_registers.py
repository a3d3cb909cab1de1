"""The state that a guest program starts in: 32-bit protected mode, flat, no paging.

Owns the special registers' layout (kvm_sregs); must not know programs. Nothing that the CPU reads by itself
is in memory: no page tables, and no descriptor tables until the program loads some. So every byte of a
guest's memory may start unmapped, and every exception is a triple fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Final

_SEGMENT: Final = Struct("<QIHBBBBBBBBBB")
"""base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding."""
_CODE_SELECTOR, _DATA_SELECTOR = 8, 16
_CODE_TYPE, _DATA_TYPE = 0xB, 3
"""Execute and read, read and write; both accessed."""
_SEGMENTS: Final = 6
"""cs ds es fs gs ss, in this order at offset 0."""
_CR0_AT: Final = 8 * _SEGMENT.size + 2 * 16
"""Behind tr, ldt, gdt and idt."""
_U64: Final = Struct("<Q")
_CR0_PROTECTION: Final = 1
RFLAGS_RESERVED: Final = 2


class Register(IntEnum):
    """The general registers, by their index in kvm_regs."""

    EAX = 0
    EBX = 1
    ECX = 2
    EDX = 3
    ESI = 4
    EDI = 5
    ESP = 6
    EBP = 7
    RIP = 16
    RFLAGS = 17


REGISTER_COUNT: Final = 18


@dataclass(frozen=True, slots=True)
class StartState:
    """Where a vCPU starts, and the initial values of its registers; all others are 0."""

    entry: int
    registers: tuple[tuple[Register, int], ...] = ()

    def general(self) -> tuple[int, ...]:
        """As kvm_regs."""
        values = [0] * REGISTER_COUNT
        for register, value in self.registers:
            values[register] = value
        values[Register.RIP] = self.entry
        values[Register.RFLAGS] = RFLAGS_RESERVED
        return tuple(values)


def make_flat(special: bytearray) -> None:
    """Turn the special registers of a fresh vCPU into flat 32-bit protected mode."""
    _SEGMENT.pack_into(special, 0, *_flat(_CODE_SELECTOR, _CODE_TYPE))
    for index in range(1, _SEGMENTS):
        _SEGMENT.pack_into(special, index * _SEGMENT.size, *_flat(_DATA_SELECTOR, _DATA_TYPE))
    (cr0,) = _U64.unpack_from(special, _CR0_AT)
    _U64.pack_into(special, _CR0_AT, cr0 | _CR0_PROTECTION)


def code_base(special: bytearray) -> int:
    """The base of cs: what turns rip into a linear address."""
    (base,) = _U64.unpack_from(special, 0)
    return int(base)


def _flat(selector: int, type_: int) -> tuple[int, ...]:
    return (0, 0xFFFF_FFFF, selector, type_, 1, 0, 1, 1, 0, 1, 0, 0, 0)
