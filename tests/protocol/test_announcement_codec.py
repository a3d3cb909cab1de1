"""The fast codec agrees with the general one, or declines."""

from __future__ import annotations

from itertools import product

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol import codec, rpc
from intercept_protocol._announcement_codec import match
from intercept_protocol.messages import NOTIFIER_METHODS, Invalidate, InvalidateBegin, InvalidateEnd

CALLS = [InvalidateBegin, InvalidateEnd, Invalidate]
EDGES = [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x10000, 0xFFFF_FFFF]
LONG = [*EDGES, 0x1_0000_0000, 0x7F12_3456_7000, 2**64 - 1]


def request(
    msgid: int, method: str = "invalidate", start_uaddr: object = 0x1000, length: object = 1
) -> bytes:
    return rpc.encode_request(msgid, method, [{"start_uaddr": start_uaddr, "length": length}])


GOOD = request(5)


@pytest.mark.parametrize("call", CALLS)
@given(st.sampled_from(EDGES), st.sampled_from(LONG), st.sampled_from(LONG))
def test_the_fast_match_agrees_with_the_general_decoder(
    call: type[Invalidate], msgid: int, start_uaddr: int, length: int
) -> None:
    data = request(msgid, call.METHOD, start_uaddr, length)
    receiver = rpc.Receiver({rpc.REQUEST})
    receiver.receive_data(data)
    general = receiver.next_message()
    assert isinstance(general, rpc.Request)

    fast = match(data)

    assert fast is not None
    assert (fast.msgid, fast.method, fast.params) == general
    assert fast.call == codec.decode_call(NOTIFIER_METHODS, general.method, general.params)


@pytest.mark.parametrize("data", [GOOD[:end] for end in range(len(GOOD))])
def test_a_part_of_a_request_is_left_to_the_general_decoder(data: bytes) -> None:
    assert match(data) is None


@pytest.mark.parametrize(
    "data",
    [
        GOOD + b"\x00",
        GOOD + request(6),
        request(5, "invalidatE"),
        request(5, "kick"),
        request(5, start_uaddr=None),
        request(5, start_uaddr=-1),
        request(5, length=1.0),
        request(5, length="1"),
        rpc.encode_request(5, "invalidate", []),
        rpc.encode_request(5, "invalidate", [{"length": 1, "start_uaddr": 0x1000}]),
        rpc.encode_request(5, "invalidate", [{"start_uaddr": 0, "length": 1, "more": 1}]),
        rpc.encode_request(5, "invalidate", [{"start_uaddr": 0, "length": 1}, {}]),
        b"\x93" + GOOD[1:],
        b"\x94\x01" + GOOD[2:],
        b"\x94\x00\xc2" + GOOD[3:],
        b"\x94\x00\xff" + GOOD[3:],
        b"\x94\x00\xcf\x00\x00\x00\x00\x00\x00\x00\x05" + GOOD[3:],
    ],
)
def test_anything_else_is_left_to_the_general_decoder(data: bytes) -> None:
    assert match(data) is None


@pytest.mark.parametrize(("size", "method"), list(product(CALLS, CALLS)))
def test_a_method_of_another_length_than_is_said_is_left_to_it_too(
    size: type[Invalidate], method: type[Invalidate]
) -> None:
    said = msgpack.packb(size.METHOD)[:1]
    data = request(5, method.METHOD).replace(msgpack.packb(method.METHOD), said + method.METHOD.encode())
    assert (match(data) is None) is (size is not method)
