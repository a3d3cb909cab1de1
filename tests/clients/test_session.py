"""The client's session without I/O."""

from __future__ import annotations

import errno
from itertools import pairwise

import pytest

from intercept_client._errors import ClientMisuse, ConnectionEnded, ConnectionLost
from intercept_client._exchange import Exchange, Progress, Reply, call_exchange, intercept_exchange
from intercept_client._session import NOTIFICATION_LIMIT, ClientSession
from intercept_protocol import rpc
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import (
    AddRegion,
    AddRegionReply,
    HelloVmm,
    InvalidateEnd,
    RegionKind,
    RequestedKind,
    Translate,
)
from intercept_protocol.outcomes import Answer, LaterAnswer, Outcome

ADD = AddRegion(
    start_gfn=0x100,
    page_count=0x100,
    start_uaddr=0x7000_0000,
    kind=RequestedKind.AUTO,
    writable=True,
    executable=False,
)
ADDED = {"kind": "mmio"}
END = InvalidateEnd(start_uaddr=0, length=0x1000)


def started(session: ClientSession, exchange: Exchange[Reply]) -> rpc.Request:
    """Start the exchange, send all of it, and return what the daemon would read."""
    session.start(exchange)
    data = session.data_to_send()
    session.sent(len(data))
    receiver = rpc.Receiver({rpc.REQUEST})
    receiver.receive_data(data)
    request = receiver.next_message()
    assert isinstance(request, rpc.Request)
    return request


def test_a_call_goes_out_as_one_request_with_its_named_fields() -> None:
    request = started(ClientSession(), call_exchange(ADD))

    assert request.method == "add_region"
    assert request.params == [
        {
            "start_gfn": 0x100,
            "page_count": 0x100,
            "start_uaddr": 0x7000_0000,
            "kind": "auto",
            "writable": True,
            "executable": False,
        }
    ]


def test_an_intercept_goes_out_as_its_raw_bytes() -> None:
    request = started(ClientSession(), intercept_exchange(bytes(range(256))))

    assert request[1:] == ("intercept", [bytes(range(256))])


def test_hello_says_its_role() -> None:
    request = started(ClientSession(), call_exchange(HelloVmm(name="guest")))

    assert request[1:] == ("hello", [{"role": "vmm", "protocol": 1, "name": "guest"}])


def test_data_to_send_excludes_what_was_reported_as_sent() -> None:
    session = ClientSession()
    session.start(call_exchange(ADD))
    whole = session.data_to_send()

    session.sent(3)

    assert session.data_to_send() == whole[3:]


def test_the_answer_is_the_typed_reply() -> None:
    session, exchange = ClientSession(), call_exchange(ADD)
    msgid = started(session, exchange).msgid

    session.receive_data(rpc.encode_result(msgid, ADDED))

    assert exchange.reply() == AddRegionReply(kind=RegionKind.MMIO)
    assert not session.is_busy


def test_an_answer_of_nothing_may_be_the_reply() -> None:
    session, exchange = ClientSession(), call_exchange(Translate(gfn=5))
    msgid = started(session, exchange).msgid

    session.receive_data(rpc.encode_result(msgid, None))

    assert exchange.reply() is None


CHATTER = rpc.encode_notification("partition_ended", [{"partition_id": 7}])


@pytest.mark.parametrize("cut", range(len(CHATTER + rpc.encode_result(1, ADDED)) + 1))
def test_answer_and_notification_cut_at_any_byte_arrive_whole(cut: int) -> None:
    session, exchange = ClientSession(), call_exchange(ADD)
    stream = CHATTER + rpc.encode_result(started(session, exchange).msgid, ADDED)

    for piece in filter(None, (stream[:cut], stream[cut:])):
        session.receive_data(piece)

    assert exchange.reply() == AddRegionReply(kind=RegionKind.MMIO)
    assert session.take_notifications() == [rpc.Notification("partition_ended", [{"partition_id": 7}])]


@pytest.mark.parametrize("answer", Answer)
def test_every_answer_to_an_intercept_is_read_whole_and_byte_by_byte(answer: Answer) -> None:
    session = ClientSession()
    whole, bytewise = intercept_exchange(bytes(256)), intercept_exchange(bytes(256))

    session.receive_data(rpc.encode_result(started(session, whole).msgid, [answer.outcome, answer.reason]))
    for byte in rpc.encode_result(started(session, bytewise).msgid, [answer.outcome, answer.reason]):
        session.receive_data(bytes((byte,)))

    assert (whole.reply(), bytewise.reply()) == (answer, answer)


