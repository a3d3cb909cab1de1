"""MessagePack-RPC: every message through both ends; everything else is refused permanently."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial, reduce

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from intercept_protocol._frames import DEPTH_LIMIT, MESSAGE_LIMIT, MessageLimits
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.rpc import (
    NOTIFICATION,
    REQUEST,
    RESPONSE,
    Message,
    Notification,
    Receiver,
    Request,
    Response,
    encode_error,
    encode_notification,
    encode_request,
    encode_result,
)

EVERY_KIND = (REQUEST, RESPONSE, NOTIFICATION)
INTERCEPT = encode_request(7, "intercept", [bytes(range(256))])
DEEP = reduce(lambda inner, _: [inner], range(DEPTH_LIMIT), list[object]())
"""Too deep to lie in the parameters of a request."""

msgids = st.integers(0, 2**32 - 1)
methods = st.text(max_size=40)
plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=20)
    | st.binary(max_size=300)
)
extensions = st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4))
params = st.lists(plain | st.dictionaries(st.text(max_size=9), plain, max_size=5), max_size=3)
messages = (
    st.builds(lambda *parts: (encode_request(*parts), Request(*parts)), msgids, methods, params)
    | st.builds(
        lambda msgid, value: (encode_result(msgid, value), Response(msgid, None, value)), msgids, plain
    )
    | st.builds(lambda *parts: (encode_notification(*parts), Notification(*parts)), methods, params)
)


def receive(data: bytes, accepts: tuple[int, ...] = EVERY_KIND) -> Message | None:
    receiver = Receiver(accepts)
    receiver.receive_data(data)
    return receiver.next_message()


def taken(receiver: Receiver, pieces: list[bytes]) -> Message | int | None:
    """What becomes of a message in pieces: the number, if it is refused."""
    message = None
    try:
        for piece in pieces:
            receiver.receive_data(piece)
            message = receiver.next_message()
    except ProtocolViolation as violation:
        return violation.number
    return message


def refusal(data: bytes, accepts: tuple[int, ...] = EVERY_KIND) -> tuple[int, int]:
    """Feed byte by byte; how many bytes it took to refuse, and with which number."""
    receiver = Receiver(accepts)
    for size in range(len(data)):
        receiver.receive_data(data[size : size + 1])
        try:
            receiver.next_message()
        except ProtocolViolation as violation:
            return size + 1, violation.number
    raise AssertionError("nothing was refused")


def kind_of_answer(data: bytes) -> type | int | None:
    try:
        message = receive(data)
    except ProtocolViolation as violation:
        return violation.number
    return None if message is None else type(message)


# ---------------------------------------------------------------- through both ends


def test_request_is_received_as_it_was_sent() -> None:
    data = encode_request(3, "add_region", [{"start_gfn": 2**64 - 1}])

    assert receive(data, (REQUEST,)) == Request(3, "add_region", [{"start_gfn": 2**64 - 1}])


def test_intercept_is_received_as_it_was_sent() -> None:
    assert receive(INTERCEPT, (REQUEST,)) == Request(7, "intercept", [bytes(range(256))])


def test_result_is_received_as_it_was_sent() -> None:
    assert receive(encode_result(3, ["resume", "mapped"]), (RESPONSE,)) == Response(
        3, None, ["resume", "mapped"]
    )


def test_error_is_received_as_it_was_sent() -> None:
    data = encode_error(3, WireError(errno.ENOENT, "no region", start_gfn=5))

    assert receive(data, (RESPONSE,)) == Response(3, [2, "ENOENT", "no region", {"start_gfn": 5}], None)


def test_notification_is_received_as_it_was_sent() -> None:
    assert receive(encode_notification("kicked", [1]), (NOTIFICATION,)) == Notification("kicked", [1])


@given(st.lists(messages, min_size=1, max_size=4), st.data())
def test_pipelined_messages_survive_any_split(sent: list[tuple[bytes, Message]], data: st.DataObject) -> None:
    stream = b"".join(encoded for encoded, _ in sent)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream)), max_size=8)) | {len(stream)})
    receiver = Receiver(EVERY_KIND)

    received = []
    for start, end in zip([0, *cuts], cuts, strict=False):
        receiver.receive_data(stream[start:end])
        while (message := receiver.next_message()) is not None:
            received.append(message)

    assert received == [message for _, message in sent]
    assert not receiver.has_bytes


@given(messages)
def test_message_byte_by_byte_is_complete_at_its_last_byte(sent: tuple[bytes, Message]) -> None:
    encoded, message = sent
    receiver = Receiver(EVERY_KIND)

    for index in range(len(encoded) - 1):
        receiver.receive_data(encoded[index : index + 1])
        assert receiver.next_message() is None
    receiver.receive_data(encoded[-1:])

    assert receiver.next_message() == message


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab") | plain | extensions, plain | st.lists(plain, max_size=2) | st.just(DEEP)
        ),
        max_size=6,
    ),
    st.integers(6, 120),
)
@example([(msgpack.ExtType(1, b"\0"), 1)], 120)
def test_a_map_is_taken_alike_whole_and_in_pieces_whatever_its_keys_are_or_hide(
    pairs: list[tuple[object, object]], values: int
) -> None:
    """A key that comes twice hides what it held first, and that counts and may not be nested either; and an
    extension is no value of this protocol, in a key as little as anywhere."""
    packed = b"".join(msgpack.packb(part) for pair in pairs for part in pair)
    encoded = b"\x94\x00\x07\xa1m\x91" + bytes([0x80 + len(pairs)]) + packed

    limit = MessageLimits(values, "request_values")
    whole, in_pieces = Receiver((REQUEST,), limit), Receiver((REQUEST,), limit)

    assert taken(whole, [encoded]) == taken(in_pieces, [bytes([byte]) for byte in encoded])


def test_has_bytes_is_false_before_the_first_and_behind_a_whole_message() -> None:
    receiver = Receiver((REQUEST,))
    before = receiver.has_bytes
    receiver.receive_data(INTERCEPT)
    receiver.next_message()

    assert (before, receiver.has_bytes) == (False, False)


@pytest.mark.parametrize("more", [INTERCEPT[:1], INTERCEPT])
def test_has_bytes_tells_of_a_second_request_behind_the_first(more: bytes) -> None:
    receiver = Receiver((REQUEST,))
    receiver.receive_data(INTERCEPT + more)
    receiver.next_message()

    assert receiver.has_bytes


@pytest.mark.parametrize("more", [b"", INTERCEPT[:1], INTERCEPT, b"\xc1"])
def test_what_is_behind_a_message_can_be_dropped_unseen(more: bytes) -> None:
    receiver = Receiver((REQUEST,))
    receiver.receive_data(INTERCEPT + more)
    first = receiver.next_message()

    assert receiver.drop_rest() == len(more)
    receiver.receive_data(INTERCEPT)
    assert receiver.next_message() == first


def test_message_of_exactly_the_limit_is_received() -> None:
    overhead = len(encode_request(1, "m", [bytes(65_000)])) - 65_000
    data = encode_request(1, "m", [bytes(MESSAGE_LIMIT - overhead)])

    message = receive(data)

    assert len(data) == 65_536
    assert isinstance(message, Request)


@pytest.mark.parametrize(
    "encoded", ["94cc00cc01a16d90", "dc0004cd0000ce00000001d9016ddc0000", "dd00000004d00000a16d90"]
)
def test_request_in_longer_spellings_is_received(encoded: str) -> None:
    message = receive(bytes.fromhex(encoded))

    assert isinstance(message, Request)
    assert message.method == "m"
    assert message.params == []


def test_small_request_in_longer_spellings_is_received() -> None:
    assert receive(bytes.fromhex("dc0004d00001a16ddc0001c40161")) == Request(1, "m", [b"a"])


def test_message_behind_an_intercept_in_pieces_is_received() -> None:
    following = encode_request(8, "kick", [{"vp_index": 0}])
    receiver = Receiver((REQUEST,))
    for piece in (INTERCEPT[:100], INTERCEPT[100:], following):
        receiver.receive_data(piece)
        message = receiver.next_message()

    assert message == Request(8, "kick", [{"vp_index": 0}])


def test_map_keys_of_any_type_are_received() -> None:
    assert receive(msgpack.packb([0, 1, "m", [{5: 6}]])) == Request(1, "m", [{5: 6}])


@pytest.mark.parametrize("msgid", [0, 2**32 - 1])
def test_msgid_at_its_bounds_is_received(msgid: int) -> None:
    assert receive(msgpack.packb([0, msgid, "m", []])) == Request(msgid, "m", [])


def test_encoder_is_clean_after_a_value_it_cannot_encode() -> None:
    with pytest.raises(OverflowError):
        encode_result(1, ["begun", 2**65])

    assert encode_result(1, None) == bytes.fromhex("940101c0c0")


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "first", [0x00, 0x7B, 0x80, 0x90, 0x92, 0x95, 0x9F, 0xA4, 0xC0, 0xC1, 0xC6, 0xDB, 0xDE, 0xFF]
)
def test_first_byte_that_opens_no_message_is_refused_at_once(first: int) -> None:
    assert refusal(bytes([first]) * 4) == (1, errno.EBADMSG)


@pytest.mark.parametrize(
    "prefix",
    [
        "9300",
        "9301",
        "9402",
        "9403",
        "947f",
        "9480",
        "94a0",
        "94c0",
        "94c2",
        "94ca",
        "94d4",
        "94d9",
        "94e0",
        "94ff",
    ],
)
def test_second_byte_that_opens_no_message_is_refused_at_once(prefix: str) -> None:
    assert refusal(bytes.fromhex(prefix) + bytes(4)) == (2, errno.EBADMSG)


@pytest.mark.parametrize(
    ("accepts", "prefix"),
    [((REQUEST,), "9401"), ((REQUEST,), "9302"), ((RESPONSE,), "9400"), ((RESPONSE, NOTIFICATION), "9400")],
)
def test_kind_that_is_not_accepted_is_refused_at_its_second_byte(
    accepts: tuple[int, ...], prefix: str
) -> None:
    assert refusal(bytes.fromhex(prefix) + bytes(4), accepts) == (2, errno.EBADMSG)


def test_a_whole_intercept_is_refused_while_no_request_is_accepted() -> None:
    with pytest.raises(ProtocolViolation):
        receive(INTERCEPT, (RESPONSE,))


@pytest.mark.parametrize(
    "value",
    [
        [0, 1, "m"],
        [0, 1, "m", [], 5],
        [2, "m", [], 5],
        [0, "1", "m", []],
        [0, -1, "m", []],
        [0, 2**32, "m", []],
        [0, True, "m", []],
        [0, 1, b"m", []],
        [0, 1, "m", {}],
        [0, 1, "m", None],
        [0, -1, "m", [b""]],
        [0, True, "m", [b""]],
        [1, 2**32, None, None],
        [1, False, None, None],
        [2, 5, []],
        [2, "m", {}],
    ],
)
def test_array_of_another_shape_is_refused(value: list[object]) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        receive(msgpack.packb(value))

    assert caught.value.number == errno.EBADMSG


@pytest.mark.parametrize("kind", [False, 0.0, None, "0", 3, 2**40])
@pytest.mark.parametrize("params", [[], [b"blob"]])
def test_type_that_is_not_the_integer_is_refused_in_any_spelling(kind: object, params: list[object]) -> None:
    data = b"\xdc\x00\x04" + b"".join(map(msgpack.packb, (kind, 1, "m", params)))

    with pytest.raises(ProtocolViolation) as caught:
        receive(data)

    assert caught.value.number == errno.EBADMSG


@pytest.mark.parametrize("encoded", ["940001a16d", "dd00000004cc0001a16d"])
@pytest.mark.parametrize("bad", ["91a1ff", "9181900000"])
def test_bytes_that_msgpack_refuses_are_refused(encoded: str, bad: str) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        receive(bytes.fromhex(encoded + bad))

    assert caught.value.number == errno.EBADMSG


def test_over_the_limit_is_refused_at_the_header() -> None:
    assert refusal(bytes.fromhex("940001a16d91c6") + b"\x00\x01\x00\x00" + bytes(9)) == (11, errno.EMSGSIZE)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_message_or_incomplete_or_a_violation(data: bytes) -> None:
    assert kind_of_answer(data) in (Request, Response, Notification, None, errno.EBADMSG, errno.EMSGSIZE)


def test_violation_is_for_good() -> None:
    receiver = Receiver((REQUEST,))
    receiver.receive_data(b"\xc1")
    with pytest.raises(ProtocolViolation) as first:
        receiver.next_message()
    receiver.receive_data(INTERCEPT)

    with pytest.raises(ProtocolViolation) as second:
        receiver.next_message()

    assert second.value.to_wire() == first.value.to_wire()


def test_bytes_behind_a_violation_are_not_kept() -> None:
    receiver = Receiver((REQUEST,))
    receiver.receive_data(b"\xc1")
    with pytest.raises(ProtocolViolation):
        receiver.next_message()
    receiver.receive_data(INTERCEPT)

    assert not receiver.has_bytes


def test_message_in_front_of_garbage_is_received_first() -> None:
    receiver = Receiver((REQUEST,))
    receiver.receive_data(INTERCEPT + b"\xc1")

    assert receiver.next_message() == Request(7, "intercept", [bytes(range(256))])
    with pytest.raises(ProtocolViolation):
        receiver.next_message()


@pytest.mark.parametrize(
    "encode",
    [
        partial(encode_error, 1, WireError(errno.EINVAL, "no", path="/\udcff")),
        partial(encode_result, 1, {"name": "/\udcff"}),
        partial(encode_notification, "event", [{"error": "/\udcff"}]),
    ],
    ids=["error", "result", "notification"],
)
def test_an_answer_that_quotes_invalid_utf8_is_sent(encode: Callable[[], bytes]) -> None:
    """A path from the kernel; an answer that fails to encode would end its connection."""
    sent = encode()
    assert receive(sent) is not None
    assert b"/\\udcff" in sent


def test_a_request_with_text_that_is_not_utf8_is_its_callers_mistake() -> None:
    with pytest.raises(UnicodeEncodeError):
        encode_request(1, "hello", [{"name": "/\udcff"}])
