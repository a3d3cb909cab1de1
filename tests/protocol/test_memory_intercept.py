"""The two memory intercept layouts, byte by byte as the reference numbers them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol.memory_intercept import (
    AccessType,
    Arm64MemoryIntercept,
    CacheType,
    MemoryAccessInfo,
    Segment,
    X64MemoryIntercept,
)
from intercept_protocol.outcomes import Access

PAYLOAD = bytes(range(16, 256))
"""Each byte holds its own offset in the message, so a wrong offset shows as a wrong value."""


def at(offset: int, size: int) -> int:
    """What a little-endian field at this offset of the message holds in `PAYLOAD`."""
    return int.from_bytes(bytes(range(offset, offset + size)), "little")


def test_x64_fields_lie_at_their_literal_offsets() -> None:
    assert X64MemoryIntercept.parse(PAYLOAD) == X64MemoryIntercept(
        vp_index=at(16, 4),
        instruction_length=20 & 0x0F,
        cr8=20 >> 4,
        access_type=21,
        execution_state=at(22, 2),
        cs_segment=Segment(base=at(24, 8), limit=at(32, 4), selector=at(36, 2), attributes=at(38, 2)),
        rip=at(40, 8),
        rflags=at(48, 8),
        cache_type=at(56, 4),
        instruction_byte_count=60,
        access_info=MemoryAccessInfo(61),
        tpr_priority=62,
        reserved1=63,
        gva=at(64, 8),
        gpa=at(72, 8),
        instruction_bytes=bytes(range(80, 96)),
    )


def test_arm64_fields_lie_at_their_literal_offsets() -> None:
    assert Arm64MemoryIntercept.parse(PAYLOAD) == Arm64MemoryIntercept(
        vp_index=at(16, 4),
        instruction_length=20,
        access_type=21,
        execution_state=at(22, 2),
        pc=at(24, 8),
        cpsr=at(32, 8),
        cache_type=at(40, 4),
        instruction_byte_count=44,
        access_info=MemoryAccessInfo(45),
        reserved1=at(46, 2),
        instruction_bytes=bytes(range(48, 52)),
        reserved2=at(52, 4),
        gva=at(56, 8),
        gpa=at(64, 8),
        syndrome=at(72, 8),
    )


@given(st.binary(min_size=80, max_size=80))
def test_x64_any_80_bytes_survive_parse_and_build(payload: bytes) -> None:
    assert X64MemoryIntercept.parse(payload).build() == payload


@given(st.binary(min_size=64, max_size=64))
def test_arm64_any_64_bytes_survive_parse_and_build(payload: bytes) -> None:
    assert Arm64MemoryIntercept.parse(payload).build() == payload


def test_x64_length_is_the_low_nibble_and_cr8_the_high_one() -> None:
    intercept = X64MemoryIntercept(access_type=0, gpa=0, instruction_length=3, cr8=0xA)

    assert intercept.build()[4] == 0xA3


@pytest.mark.parametrize(("name", "value"), [("instruction_length", 16), ("cr8", 16), ("cr8", -1)])
def test_x64_build_refuses_more_than_a_nibble(name: str, value: int) -> None:
    intercept = msgspec.structs.replace(X64MemoryIntercept(access_type=0, gpa=0), **{name: value})

    with pytest.raises(ValueError, match=f"{name} has 4 bits"):
        intercept.build()


@pytest.mark.parametrize("size", [15, 17])
def test_x64_build_refuses_other_than_16_instruction_bytes(size: int) -> None:
    with pytest.raises(ValueError, match=f"expected 16 bytes, got {size}"):
        X64MemoryIntercept(access_type=0, gpa=0, instruction_bytes=bytes(size)).build()


@pytest.mark.parametrize("size", [3, 5])
def test_arm64_build_refuses_other_than_4_instruction_bytes(size: int) -> None:
    with pytest.raises(ValueError, match=f"expected 4 bytes, got {size}"):
        Arm64MemoryIntercept(access_type=0, gpa=0, instruction_bytes=bytes(size)).build()


def test_access_info_keeps_reserved_bits() -> None:
    payload = bytearray(80)
    payload[45] = 0xF3

    info = X64MemoryIntercept.parse(bytes(payload)).access_info

    assert info & MemoryAccessInfo.GVA_GPA_VALID
    assert int(info) == 0xF3


@pytest.mark.parametrize(
    ("flag", "bit"),
    [
        (MemoryAccessInfo.GVA_VALID, 0x01),
        (MemoryAccessInfo.GVA_GPA_VALID, 0x02),
        (MemoryAccessInfo.HYPERCALL_OUTPUT_PENDING, 0x04),
        (MemoryAccessInfo.TLB_LOCKED_NO_OVERLAY, 0x08),
    ],
)
def test_access_info_flag_is_the_bit_of_the_headers(flag: MemoryAccessInfo, bit: int) -> None:
    assert flag == bit


@pytest.mark.parametrize(
    ("access_type", "access"),
    [
        (AccessType.READ, Access.READ),
        (AccessType.WRITE, Access.WRITE),
        (AccessType.EXECUTE, Access.EXECUTE),
    ],
)
def test_access_type_and_right_convert_both_ways(access_type: AccessType, access: Access) -> None:
    assert access_type.access is access
    assert AccessType.wanting(access) is access_type


def test_cache_types_are_the_numbers_of_the_headers() -> None:
    assert [(kind.name, kind.value) for kind in CacheType] == [
        ("UNCACHED", 0),
        ("WRITE_COMBINING", 1),
        ("WRITE_THROUGH", 4),
        ("WRITE_PROTECTED", 5),
        ("WRITE_BACK", 6),
    ]