def test_an_answer_to_an_intercept_packed_at_greater_length_is_read_too() -> None:
    session, exchange = ClientSession(), intercept_exchange(bytes(256))
    msgid = started(session, exchange).msgid

    session.receive_data(
        b"\xdc\x00\x04\x01\xce" + msgid.to_bytes(4) + b"\xc0\xdc\x00\x02\xd9\x06resume\xd9\x06mapped"
    )

    assert exchange.reply() is Answer.MAPPED


def test_an_answers_bytes_inside_a_notification_are_ignored() -> None:
    session, exchange = ClientSession(), intercept_exchange(bytes(256))
    inner = rpc.encode_result(started(session, exchange).msgid, ["resume", "mapped"])
    notification = rpc.encode_notification("tick", [inner])

    session.receive_data(notification.removesuffix(inner))
    session.receive_data(inner)

    assert exchange.is_owed
    assert session.take_notifications() == [rpc.Notification("tick", [inner])]


def test_the_known_answer_under_another_msgid_is_a_violation() -> None:
    session, exchange = ClientSession(), intercept_exchange(bytes(256))
    msgid = started(session, exchange).msgid

    session.receive_data(rpc.encode_result(msgid + 1, ["resume", "mapped"]))

    with pytest.raises(ProtocolViolation, match=f"msgid {msgid + 1}, which was not asked"):
        exchange.reply()


def test_an_answer_that_says_no_more_than_done_is_not_decoded() -> None:
    session, exchange = ClientSession(), call_exchange(END)
    decoded: list[object] = []
    exchange.decode = decoded.append

    session.receive_data(rpc.encode_result(started(session, exchange).msgid, None))

    assert exchange.succeeded
    assert decoded == []


def test_a_done_under_another_msgid_is_a_violation() -> None:
    session, exchange = ClientSession(), call_exchange(END)
    msgid = started(session, exchange).msgid

    session.receive_data(rpc.encode_result(msgid + 1, None))

    with pytest.raises(ProtocolViolation, match=f"msgid {msgid + 1}, which was not asked"):
        exchange.reply()


def test_an_answer_that_comes_again_reaches_no_other_call_wherever_it_is_cut() -> None:
    """After a restart (T-12): right behind the first time, and late, around the next answers."""
    first, second = rpc.encode_result(1, None), rpc.encode_result(2, None)
    refused = rpc.encode_error(3, WireError(errno.EEXIST, "overlaps"))
    streams = first + first, first + second + second + first, second + refused + first + refused
    for cut in range(max(map(len, streams)) + 1):
        session, exchanges = ClientSession(), [call_exchange(END) for _ in streams]
        for exchange, stream in zip(exchanges, streams, strict=True):
            started(session, exchange)
            for piece in filter(None, (stream[:cut], stream[cut:])):
                session.receive_data(piece)
        assert [exchange.progress for exchange in exchanges] == [
            Progress.ANSWERED, Progress.ANSWERED, Progress.REFUSED,
        ]  # fmt: skip
        assert not session.is_lost


def test_a_known_answer_that_comes_again_is_not_the_next_calls() -> None:
    exchange = intercept_exchange(bytes(256))
    session, first = ClientSession(), intercept_exchange(bytes(256))
    again = rpc.encode_result(started(session, first).msgid, ["resume", "mapped"])
    session.receive_data(again)
    started(session, exchange)

    session.receive_data(again)

    assert exchange.is_owed
    assert not session.is_lost


def test_once_all_msgids_were_used_any_of_them_may_come_again_and_no_other() -> None:
    session = ClientSession()
    for _ in range(127 + 1):
        session.receive_data(rpc.encode_result(started(session, call_exchange(END)).msgid, None))

    for msgid in range(1, 128):
        session.receive_data(rpc.encode_result(msgid, None))
    assert not session.is_lost
    session.receive_data(rpc.encode_result(128, None))

    with pytest.raises(ProtocolViolation, match="msgid 128, which was not asked"):
        session.require_going_on()


