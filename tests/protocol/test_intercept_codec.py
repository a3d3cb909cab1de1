"""The fast codec agrees with the general one, or declines."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol import rpc
from intercept_protocol._intercept_codec import InterceptCodec, encode_answer
from intercept_protocol.hv_message import build_memory_intercept, memory_access
from intercept_protocol.messages import Architecture
from intercept_protocol.outcomes import Access, Answer

MESSAGE = build_memory_intercept(gpa=0x12345 << 12, access=Access.WRITE)
CODECS = {architecture: InterceptCodec(architecture) for architecture in Architecture}
X64 = CODECS[Architecture.X86_64]


def request(msgid: int, method: str = "intercept", *params: object) -> bytes:
    return rpc.encode_request(msgid, method, list(params or (MESSAGE,)))


@pytest.mark.parametrize("msgid", [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x10000, 0xFFFFFFFF])
def test_an_intercept_of_any_msgid_is_matched_with_what_it_wants(msgid: int) -> None:
    assert X64.match(request(msgid)) == (msgpack.packb(msgid), (0x12345, Access.WRITE))


def test_a_message_other_than_a_memory_fault_is_matched_without_access() -> None:
    assert X64.match(request(5, "intercept", bytes(256))) == (b"\x05", None)


@pytest.mark.parametrize("architecture", list(Architecture))
def test_the_offset_of_the_gpa_depends_on_the_architecture(architecture: Architecture) -> None:
    fault = build_memory_intercept(gpa=0xABC << 12, access=Access.EXECUTE, architecture=architecture)

    assert CODECS[architecture].match(request(5, "intercept", fault)) == (b"\x05", (0xABC, Access.EXECUTE))


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(list(Architecture)),
    st.sampled_from([0x80000000, 0x80000001, 0x80000003]),
    st.binary(min_size=252, max_size=252),
)
def test_the_fast_match_agrees_with_the_general_decoder(
    msgid: int, architecture: Architecture, message_type: int, rest: bytes
) -> None:
    message = message_type.to_bytes(4, "little") + rest
    receiver = rpc.Receiver({rpc.REQUEST})
    receiver.receive_data(request(msgid, "intercept", message))

    call = CODECS[architecture].match(request(msgid, "intercept", message))

    assert call == (msgpack.packb(msgid), memory_access(message, architecture))
    assert receiver.next_message() == rpc.Request(msgid, "intercept", [message])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        request(5)[:-1],
        request(5) + b"\x00",
        request(5) + request(6),
        request(5, "intercepT"),
        request(5, "intercept", MESSAGE[:-1]),
        request(5, "intercept", MESSAGE, MESSAGE),
        request(5, "statistics", {}),
        b"\x93" + request(5)[1:],
        b"\x94\x01" + request(5)[2:],
        b"\x94\x00\xc2" + request(5)[3:],
        b"\x94\x00\xff" + request(5)[3:],
        b"\x94\x00\xcd\x05" + request(5)[3:],
        b"\x94\x00\xd2\x00\x00\x00\x05" + request(5)[3:],
        b"\x94\x00\xcf\x00\x00\x00\x00\x00\x00\x00\x05" + request(5)[3:],
    ],
)
def test_anything_else_is_left_to_the_general_decoder(data: bytes) -> None:
    assert X64.match(data) is None


@pytest.mark.parametrize("answer", list(Answer))
@pytest.mark.parametrize("msgid", [5, 300])
def test_the_fast_answer_equals_that_of_the_general_encoder(msgid: int, answer: Answer) -> None:
    assert encode_answer(msgpack.packb(msgid), answer) == rpc.encode_result(msgid, answer.value)
