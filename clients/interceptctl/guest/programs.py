"""Guest programs: their source, and the bytes it assembles to.

Owns the programs; must not know who runs them. Position-independent 32-bit code in flat memory
(`kvm.registers`), without a stack; arguments come in registers. No assembler is needed to run them; a test
checks that source and bytes agree if there is one: `as --32` with `.intel_syntax noprefix` and `.code32`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

REPORT_PORT: Final = 0x10
"""The port on which programs report values to the host."""


@dataclass(frozen=True, slots=True)
class Program:
    name: str
    does: str
    source: str
    code: bytes


SWEEP: Final = Program(
    "sweep",
    "adds 1 to the first word of each of ecx pages from esi on, ebx times; reports after each round",
    """
next_round:
    mov   edi, esi
    mov   eax, ecx
next_page:
    inc   dword ptr [edi]
    add   edi, 4096
    dec   eax
    jnz   next_page
    out   0x10, al
    dec   ebx
    jnz   next_round
    hlt
""",
    bytes.fromhex("89f7 89c8 ff07 81c700100000 48 75f5 e610 4b 75ec f4"),
)

COUNT: Final = Program(
    "count",
    "adds 1 to the word at esi, locked, ecx times",
    """
next:
    lock inc dword ptr [esi]
    dec   ecx
    jnz   next
    hlt
""",
    bytes.fromhex("f0ff06 49 75fa f4"),
)

COUNT_ON: Final = Program(
    "count on",
    "adds 1 to the word at esi, forever",
    """
next:
    inc   dword ptr [esi]
    jmp   next
""",
    bytes.fromhex("ff06 ebfc"),
)

PATTERN: Final = Program(
    "pattern",
    "writes each word's own address from esi to edx; then 1 and 2 bytes, and 4 and 8 across a page boundary",
    """
    mov   edi, esi
next_word:
    mov   [edi], edi
    add   edi, 4
    cmp   edi, edx
    jb    next_word
    mov   byte ptr [esi + 1], 0x11
    mov   word ptr [esi + 2], 0x2222
    mov   dword ptr [esi + 4094], 0x44434241
    movq  mm0, [esi + 8]
    movq  [esi + 8188], mm0
    hlt
""",
    bytes.fromhex(
        "89f7 893f 83c704 39d7 72f7 c6460111 66c746022222 c786fe0f000041424344 0f6f4608 0f7f86fc1f0000 f4"
    ),
)

WATCH: Final = Program(
    "watch",
    "reports the word at esi, forever",
    """
next:
    mov   eax, [esi]
    out   0x10, eax
    jmp   next
""",
    bytes.fromhex("8b06 e710 ebfa"),
)

STORE: Final = Program(
    "store",
    "writes ebx to the word at esi, reads it back and reports it",
    """
    mov   [esi], ebx
    mov   eax, [esi]
    out   0x10, eax
    hlt
""",
    bytes.fromhex("891e 8b06 e710 f4"),
)

COPY: Final = Program(
    "copy",
    "copies 8 bytes from esi to edi in one access each",
    """
    movq  mm0, [esi]
    movq  [edi], mm0
    hlt
""",
    bytes.fromhex("0f6f06 0f7f07 f4"),
)

JUMP: Final = Program(
    "jump",
    "jumps to esi",
    """
    jmp   esi
""",
    bytes.fromhex("ffe6"),
)

TRIPLE_FAULT: Final = Program(
    "triple fault",
    "raises an exception without a handler",
    """
    ud2
""",
    bytes.fromhex("0f0b"),
)

PROGRAMS: Final = (SWEEP, COUNT, COUNT_ON, PATTERN, WATCH, STORE, COPY, JUMP, TRIPLE_FAULT)
