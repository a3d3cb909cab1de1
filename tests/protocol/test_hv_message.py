"""The 256-byte message against the literal byte positions of Hyper-V's headers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol.hv_message import (
    MEMORY_INTERCEPTS,
    AccessType,
    InterceptMessage,
    MessageType,
    build_memory_intercept,
    memory_access,
)
from intercept_protocol.messages import Architecture
from intercept_protocol.outcomes import Access

X64 = Architecture.X86_64
ARM64 = Architecture.ARM64
GPA_OFFSET = {X64: 72, ARM64: 64}

architectures = st.sampled_from(Architecture)
gpas = st.integers(0, 2**64 - 1)


def raw(*placed: tuple[int, bytes]) -> bytes:
    """256 bytes, all 0xEE but for what is placed at an offset."""
    message = bytearray(b"\xee" * 256)
    for offset, value in placed:
        message[offset : offset + len(value)] = value
    return bytes(message)


def fault(architecture: Architecture, message_type: int, access_type: int, gpa: int) -> bytes:
    """A fault of which only type, access type and gpa are meaningful."""
    return raw(
        (0, message_type.to_bytes(4, "little")),
        (21, bytes([access_type])),
        (GPA_OFFSET[architecture], gpa.to_bytes(8, "little")),
    )


# ---------------------------------------------------------------- the frame


def test_header_fields_lie_at_their_literal_offsets() -> None:
    message = InterceptMessage.parse(bytes(range(256)))

    assert message.message_type == 0x03020100
    assert message.payload_size == 4
    assert message.message_flags == 5
    assert message.reserved == b"\x06\x07"
    assert message.sender == 0x0F0E0D0C0B0A0908
    assert message.payload == bytes(range(16, 256))


@given(st.binary(min_size=256, max_size=256))
def test_any_256_bytes_survive_parse_and_build(message: bytes) -> None:
    assert InterceptMessage.parse(message).build() == message


@pytest.mark.parametrize("size", [0, 255, 257])
def test_parse_of_a_wrong_length_says_the_length(size: int) -> None:
    with pytest.raises(ValueError, match=f"256 bytes, got {size}$"):
        InterceptMessage.parse(bytes(size))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, MessageType.NONE),
        (0x80000000, MessageType.UNMAPPED_GPA),
        (0x80010013, MessageType.X64_SEV_VMGEXIT_INTERCEPT),
    ],
)
def test_known_type_names_a_number_of_the_headers(number: int, expected: MessageType) -> None:
    message = InterceptMessage(message_type=number, payload_size=0, payload=bytes(240))

    assert message.known_type is expected


def test_known_type_of_an_unknown_number_is_none_and_the_number_stays() -> None:
    message = InterceptMessage.parse(raw((0, b"\xff\xff\x01\x80")))

    assert message.known_type is None
    assert message.message_type == 0x8001FFFF


@pytest.mark.parametrize("size", [239, 241])
def test_build_refuses_a_payload_of_another_length(size: int) -> None:
    message = InterceptMessage(message_type=0, payload_size=0, payload=bytes(size))

    with pytest.raises(ValueError, match=f"expected 240 bytes, got {size}"):
        message.build()


def test_build_refuses_a_message_type_over_32_bits() -> None:
    message = InterceptMessage(message_type=2**32, payload_size=0, payload=bytes(240))

    with pytest.raises(ValueError, match="a field does not fit"):
        message.build()


# ---------------------------------------------------------------- the payload


@pytest.mark.parametrize("architecture", Architecture)
@pytest.mark.parametrize("message_type", sorted(MEMORY_INTERCEPTS))
def test_memory_of_a_memory_intercept_reads_the_gpa(message_type: int, architecture: Architecture) -> None:
    message = InterceptMessage.parse(fault(architecture, message_type, 1, 0x123456789ABCDEF0))

    memory = message.memory(architecture)

    assert memory is not None
    assert memory.gpa == 0x123456789ABCDEF0
    assert memory.access_type == AccessType.WRITE


@pytest.mark.parametrize("message_type", sorted(set(MessageType) - MEMORY_INTERCEPTS))
def test_memory_of_another_type_is_none(message_type: MessageType) -> None:
    message = InterceptMessage(message_type=message_type, payload_size=0, payload=bytes(240))

    assert message.memory(X64) is None


def test_memory_intercepts_are_the_three_types_that_carry_one() -> None:
    assert sorted(MEMORY_INTERCEPTS) == [0x80000000, 0x80000001, 0x80000003]


# ---------------------------------------------------------------- memory_access


@pytest.mark.parametrize("architecture", Architecture)
@pytest.mark.parametrize("message_type", [MessageType.UNMAPPED_GPA, MessageType.GPA_INTERCEPT])
@pytest.mark.parametrize(
    ("access_type", "wanted"), [(0, Access.READ), (1, Access.WRITE), (2, Access.EXECUTE)]
)
def test_memory_access_of_a_fault_is_its_gfn_and_right(
    access_type: int, wanted: Access, message_type: MessageType, architecture: Architecture
) -> None:
    message = fault(architecture, message_type, access_type, 0xFEDCBA9876543FFF)

    assert memory_access(message, architecture) == (0xFEDCBA9876543, wanted)


@pytest.mark.parametrize("architecture", Architecture)
@pytest.mark.parametrize(
    "message_type", sorted(set(MessageType) - {MessageType.UNMAPPED_GPA, MessageType.GPA_INTERCEPT})
)
def test_memory_access_of_another_type_is_none(message_type: MessageType, architecture: Architecture) -> None:
    assert memory_access(fault(architecture, message_type, 0, 0x1000), architecture) is None


@pytest.mark.parametrize("architecture", Architecture)
@pytest.mark.parametrize("access_type", [3, 4, 255])
def test_memory_access_of_an_access_type_above_2_is_none(
    access_type: int, architecture: Architecture
) -> None:
    message = fault(architecture, MessageType.UNMAPPED_GPA, access_type, 0x1000)

    assert memory_access(message, architecture) is None


@pytest.mark.parametrize(("architecture", "offset"), [(X64, 61), (ARM64, 45)])
def test_hazard_g_memory_access_does_not_require_gva_gpa_valid(
    architecture: Architecture, offset: int
) -> None:
    message = bytearray(fault(architecture, MessageType.UNMAPPED_GPA, 0, 0x5000))
    message[offset] = 0

    assert memory_access(bytes(message), architecture) == (5, Access.READ)


@given(architectures, gpas, st.sampled_from(AccessType), st.data())
def test_memory_access_depends_on_three_fields_only(
    architecture: Architecture, gpa: int, access_type: AccessType, data: st.DataObject
) -> None:
    noise = bytearray(data.draw(st.binary(min_size=256, max_size=256)))
    noise[0:4] = (0x80000001).to_bytes(4, "little")
    noise[21] = access_type
    noise[GPA_OFFSET[architecture] : GPA_OFFSET[architecture] + 8] = gpa.to_bytes(8, "little")

    assert memory_access(bytes(noise), architecture) == (gpa >> 12, access_type.access)


@pytest.mark.parametrize("size", [0, 255, 257])
def test_memory_access_of_a_wrong_length_says_the_length(size: int) -> None:
    with pytest.raises(ValueError, match=f"256 bytes, got {size}$"):
        memory_access(bytes(size), X64)


# ---------------------------------------------------------------- build_memory_intercept


@given(architectures, gpas, st.sampled_from(AccessType))
def test_built_intercept_has_the_given_access(
    architecture: Architecture, gpa: int, access_type: AccessType
) -> None:
    message = build_memory_intercept(gpa=gpa, access=access_type.access, architecture=architecture)

    assert memory_access(message, architecture) == (gpa >> 12, access_type.access)


@pytest.mark.parametrize("architecture", Architecture)
def test_build_takes_a_right_or_its_access_type_alike(architecture: Architecture) -> None:
    by_right = build_memory_intercept(gpa=0x1000, access=Access.WRITE, architecture=architecture)
    by_type = build_memory_intercept(gpa=0x1000, access=AccessType.WRITE, architecture=architecture)

    assert by_right == by_type
    assert by_type[21] == 1


@pytest.mark.parametrize("access", [Access.NONE, Access.READ | Access.WRITE, Access(8)])
def test_build_refuses_other_than_one_right(access: Access) -> None:
    with pytest.raises(ValueError, match="an access type is one right"):
        build_memory_intercept(gpa=0, access=access)


@pytest.mark.parametrize(
    ("architecture", "info", "gva", "ip", "instruction"), [(X64, 61, 64, 40, 80), (ARM64, 45, 56, 24, 48)]
)
def test_build_puts_every_argument_at_its_literal_offset(
    architecture: Architecture, info: int, gva: int, ip: int, instruction: int
) -> None:
    message = build_memory_intercept(
        gpa=0x1111_2222_3333_4444,
        access=AccessType.EXECUTE,
        architecture=architecture,
        message_type=MessageType.GPA_INTERCEPT,
        gva=0x5555_6666_7777_8888,
        vp_index=7,
        instruction_pointer=0x9999_AAAA_BBBB_CCCC,
        instruction=b"\x0f\xb6",
    )

    gpa = GPA_OFFSET[architecture]
    assert message[0:4] == b"\x01\x00\x00\x80"
    assert message[16:20] == b"\x07\x00\x00\x00"
    assert message[20] == 2
    assert message[21] == 2
    assert message[info] == 0x03
    assert message[gpa : gpa + 8] == bytes.fromhex("4444333322221111")
    assert message[gva : gva + 8] == bytes.fromhex("8888777766665555")
    assert message[ip : ip + 8] == bytes.fromhex("ccccbbbbaaaa9999")
    assert message[instruction : instruction + 2] == b"\x0f\xb6"


@pytest.mark.parametrize(("architecture", "used"), [(X64, 80), (ARM64, 64)])
def test_build_says_the_payload_size_and_zeroes_the_rest(architecture: Architecture, used: int) -> None:
    message = build_memory_intercept(gpa=2**64 - 1, access=Access.READ, architecture=architecture)

    assert message[4] == used
    assert message[16 + used :] == bytes(240 - used)


@pytest.mark.parametrize(("architecture", "info"), [(X64, 61), (ARM64, 45)])
def test_build_without_gva_marks_no_gva_valid(architecture: Architecture, info: int) -> None:
    assert build_memory_intercept(gpa=0, access=Access.READ, architecture=architecture)[info] == 0


@pytest.mark.parametrize("gpa", [-1, 2**64])
def test_build_refuses_a_gpa_outside_64_bits(gpa: int) -> None:
    with pytest.raises(ValueError, match="a field does not fit"):
        build_memory_intercept(gpa=gpa, access=Access.READ)
