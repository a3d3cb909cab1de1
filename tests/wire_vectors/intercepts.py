"""Examples of intercept messages: every field, every offset, and what is served."""

from __future__ import annotations

import msgspec

from intercept_protocol import messages as m
from intercept_protocol.hv_message import (
    AccessType,
    Arm64MemoryIntercept,
    InterceptMessage,
    MemoryAccessInfo,
    MessageType,
    X64MemoryIntercept,
    build_memory_intercept,
    memory_access,
)
from intercept_protocol.memory_intercept import CacheType, Segment
from wire_vectors.forms import InterceptVector, Served, map_as_json

X64, ARM64 = m.Architecture.X86_64, m.Architecture.ARM64


def intercept_messages() -> list[InterceptVector]:
    translated = MemoryAccessInfo.GVA_VALID | MemoryAccessInfo.GVA_GPA_VALID
    x64 = X64MemoryIntercept(
        vp_index=3,
        instruction_length=3,
        cr8=0xA,
        access_type=AccessType.WRITE,
        execution_state=0x0015,
        cs_segment=Segment(base=0, limit=0xFFFFFFFF, selector=0x10, attributes=0xA09B),
        rip=0xFFFFFFFF81001234,
        rflags=0x10246,
        cache_type=CacheType.UNCACHED,
        instruction_byte_count=3,
        access_info=translated,
        tpr_priority=2,
        gva=0xFFFFC90000012F40,
        gpa=0xFEB00F40,
        instruction_bytes=bytes.fromhex("8907c3").ljust(16, b"\0"),
    )
    arm64 = Arm64MemoryIntercept(
        vp_index=3,
        instruction_length=4,
        access_type=AccessType.WRITE,
        execution_state=0x0001,
        pc=0xFFFF800008001234,
        cpsr=0x60400005,
        cache_type=CacheType.UNCACHED,
        instruction_byte_count=4,
        access_info=translated,
        instruction_bytes=bytes.fromhex("010000b9"),
        gva=0xFFFF80000A012F40,
        gpa=0x4010000F40,
        syndrome=0x93820046,
    )
    counted = bytes.fromhex("0000008050000000") + bytes(8)
    cases: list[tuple[str, m.Architecture, bytes]] = [
        ("every field of a write", X64, _message(MessageType.UNMAPPED_GPA, x64)),
        ("every field of a write", ARM64, _message(MessageType.UNMAPPED_GPA, arm64)),
        (
            "each payload byte is its offset in the message",
            X64,
            counted + bytes(range(16, 21)) + b"\x00" + bytes(range(22, 256)),
        ),
        (
            "each payload byte is its offset in the message",
            ARM64,
            counted + bytes(range(16, 21)) + b"\x00" + bytes(range(22, 256)),
        ),
    ]
    for architecture in m.Architecture:
        for name, message_type, access_type, gpa in (
            ("read of an unmapped gpa", MessageType.UNMAPPED_GPA, 0, 0xFEB00000),
            ("execute of an unmapped gpa", MessageType.UNMAPPED_GPA, 2, 0x7FFFF000),
            ("first touch of movable memory", MessageType.GPA_INTERCEPT, 1, 0x100000),
            ("the last byte there is", MessageType.UNMAPPED_GPA, 0, 2**64 - 1),
            ("unaccepted gpa: a memory intercept, but not served", MessageType.UNACCEPTED_GPA, 0, 0x1000),
            ("access type 3: not served", MessageType.UNMAPPED_GPA, 3, 0x1000),
            ("io port intercept: no memory", MessageType.X64_IO_PORT_INTERCEPT, 0, 0x1000),
            ("type without a name: no memory", 0x8001FFFF, 0, 0x1000),
        ):
            base = build_memory_intercept(
                gpa=gpa, access=AccessType.READ, architecture=architecture, message_type=message_type
            )
            cases.append((name, architecture, base[:21] + bytes([access_type]) + base[22:]))
    return [_intercept(*case) for case in cases]


def _message(message_type: int, intercept: X64MemoryIntercept | Arm64MemoryIntercept) -> bytes:
    return InterceptMessage.of_memory(message_type, intercept).build()


def _intercept(name: str, architecture: m.Architecture, raw: bytes) -> InterceptVector:
    message = InterceptMessage.parse(raw)
    memory = message.memory(architecture)
    kind, wanted = message.known_type, memory_access(raw, architecture)
    return InterceptVector(
        name=name,
        architecture=architecture,
        hex=raw.hex(),
        message_type=message.message_type,
        type_name=None if kind is None else kind.name,
        payload_size=message.payload_size,
        message_flags=message.message_flags,
        sender=message.sender,
        memory=None if memory is None else map_as_json(msgspec.to_builtins(memory, builtin_types=(bytes,))),
        served=None if wanted is None else Served(*wanted),
    )
