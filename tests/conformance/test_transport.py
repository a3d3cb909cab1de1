"""Transport and framing: what a request is, what is answered, and what ends a connection."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from conformance.guests import GFN, MODEL, UADDR, WHOLE_MEMORY, RawVmm, vma
from conformance.statements import needs, statement
from conformance.wire import READ, RawConnection, intercept_message, pack, request

Connect = Callable[[], RawConnection]
HELLO = {"protocol": 1, "role": "vmm"}
MESSAGE_BYTES = 65536
HELLO_VALUES = 12
"""Values of a hello with one more field: itself, its elements, map, two keys and values, a key, its list."""
VALUES_BESIDE_A_LIST = 8
"""Of a request with one field, a list: itself, its elements, the map, the key and the list."""
NESTED = 13
"""Arrays and maps that may lie within a field of hello: 16, less message, params and map."""


def nested(levels: int) -> object:
    value: object = None
    for _ in range(levels):
        value = [value]
    return value


def padded_to(size: int) -> bytes:
    """A hello of exactly this size, by a field of zeros."""
    spare = size - len(request("hello", {**HELLO, "x": bytes(MESSAGE_BYTES // 2)})) + MESSAGE_BYTES // 2
    return request("hello", {**HELLO, "x": bytes(spare)})


@statement("T-1", "T-2", "T-8")
@pytest.mark.parametrize("msgid", [0, 1, 127, 128, 2**32 - 1])
def test_an_answer_repeats_the_msgid_of_its_request(connect: Connect, msgid: int) -> None:
    connection = connect()
    connection.send(request("hello", HELLO, msgid))
    kind, answered, error, result = connection.receive()
    assert (kind, answered, error, type(result)) == (1, msgid, None, dict)


@statement("T-1")
def test_a_request_that_comes_byte_by_byte_is_answered(connect: Connect) -> None:
    connection = connect()
    for byte in request("hello", HELLO):
        connection.send(bytes([byte]))
    assert connection.answer()["protocol"] == 1


@statement("T-3")
@pytest.mark.parametrize("params", [[], [{}]], ids=["no element", "an empty map"])
def test_a_method_that_requires_no_field_takes_no_params_and_empty_ones(
    vmm: RawVmm, params: list[object]
) -> None:
    vmm.connection.send(pack([0, 5, "statistics", params]))
    assert vmm.connection.answer(5)["regions"] == 0


@statement("T-3", "F-5", "E-2", "E-3")
@pytest.mark.parametrize(
    "params",
    [[{"gfn": 1}, {"gfn": 1}], [1], [None], [{b"gfn": 1}]],
    ids=["two", "no map", "nil", "bytes as key"],
)
def test_params_of_another_form_are_einval_and_the_connection_stays_open(
    vmm: RawVmm, params: list[object]
) -> None:
    vmm.connection.send(pack([0, 5, "translate", params]))
    _, msgid, error, _ = vmm.connection.receive()
    assert (msgid, error[1], error[3].get("field")) == (5, "EINVAL", "params")
    assert vmm.ask("translate", gfn=1) is None


@statement("T-4")
@pytest.mark.parametrize(
    "encoded",
    [
        b"\x94\x00\x01\xa5hello\x91\x82\xa8protocol\xcf\0\0\0\0\0\0\0\x01\xa4role\xa3vmm",
        b"\x94\x00\xd2\0\0\0\x01\xd9\x05hello\xdc\0\x01\xde\0\x02\xda\0\x08protocol\xd1\0\x01\xdb\0\0\0\x04role\xa3vmm",
        b"\xdd\0\0\0\x04\xcc\x00\xcd\0\x01\xa5hello\x91\xdf\0\0\0\x02\xa4role\xd9\x03vmm\xa8protocol\xd3\0\0\0\0\0\0\0\x01",
    ],
    ids=["u64", "signed, str 8 to 32, 16-bit sizes", "32-bit sizes, another order"],
)
def test_every_format_of_a_value_and_every_order_of_fields_is_understood(
    connect: Connect, encoded: bytes
) -> None:
    connection = connect()
    connection.send(encoded)
    assert connection.answer()["protocol"] == 1


@statement("T-4")
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"role": "notifier", "partition_id": 1, "token": "0123456789abcdef"}, "token"),
        ({"role": "vmm", "name": b"guest-a"}, "name"),
    ],
)
def test_text_for_bytes_and_bytes_for_text_are_einval(
    connect: Connect, fields: dict[str, object], field: str
) -> None:
    refusal = connect().refusal("hello", {"protocol": 1, **fields})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", field)


@statement("T-5")
def test_an_optional_field_that_is_nil_means_its_default(connect: Connect) -> None:
    connection = connect()
    connection.say_hello("vmm", name=None)
    partition = {"address_space": "declared", "hypervisor": "software"}
    assert connection.ask("create_partition", {**partition, "architecture": None, "remap": None})


@statement("T-5", "E-2")
@pytest.mark.parametrize("fields", [{}, {"gfn": None}], ids=["absent", "nil"])
def test_a_required_field_that_is_absent_or_nil_is_einval_that_names_it(
    vmm: RawVmm, fields: dict[str, object]
) -> None:
    refusal = vmm.connection.refusal("translate", fields)
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "gfn")


@statement("T-6", "E-2")
def test_an_unknown_field_is_einval_that_names_it(vmm: RawVmm) -> None:
    refusal = vmm.connection.refusal("translate", {"gfn": 1, "gpa": 4096})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "gpa")


@statement("T-7", "T-4")
@needs("notifier")
@pytest.mark.parametrize("head", [b"\x94", b"\xdc\0\x04"], ids=["shortest", "longer"])
@pytest.mark.parametrize("second", [b"\x94", request("intercept", bytes(256), 2)], ids=["a byte", "whole"])
def test_a_second_request_before_the_answer_is_eproto_and_closes(
    vmm: RawVmm, head: bytes, second: bytes
) -> None:
    """In any format of the first request."""
    vmm.add_memory()
    vmm.notifier().ask("invalidate_begin", WHOLE_MEMORY)
    vp = vmm.vp()
    vp.send(head + request("intercept", intercept_message(GFN, READ))[1:])
    vp.send(second)
    assert vp.farewell().name == "EPROTO"


@statement("T-7")
@pytest.mark.parametrize("second", [b"\x94", request("intercept", bytes(256), 2)], ids=["a byte", "whole"])
def test_a_request_of_a_vp_before_the_answer_to_its_hello_is_eproto_and_closes(
    vmm: RawVmm, connect: Connect, second: bytes
) -> None:
    connection = connect()
    fields = {"protocol": 1, "role": "vp", "vp_index": 0, **vmm.credentials}
    connection.send(request("hello", fields) + second)
    assert connection.farewell().name == "EPROTO"


@statement("T-19")
@pytest.mark.parametrize("pieces", [1, 2, 1000], ids=["at once", "in two", "byte by byte"])
def test_requests_before_the_answer_are_answered_in_order(vmm: RawVmm, pieces: int) -> None:
    stream = b"".join(request("translate", {"gfn": gfn}, gfn) for gfn in range(1, 21))
    size = -(-len(stream) // pieces)
    for at in range(0, len(stream), size):
        vmm.connection.send(stream[at : at + size])
    assert [vmm.connection.receive() for _ in range(20)] == [[1, msgid, None, None] for msgid in range(1, 21)]


@statement("T-19")
def test_a_whole_session_may_be_sent_at_once(connect: Connect) -> None:
    """Each request is carried out in the state that those before it left."""
    connection = connect()
    asked = [("hello", HELLO), ("create_partition", MODEL), ("map_vma", vma(UADDR, 1)), ("statistics", {})]
    connection.send(b"".join(request(method, fields, msgid) for msgid, (method, fields) in enumerate(asked)))
    replies = [connection.answer(msgid) for msgid in range(4)]
    assert (replies[2], replies[3]["vmas"]) == (None, 1)


@statement("T-19")
@needs("notifier")
def test_requests_of_a_notifier_before_the_answer_are_answered_in_order(vmm: RawVmm) -> None:
    notifier = vmm.notifier()
    methods = ["invalidate_begin", "invalidate", "invalidate_end", "invalidate_end"]
    notifier.send(b"".join(request(method, WHOLE_MEMORY, msgid) for msgid, method in enumerate(methods)))
    answers = [notifier.receive() for _ in methods]
    assert [(msgid, error and error[1]) for _, msgid, error, _ in answers] == [
        (0, None), (1, None), (2, None), (3, "ENOENT"),
    ]  # fmt: skip


@statement("T-19")
def test_requests_of_an_operator_before_the_answer_are_answered_in_order(operator: RawConnection) -> None:
    operator.send(b"".join(request("list_partitions", {}, msgid) for msgid in range(10)))
    assert [operator.receive()[:3] for _ in range(10)] == [[1, msgid, None] for msgid in range(10)]


@statement("T-19", "F-4")
def test_an_error_under_msgid_0_follows_the_answers_to_the_requests_before(vmm: RawVmm) -> None:
    vmm.connection.send(request("translate", {"gfn": 1}, 7) + b"\xc1" + request("translate", {"gfn": 1}, 8))
    answer, farewell = vmm.connection.receive_all()
    assert (answer, farewell[:2], farewell[2][1]) == ([1, 7, None, None], [1, 0], "EBADMSG")


@statement("T-8")
def test_a_method_without_a_reply_answers_nil_and_an_error_has_no_result(vmm: RawVmm) -> None:
    vmm.connection.send(request("kick", {"vp_index": "all"}, 3))
    assert vmm.connection.receive() == [1, 3, None, None]
    vmm.connection.send(request("kick", {"vp_index": 9}, 4))
    kind, msgid, error, result = vmm.connection.receive()
    assert (kind, msgid, error[1], result) == (1, 4, "ENOENT", None)


@statement("T-9")
def test_an_unexpected_descriptor_is_closed(vmm: RawVmm) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(10)
        vmm.connection.send(request("statistics"), [theirs.fileno()])
        theirs.close()
        assert vmm.connection.answer()["regions"] == 0
        assert ours.recv(1) == b""


@statement("T-11")
def test_requests_keep_the_pace_of_their_uid_and_are_all_answered(
    vmm: RawVmm, limits: dict[str, int]
) -> None:
    """A lower bound of the time: a slow machine takes longer."""
    pace = limits["control_requests_per_second"]
    if pace > 4000:
        pytest.skip(
            f"limits.control_requests_per_second is {pace}, faster than this case sends: set it lower"
        )
    asked, at_once = pace // 2, pace // 4
    started = time.monotonic()
    refused = [vmm.connection.refusal("no_such_method").name for _ in range(asked)]
    assert refused == ["ENOSYS"] * asked
    assert time.monotonic() - started >= (asked - at_once) / pace


@statement("T-12")
def test_a_request_is_answered_once(vmm: RawVmm) -> None:
    for msgid in (5, 6, 7):
        assert vmm.connection.ask("statistics", msgid=msgid)["regions"] == 0
    vmm.connection.half_close()
    assert vmm.connection.receive_all() == []


@statement("T-10")
def test_a_peer_that_shuts_down_its_sending_side_has_closed(connect: Connect) -> None:
    connection = connect()
    connection.say_hello("vmm")
    connection.half_close()
    assert connection.receive_all() == []


@statement("F-1")
def test_a_message_of_exactly_64_kib_is_read(connect: Connect) -> None:
    connection = connect()
    connection.send(padded_to(MESSAGE_BYTES))
    assert connection.farewell(msgid=1).details.get("field") == "x"


@statement("F-1")
@pytest.mark.parametrize(
    "sent",
    [
        padded_to(MESSAGE_BYTES + 1),
        b"\x94\x00\x01\xa5hello\x91\xc6\x00\x01\x00\x00",
        b"\x94\x00\x01\xa5hello\x91\xdd\xff\xff\xff\xff",
        b"\x94\x00\x01\xa5hello\x91\xdf\x00\x00\x80\x00",
    ],
    ids=["one byte more", "a length", "elements of an array", "pairs of a map"],
)
def test_more_than_64_kib_is_emsgsize_as_soon_as_it_is_announced(connect: Connect, sent: bytes) -> None:
    connection = connect()
    connection.send(sent)
    assert connection.farewell().name == "EMSGSIZE"


@statement("F-2")
def test_16_levels_are_read_and_17_are_ebadmsg(connect: Connect) -> None:
    deep, deeper = connect(), connect()
    deep.send(request("hello", {**HELLO, "x": nested(NESTED)}))
    deeper.send(request("hello", {**HELLO, "x": nested(NESTED + 1)}))
    assert deep.farewell(msgid=1).details.get("field") == "x"
    assert deeper.farewell().name == "EBADMSG"


@statement("F-6", "L-1")
def test_256_values_are_read_and_257_are_emsgsize(connect: Connect, limits: dict[str, int]) -> None:
    spare = limits["request_values"] - HELLO_VALUES
    many, too_many = connect(), connect()
    many.send(request("hello", {**HELLO, "x": [None] * spare}))
    too_many.send(request("hello", {**HELLO, "x": [None] * (spare + 1)}))
    assert many.farewell(msgid=1).details.get("field") == "x"
    assert too_many.farewell().name == "EMSGSIZE"


@statement("F-6", "L-1")
def test_a_vmm_that_has_said_hello_may_send_2048_values(connect: Connect, limits: dict[str, int]) -> None:
    spare = limits["request_values_vmm"] - VALUES_BESIDE_A_LIST
    many, too_many = connect(), connect()
    for connection in (many, too_many):
        connection.say_hello("vmm")
    refusal = many.refusal("statistics", {"x": [None] * spare})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "x")
    too_many.send(request("statistics", {"x": [None] * (spare + 1)}))
    assert too_many.farewell().name == "EMSGSIZE"


@needs("notifier")
@statement("F-8", "L-1")
@pytest.mark.parametrize("role", ["vp", "notifier"])
def test_a_request_of_a_connection_that_joins_may_have_1280_bytes(
    vmm: RawVmm, limits: dict[str, int], role: str
) -> None:
    joined = vmm.vp() if role == "vp" else vmm.notifier()
    beside = len(request("x", {"x": bytes(256)})) - 256
    blob = bytes(limits["request_bytes"] - beside)
    assert joined.refusal("x", {"x": blob}).name == "ENOSYS"
    joined.send(request("x", {"x": blob + b"\0"}))
    assert joined.farewell().name == "EMSGSIZE"


@statement("F-6")
@pytest.mark.parametrize("header", [b"\xdc\x40\x00", b"\xde\x20\x00"], ids=["elements", "pairs"])
def test_too_many_values_are_emsgsize_at_the_header_that_announces_them(
    connect: Connect, limits: dict[str, int], header: bytes
) -> None:
    if limits["request_values"] > 16384:
        pytest.skip(f"limits.request_values is {limits['request_values']}: no header here announces so many")
    connection = connect()
    connection.send(b"\x94\x00\x01\xa5hello\x91" + header)
    assert connection.farewell().name == "EMSGSIZE"


@statement("F-3", "F-7")
@pytest.mark.parametrize(
    "value",
    [b"\xc1", b"\xd4\x01\x00", b"\xc7\x01\x05\x00", b"\xa1\xff", b"\x81\x90\x00"],
    ids=["0xc1", "fixext", "ext 8", "no UTF-8", "an array as a key"],
)
def test_types_outside_the_protocol_are_ebadmsg_and_close(connect: Connect, value: bytes) -> None:
    connection = connect()
    connection.send(b"\x94\x00\x01\xa5hello\x91" + value)
    assert connection.farewell().name == "EBADMSG"


@statement("F-4", "F-7")
@pytest.mark.parametrize(
    "sent",
    [
        b"G", b"{", b"\x95", b"\x93\x00", b"\x94\x01", b"\x93\x02", b"\x94\x03", b"\x94\xc2",
        b"\x94\x00\xff\xa1m\x90", b"\x94\x00\xc3\xa1m\x90", b"\x94\x00\xcf\0\0\0\x01\0\0\0\0\xa1m\x90",
        b"\x94\x00\x01\x05\x90", b"\x94\x00\x01\xa1m\x80", b"\x94\x00\x01\xa1m\xc0",
    ],
    ids=lambda sent: sent.hex(),
)  # fmt: skip
def test_anything_but_a_request_is_ebadmsg_as_soon_as_that_is_certain(connect: Connect, sent: bytes) -> None:
    connection = connect()
    connection.send(sent)
    assert connection.farewell().name == "EBADMSG"


@statement("F-7")
@needs("notifier")
def test_garbage_on_one_connection_leaves_the_others_alone(connect: Connect, vmm: RawVmm) -> None:
    vmm.add_memory()
    notifier, vp = vmm.notifier(), vmm.vp()
    rude = vmm.notifier()
    rude.send(b"GET / HTTP/1.1\r\n")
    assert rude.farewell().name == "EBADMSG"
    assert notifier.ask("invalidate", WHOLE_MEMORY) is None
    assert vp.intercept(GFN) == ["resume", "mapped"]
    assert connect().say_hello("vmm")["protocol"] == 1


@statement("F-7")
def test_garbage_of_a_vmm_ends_its_partition_alone(connect: Connect, vmm: RawVmm) -> None:
    rude = connect()
    rude.say_hello("vmm")
    created: Any = rude.ask("create_partition", {"address_space": "declared", "hypervisor": "software"})
    rude.send(b"\xc1")
    assert rude.farewell().name == "EBADMSG"
    assert created["partition_id"] != vmm.partition_id
    assert vmm.ask("statistics")["regions"] == 0
