"""The hot path's codec says what the general one says, or nothing."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol import rpc
from intercept_protocol.intercept_codec import InterceptCall, encode_answer, match_intercept
from intercept_protocol.outcomes import Answer

MESSAGE = bytes(range(256))


def request(msgid: int, method: str = "intercept", *params: object) -> bytes:
    return rpc.encode_request(msgid, method, list(params or (MESSAGE,)))


@pytest.mark.parametrize("msgid", [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x10000, 0xFFFFFFFF])
def test_an_intercept_of_any_msgid_is_matched_with_its_bytes(msgid: int) -> None:
    call = match_intercept(request(msgid))

    assert call == InterceptCall(msgpack.packb(msgid), MESSAGE)


@given(st.integers(0, 2**32 - 1), st.binary(min_size=256, max_size=256))
def test_what_is_matched_is_what_the_general_decoder_finds(msgid: int, message: bytes) -> None:
    receiver = rpc.Receiver({rpc.REQUEST})
    receiver.receive_data(request(msgid, "intercept", message))

    call = match_intercept(request(msgid, "intercept", message))

    assert call is not None
    assert receiver.next_message() == rpc.Request(msgpack.unpackb(call.msgid), "intercept", [call.message])


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
    assert match_intercept(data) is None


@pytest.mark.parametrize("answer", list(Answer))
@pytest.mark.parametrize("msgid", [5, 300])
def test_an_answer_is_what_the_general_encoder_makes_of_it(msgid: int, answer: Answer) -> None:
    call = match_intercept(request(msgid))

    assert call is not None
    assert encode_answer(call.msgid, answer) == rpc.encode_result(msgid, answer.value)
