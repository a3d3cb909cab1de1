"""Invalid bytes are refused under msgid 0 and the connection closed, without effect on other peers."""

from __future__ import annotations

import random

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.raw_client import READ, Connect, intercept_message, pack, request
from fakes.raw_vmm import GFN, WHOLE_MEMORY, RawVmm
from fakes.witness import Witness

MESSAGE_BYTES = 65536
HELLO = request("hello", {"protocol": 1, "role": "vmm"})


def nested(levels: int) -> bytes:
    """A request whose params lie in arrays `levels` deep, the message's own and the params counted."""
    return bytes.fromhex("940001a16d") + b"\x91" * (levels - 1) + b"\xc0"


def request_of_size(size: int) -> bytes:
    """A well-formed request for a method that is not there, of exactly `size` bytes."""
    head = bytes.fromhex("940001a16d91c6")
    return head + (size - len(head) - 4).to_bytes(4) + bytes(size - len(head) - 4)


NO_MESSAGES = {
    "an HTTP request": b"GET / HTTP/1.1\r\n\r\n",
    "zeroes": bytes(4096),
    "a response": pack([1, 1, None, None]),
    "a notification": pack([2, "hello", []]),
    "an array of five": pack([0, 1, "hello", [], None]),
    "an empty array": pack([]),
    "a map": pack({"method": "hello"}),
    "a type that is text": pack(["0", 1, "hello", []]),
    "a type that is false": pack([False, 1, "hello", []]),
    "a type that is a float": pack([0.0, 1, "hello", []]),
    "a type of 60,000 bytes": b"\xdc\x00\x04" + pack(bytes(60_000)) + b"\x01\xa1m\x90",
    "200 elements": pack([0] * 200),
    "a negative msgid": request("hello", msgid=-1),
    "a msgid of 33 bits": request("hello", msgid=1 << 32),
    "a msgid that is true": request("hello", msgid=True),
    "a method of bytes": request(b"hello"),
    "params that are a map": pack([0, 1, "hello", {"protocol": 1}]),
    "params that are nil": pack([0, 1, "hello", None]),
    "a string that is no UTF-8": bytes.fromhex("940001a16d91a1ff"),
    "a key that is an array": bytes.fromhex("940001a16d91819000"),
    "an ext": bytes.fromhex("940001a16d91d40100"),
    "the unused byte": bytes.fromhex("940001a16d91c1"),
    "17 levels": nested(17),
    "nothing but arrays": b"\x94\x00\x01\xa1m" + b"\x91" * (MESSAGE_BYTES - 5),
}


@pytest.mark.parametrize("data", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_invalid_requests_are_refused_under_msgid_0_and_closed(connect: Connect, data: bytes) -> None:
    connection = connect()
    connection.send(data)
    refusal = connection.farewell()
    assert (refusal.name, len(refusal.message) < 200) == ("EBADMSG", True)


@pytest.mark.parametrize(
    "data",
    [
        request_of_size(MESSAGE_BYTES + 1),
        bytes.fromhex("940001a16d91c600010000"),
        bytes.fromhex("dd7fffffff"),
    ],
    ids=["64 KiB + 1", "announced bytes", "announced elements"],
)
def test_a_message_over_64_kib_is_refused_with_emsgsize(connect: Connect, data: bytes) -> None:
    connection = connect()
    connection.send(data)
    refusal = connection.farewell()
    assert (refusal.name, "65536" in refusal.message) == ("EMSGSIZE", True)


def test_a_message_of_exactly_64_kib_is_answered(connect: Connect) -> None:
    connection = connect()
    connection.say_hello("vmm")
    connection.send(request_of_size(MESSAGE_BYTES))
    kind, msgid, error, _ = connection.receive()
    assert (kind, msgid, error[1]) == (1, 1, "ENOSYS")


def test_sixteen_levels_are_answered(connect: Connect) -> None:
    connection = connect()
    connection.say_hello("vmm")
    connection.send(nested(16))
    kind, msgid, error, _ = connection.receive()
    assert (kind, msgid, error[1]) == (1, 1, "ENOSYS")


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_get_only_an_error_under_msgid_0(connect: Connect, seed: int) -> None:
    connection = connect()
    connection.send(random.Random(seed).randbytes(4096))
    connection.half_close()
    assert [message[:2] for message in connection.receive_all()] in ([], [[1, 0]])


def test_a_hello_with_any_one_byte_changed_gets_one_answer_at_most(connect: Connect) -> None:
    connections = [connect() for _ in HELLO]
    for position, connection in enumerate(connections):
        connection.send(HELLO[:position] + bytes([HELLO[position] ^ 0x55]) + HELLO[position + 1 :])
        connection.half_close()
    assert max(len(connection.receive_all()) for connection in connections) == 1


def test_a_hello_that_breaks_off_anywhere_is_forgotten(connect: Connect) -> None:
    for length in range(len(HELLO)):
        connection = connect()
        connection.send(HELLO[:length])
        connection.half_close()
        assert connection.receive_all() == []


def test_half_a_message_delays_no_other(connect: Connect, witness: Witness) -> None:
    connect().send(HELLO[: len(HELLO) // 2])
    assert witness.serve() == Witness.SERVED


def test_garbage_from_a_vmm_ends_its_partition_alone(daemon: DaemonProcess, vmm: RawVmm) -> None:
    vp = vmm.vp()
    vmm.connection.send(b"\xc1")
    assert vmm.connection.farewell().name == "EBADMSG"
    assert vp.receive_all() == []
    eventually(lambda: vmm.partition_id in daemon.partition_ids(), False)


def test_garbage_behind_a_request_ends_the_connection_after_its_answer(vmm: RawVmm) -> None:
    vmm.connection.send(request("statistics") + b"\xc1" + request("statistics", msgid=2))
    answer, farewell = vmm.connection.receive_all()
    assert (answer[:2], farewell[:2], farewell[2][1]) == ([1, 1], [1, 0], "EBADMSG")


def test_a_second_intercept_before_the_answer_is_eproto_and_frees_the_vp(vmm: RawVmm) -> None:
    vmm.add_memory()
    notifier, vp = vmm.notifier(), vmm.vp()
    notifier.ask("invalidate_begin", WHOLE_MEMORY)
    vp.send(request("intercept", intercept_message(GFN, READ)))
    vp.send(request("intercept", intercept_message(GFN, READ), msgid=2))
    assert vp.farewell().name == "EPROTO"
    notifier.ask("invalidate_end", WHOLE_MEMORY)
    assert vmm.vp().intercept(GFN) == ["resume", "mapped"]
