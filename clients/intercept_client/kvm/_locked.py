"""Locked instructions whose memory is mapped or unmapped while they run.

KVM makes a locked access to unmapped memory a read exit and then a write exit. With the page mapped in
between, KVM itself stores by compare-and-exchange; if it was taken away again, the write that reaches us is
made of an old value, and to store it would undo what another vCPU stored meanwhile. So that write is dropped,
and the instruction run again from its start.

Owns recognising that write; must not know how accesses are carried out, nor how a vCPU is reset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ._exits import MmioRead, MmioWrite

_LOCK: Final = 0xF0
_PREFIXES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF2, 0xF3))
_REX: Final = range(0x40, 0x50)
"""In 32-bit code one-byte increments, which touch no memory: they never exit."""
_XCHG: Final = frozenset((0x86, 0x87))
"""Locked with memory, with or without the prefix."""


CodeReader = Callable[[tuple[int, ...]], bytes]
"""The bytes at the program counter of these registers: an instruction's worth, or as many as can be read."""


def is_second_half(read: MmioRead, write: MmioWrite, code: bytes) -> bool:
    """Whether `write`, which `code` made after `read`, is made of what was read, as one."""
    return read == MmioRead(write.gpa, len(write.data)) and is_locked(code)


def is_locked(code: bytes) -> bool:
    """Whether the instruction at the start of `code` reads and writes its memory as one."""
    for byte in code:
        if byte == _LOCK:
            return True
        if byte not in _PREFIXES and byte not in _REX:
            return byte in _XCHG
    return False