def test_an_answer_to_a_request_that_was_withdrawn_is_a_violation() -> None:
    session = ClientSession()
    session.start(call_exchange(END))
    session.withdraw_unsent()

    session.receive_data(rpc.encode_result(1, None))

    with pytest.raises(ProtocolViolation, match="msgid 1, which was not asked"):
        session.require_going_on()


def test_nil_is_invalid_for_a_call_with_a_reply() -> None:
    session, exchange = ClientSession(), call_exchange(ADD)

    session.receive_data(rpc.encode_result(started(session, exchange).msgid, None))

    with pytest.raises(ProtocolViolation):
        exchange.reply()


def test_msgids_differ_from_call_to_call_and_never_are_0() -> None:
    session, msgids = ClientSession(), []
    for _ in range(300):
        exchange = call_exchange(Translate(gfn=0))
        msgids.append(started(session, exchange).msgid)
        session.receive_data(rpc.encode_result(msgids[-1], None))

    assert all(before != after for before, after in pairwise(msgids))
    assert 0 not in msgids


def test_a_refusal_is_raised_and_the_session_continues() -> None:
    session, refused, fine = ClientSession(), call_exchange(ADD), call_exchange(ADD)
    msgid = started(session, refused).msgid
    session.receive_data(rpc.encode_error(msgid, WireError(errno.EEXIST, "overlaps", start_gfn=0x180)))

    session.receive_data(rpc.encode_result(started(session, fine).msgid, ADDED))

    with pytest.raises(WireError, match="EEXIST: overlaps") as caught:
        refused.reply()
    assert caught.value.details == {"start_gfn": 0x180}
    assert fine.succeeded


def test_a_second_request_before_the_answer_is_misuse_without_effect() -> None:
    session, first = ClientSession(), call_exchange(ADD)
    msgid = started(session, first).msgid

    with pytest.raises(ClientMisuse, match="add_region is in flight"):
        session.start(call_exchange(Translate(gfn=5)))

    session.receive_data(rpc.encode_result(msgid, ADDED))
    assert first.succeeded


def test_an_exchange_that_ran_before_is_our_misuse() -> None:
    session, exchange = ClientSession(), call_exchange(ADD)
    session.receive_data(rpc.encode_result(started(session, exchange).msgid, ADDED))

    with pytest.raises(ClientMisuse, match="runs once"):
        session.start(exchange)


@pytest.mark.parametrize("call", [Translate(gfn=2**64), HelloVmm(name="x" * 70_000)])
def test_a_request_that_no_daemon_would_read_is_our_misuse_and_is_not_sent(
    call: Translate | HelloVmm,
) -> None:
    session = ClientSession()

    with pytest.raises(ClientMisuse, match=call.METHOD):
        session.start(call_exchange(call))

    assert not session.is_busy
    assert session.data_to_send() == b""


def test_the_reply_of_a_call_without_an_answer_is_our_misuse() -> None:
    with pytest.raises(ClientMisuse, match="not sent yet"):
        call_exchange(ADD).reply()


def test_an_error_under_msgid_0_is_the_daemons_last_word() -> None:
    session, exchange = ClientSession(), call_exchange(ADD)
    started(session, exchange)

    session.receive_data(rpc.encode_error(0, WireError(errno.EMSGSIZE, "too long")))

    with pytest.raises(ConnectionEnded, match="EMSGSIZE: too long") as caught:
        exchange.reply()
    assert caught.value.error.number == errno.EMSGSIZE
    with pytest.raises(ConnectionEnded, match="too long"):
        session.start(call_exchange(ADD))


def test_the_last_word_outlives_the_end_of_the_stream() -> None:
    session = ClientSession()
    session.receive_data(rpc.encode_error(0, WireError(errno.ESHUTDOWN, "draining")))

    session.receive_data(b"")

    with pytest.raises(ConnectionEnded, match="draining"):
        session.start(call_exchange(ADD))


