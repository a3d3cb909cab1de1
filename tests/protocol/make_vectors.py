"""Write `protocol/vectors/`: examples of the wire that a client in any language can be tested with.

Owns the intercept messages, the responses and the files; the other examples are its neighbours'. Run it to
write the files, with `--check` to compare them instead. What they mean is in `protocol/README.md`.
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import msgspec
from vector_events import told
from vector_refusals import malformed, refused, refused_hellos
from vector_requests import as_json, methods

from intercept_protocol import messages as m
from intercept_protocol import rpc
from intercept_protocol.errors import WireError
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
from intercept_protocol.outcomes import Answer

DIRECTORY = Path(__file__).parents[2] / "protocol" / "vectors"
X64, ARM64 = m.Architecture.X86_64, m.Architecture.ARM64


# ---------------------------------------------------------------- intercept messages


def intercept_messages() -> list[object]:
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


def _intercept(name: str, architecture: m.Architecture, raw: bytes) -> object:
    message = InterceptMessage.parse(raw)
    memory = message.memory(architecture)
    wanted = memory_access(raw, architecture)
    return {
        "name": name,
        "architecture": architecture,
        "hex": raw.hex(),
        "message_type": message.message_type,
        "type_name": message.known_type and message.known_type.name,
        "payload_size": message.payload_size,
        "message_flags": message.message_flags,
        "sender": message.sender,
        "memory": memory and as_json(msgspec.to_builtins(memory, builtin_types=(bytes,))),
        "served": wanted and {"gfn": wanted[0], "access": wanted[1]},
    }


# ---------------------------------------------------------------- responses


def responses() -> list[object]:
    answers = [
        {"msgid": 7, "hex": rpc.encode_result(7, list(answer.value)).hex(), "result": list(answer.value)}
        for answer in Answer
    ]
    errors = [
        WireError(
            errno.EEXIST, "region [0x100, 0x200) overlaps [0x180, 0x280)", start_gfn=0x180, page_count=0x100
        ),
        WireError(errno.ENOENT, "no region starts at gfn 0x100", start_gfn=0x100),
        WireError(errno.EINVAL, "translate: gfn: is missing", field="gfn"),
        WireError(errno.ENOSPC, "a partition may have 64 regions", limit="regions_per_partition"),
        WireError(errno.EACCES, "no such partition, or not its token"),
    ]
    return answers + [
        {"msgid": 7, "hex": rpc.encode_error(7, error).hex(), "error": error.to_wire()} for error in errors
    ]


VECTORS = {
    "intercept_messages.json": intercept_messages,
    "methods.json": methods,
    "responses.json": responses,
    "events.json": told,
    "refused.json": refused,
    "refused_hellos.json": refused_hellos,
    "malformed.json": malformed,
}


def main(check: bool) -> int:
    """Write the files, or say with the exit status whether they are as this program would write them."""
    stale = []
    for name, make in VECTORS.items():
        text = json.dumps(make(), indent=1) + "\n"
        path = DIRECTORY / name
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.stderr.write(f"stale: {', '.join(stale)}; run {Path(__file__).name}\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