NONSENSE = {
    "garbage": b"\xc1",
    "an unsolicited answer": rpc.encode_result(99, None),
    "a result under msgid 0": rpc.encode_result(0, None),
    "a request": rpc.encode_request(1, "map_gpa", [{}]),
    "an answer of another form": rpc.encode_result(1, {"kind": "paper"}),
    "an endless answer": b"\xdb\xff\xff\xff\xff",
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_from_the_daemon_is_a_violation_for_good(nonsense: bytes) -> None:
    session, exchange = ClientSession(), call_exchange(ADD)
    started(session, exchange)

    session.receive_data(nonsense)

    with pytest.raises(ProtocolViolation):
        exchange.reply()
    with pytest.raises(ProtocolViolation):
        session.start(call_exchange(ADD))
    assert session.is_lost


@pytest.mark.parametrize("outcome", Outcome)
def test_an_answer_with_a_reason_that_is_not_known_is_taken_by_its_outcome(outcome: Outcome) -> None:
    session, exchange = ClientSession(), intercept_exchange(bytes(256))

    session.receive_data(rpc.encode_result(started(session, exchange).msgid, [outcome, "later"]))

    assert exchange.reply() == LaterAnswer(outcome, "later")
    assert str(exchange.reply()) == f"{outcome} later"


@pytest.mark.parametrize(
    "answer", [["return", "mapped"], ["resume"], ["resume", 7], ["resume", "mapped", 1], {}]
)
def test_an_answer_of_another_form_to_an_intercept_is_a_violation(answer: object) -> None:
    session, exchange = ClientSession(), intercept_exchange(bytes(256))

    session.receive_data(rpc.encode_result(started(session, exchange).msgid, answer))

    with pytest.raises(ProtocolViolation, match="intercept: malformed answer"):
        exchange.reply()


def test_an_answer_before_the_request_is_sent_whole_is_a_violation() -> None:
    session, exchange = ClientSession(), intercept_exchange(bytes(256))
    session.start(exchange)
    session.sent(10)

    session.receive_data(rpc.encode_result(1, ["resume", "mapped"]))

    with pytest.raises(ProtocolViolation, match="not asked"):
        exchange.reply()


def test_the_end_of_the_stream_ends_the_call_in_flight_and_all_later_ones() -> None:
    session, exchange = ClientSession(), call_exchange(ADD)
    started(session, exchange)

    session.receive_data(b"")

    with pytest.raises(ConnectionLost, match=r"the connection ended$"):
        exchange.reply()
    with pytest.raises(ConnectionLost):
        session.start(call_exchange(ADD))


def test_the_end_of_the_stream_within_a_message_says_so() -> None:
    session, exchange = ClientSession(), call_exchange(ADD)
    started(session, exchange)
    session.receive_data(rpc.encode_result(1, ADDED)[:-1])

    session.receive_data(b"")

    with pytest.raises(ConnectionLost, match="in the middle of a message"):
        exchange.reply()


def test_after_a_failed_send_the_daemons_last_error_can_be_read() -> None:
    session, exchange = ClientSession(), call_exchange(ADD)
    session.start(exchange)

    session.stream_failed(BrokenPipeError())
    session.receive_data(rpc.encode_error(0, WireError(errno.EPERM, "go away")))

    with pytest.raises(ConnectionEnded, match="go away"):
        exchange.reply()


def test_a_failed_receive_ends_the_call() -> None:
    session, exchange = ClientSession(), call_exchange(ADD)
    started(session, exchange)

    session.stream_failed(ConnectionResetError(errno.ECONNRESET, "reset"))

    with pytest.raises(ConnectionLost, match="reset"):
        exchange.reply()


def test_a_request_without_a_byte_sent_is_withdrawn_and_leaves_no_trace() -> None:
    session, first, second = ClientSession(), call_exchange(ADD), call_exchange(Translate(gfn=5))
    session.start(first)

    session.withdraw_unsent()

    assert first.progress is Progress.WITHDRAWN
    assert started(session, second).method == "translate"


@pytest.mark.parametrize("count", [1, None])
def test_a_request_with_a_byte_sent_stays_owed(count: int | None) -> None:
    session, exchange = ClientSession(), call_exchange(ADD)
    session.start(exchange)
    session.sent(len(session.data_to_send()[:count]))

    session.withdraw_unsent()

    assert exchange.is_owed
    assert session.is_busy


def test_of_too_many_notifications_the_newest_are_kept_and_the_others_counted() -> None:
    session = ClientSession()

    for number in range(NOTIFICATION_LIMIT + 3):
        session.receive_data(rpc.encode_notification("tick", [number]))

    kept = session.take_notifications()
    assert [kept[0].params, kept[-1].params] == [[3], [NOTIFICATION_LIMIT + 2]]
    assert session.dropped_notifications == 3
    assert session.take_notifications() == []
