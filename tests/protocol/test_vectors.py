"""The published vectors say what the code does, in both directions."""

from __future__ import annotations

import re

import msgspec
import pytest

from intercept_protocol import codec, rpc
from intercept_protocol import messages as m
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.events import EVENT_METHOD, EVENTS_DROPPED, EventName, decode_event
from intercept_protocol.hv_message import (
    Arm64MemoryIntercept,
    InterceptMessage,
    MemoryIntercept,
    X64MemoryIntercept,
    memory_access,
)
from intercept_protocol.outcomes import Answer
from wire_vectors.files import FILES, text_of
from wire_vectors.forms import (
    DIRECTORY,
    EventVector,
    ExchangeVector,
    InterceptVector,
    MalformedVector,
    RefusalVector,
    ResponseVector,
    Served,
    from_json,
    load,
    map_from_json,
)

SPECIFICATION = (DIRECTORY.parent / "README.md").read_text(encoding="utf-8")
TABLES = {
    "vmm": m.VMM_METHODS,
    "notifier": m.NOTIFIER_METHODS,
    "hypervisor": m.HYPERVISOR_METHODS,
    "operator": m.OPERATOR_METHODS,
}
FORMS: dict[m.Architecture, type[MemoryIntercept]] = {
    m.Architecture.X86_64: X64MemoryIntercept,
    m.Architecture.ARM64: Arm64MemoryIntercept,
}
INTERCEPTS = load("intercept_messages.json", InterceptVector)
METHODS = load("methods.json", ExchangeVector)
RESPONSES = load("responses.json", ResponseVector)
ANSWERS = [vector for vector in RESPONSES if vector.result]
ERRORS = [vector for vector in RESPONSES if vector.error]
EVENTS = load("events.json", EventVector)


def receive(encoded: str, kind: int) -> rpc.Message | None:
    receiver = rpc.Receiver({kind})
    receiver.receive_data(bytes.fromhex(encoded))
    return receiver.next_message()


def decode(role: str, method: str, params: list[object]) -> m.Call[object]:
    if method == "hello":
        return codec.decode_hello(params)
    return codec.decode_call(TABLES[role], method, params)


def memory_intercept(vector: InterceptVector) -> MemoryIntercept | None:
    if vector.memory is None:
        return None
    fields = map_from_json(vector.memory)
    return msgspec.convert(fields, FORMS[vector.architecture], builtin_types=(bytes,))


MEMORY_INTERCEPTS = [(vector, memory) for vector in INTERCEPTS if (memory := memory_intercept(vector))]


@pytest.mark.parametrize("name", FILES)
def test_file_is_as_its_examples_write_it(name: str) -> None:
    assert (DIRECTORY / name).read_text(encoding="utf-8") == text_of(name)


def test_every_file_has_its_examples() -> None:
    assert {path.name for path in DIRECTORY.iterdir()} == {*FILES}


def hex_blocks(text: str) -> list[str]:
    return ["".join(block.split()) for block in re.findall(r"```hex\n(.*?)```", text, flags=re.DOTALL)]


def published_hex() -> set[str]:
    return {
        value
        for examples in FILES.values()
        for vector in examples()
        for value in msgspec.structs.asdict(vector).values()
        if isinstance(value, str)
    }


def test_hex_in_the_specification_is_in_the_vectors() -> None:
    blocks = hex_blocks(SPECIFICATION)

    assert len(blocks) >= 8
    assert [block for block in blocks if block not in published_hex()] == []


def test_events_hold_every_event_and_the_specification_names_them_and_their_fields() -> None:
    told = {vector.event for vector in EVENTS}
    words = told | {field for vector in EVENTS for field in vector.fields}

    assert told == {*EventName, EVENTS_DROPPED}
    assert {word for word in words if not re.search(rf"\b{word}\b", SPECIFICATION)} == set()


def test_specification_names_every_method_field_and_reason() -> None:
    calls = [*(call for table in TABLES.values() for call in table.values()), *m.HELLOS.values()]
    replies: list[type[msgspec.Struct]] = [
        m.HelloReply,
        m.PartitionStatistics,
        m.PartitionSummary,
        m.RegionView,
        m.VpView,
        m.DaemonStatistics,
    ]
    words = {call.METHOD for call in calls} | {answer.reason for answer in Answer} | {*m.HELLOS}
    words |= {field.name for form in [*calls, *replies] for field in msgspec.structs.fields(form)}

    assert {word for word in words if not re.search(rf"\b{word}\b", SPECIFICATION)} == set()


def test_statements_of_the_specification_are_numbered_once() -> None:
    numbers = re.findall(r"^- \*\*([A-Z]-\d+)\*\*", SPECIFICATION, flags=re.MULTILINE)

    assert len(numbers) > 50
    assert len(numbers) == len(set(numbers))


def test_methods_hold_every_method_of_every_role() -> None:
    expected = {(role, method) for role, table in TABLES.items() for method in table}
    expected |= {(role, "hello") for role in m.HELLOS}

    assert {(vector.role, vector.method) for vector in METHODS} == expected


def test_responses_hold_every_answer() -> None:
    assert [vector.result for vector in ANSWERS] == [[*answer.value] for answer in Answer]


@pytest.mark.parametrize("vector", INTERCEPTS)
def test_intercept_message_is_decoded_to_its_header(vector: InterceptVector) -> None:
    message = InterceptMessage.parse(bytes.fromhex(vector.hex))

    assert message.message_type == vector.message_type
    assert (message.known_type and message.known_type.name) == vector.type_name
    assert message.payload_size == vector.payload_size
    assert (message.message_flags, message.sender) == (vector.message_flags, vector.sender)


@pytest.mark.parametrize("vector", INTERCEPTS)
def test_intercept_message_is_decoded_to_its_memory_intercept(vector: InterceptVector) -> None:
    message = InterceptMessage.parse(bytes.fromhex(vector.hex))

    assert message.memory(vector.architecture) == memory_intercept(vector)


@pytest.mark.parametrize(("vector", "memory"), MEMORY_INTERCEPTS)
def test_memory_intercept_is_built_from_its_fields(vector: InterceptVector, memory: MemoryIntercept) -> None:
    assert InterceptMessage.parse(bytes.fromhex(vector.hex)).payload.startswith(memory.build())


@pytest.mark.parametrize("vector", INTERCEPTS)
def test_intercept_message_is_served_as_it_says(vector: InterceptVector) -> None:
    wanted = memory_access(bytes.fromhex(vector.hex), vector.architecture)

    assert (wanted and Served(*wanted)) == vector.served


@pytest.mark.parametrize("vector", METHODS)
def test_request_is_decoded_to_its_fields_and_encoded_from_them(vector: ExchangeVector) -> None:
    fields = map_from_json(vector.fields)

    request = receive(vector.request, rpc.REQUEST)

    assert request == rpc.Request(vector.msgid, vector.method, [fields])
    assert codec.to_fields(decode(vector.role, vector.method, [fields])) == fields
    assert rpc.encode_request(vector.msgid, vector.method, [fields]).hex() == vector.request


@pytest.mark.parametrize("vector", METHODS)
def test_reply_is_decoded_to_its_result_and_encoded_from_it(vector: ExchangeVector) -> None:
    result = from_json(vector.result)
    call = decode(vector.role, vector.method, [map_from_json(vector.fields)])

    response = receive(vector.reply, rpc.RESPONSE)

    assert response == rpc.Response(vector.msgid, None, result)
    codec.decode_reply(call, result)  # of the form that the method answers with, or EPROTO
    assert rpc.encode_result(vector.msgid, result).hex() == vector.reply


@pytest.mark.parametrize("vector", ANSWERS)
def test_answer_is_decoded_and_encoded(vector: ResponseVector) -> None:
    assert receive(vector.hex, rpc.RESPONSE) == rpc.Response(vector.msgid, None, vector.result)
    assert rpc.encode_result(vector.msgid, vector.result).hex() == vector.hex


@pytest.mark.parametrize("vector", ERRORS)
def test_error_is_decoded_and_encoded(vector: ResponseVector) -> None:
    error = WireError.from_wire(vector.error)

    assert receive(vector.hex, rpc.RESPONSE) == rpc.Response(vector.msgid, vector.error, None)
    assert rpc.encode_error(vector.msgid, error).hex() == vector.hex


@pytest.mark.parametrize("vector", EVENTS)
def test_event_is_decoded_to_its_fields_and_encoded_from_them(vector: EventVector) -> None:
    notification = receive(vector.hex, rpc.NOTIFICATION)

    assert notification == rpc.Notification(EVENT_METHOD, [vector.fields])
    event = decode_event([vector.fields])
    assert event is not None
    assert (event.fact.event_name, event.to_fields()) == (vector.event, vector.fields)


@pytest.mark.parametrize(
    "vector", load("refused.json", RefusalVector) + load("refused_hellos.json", RefusalVector)
)
def test_refused_request_is_received_and_refused_as_it_says(vector: RefusalVector) -> None:
    request = receive(vector.request, rpc.REQUEST)
    assert isinstance(request, rpc.Request)

    with pytest.raises(WireError) as caught:
        decode(vector.role, request.method, request.params)

    assert (caught.value.number, caught.value.name) == (vector.errno, vector.error)
    assert caught.value.details.get("field") == vector.field


@pytest.mark.parametrize("vector", load("malformed.json", MalformedVector))
def test_malformed_bytes_are_refused_as_soon_as_it_is_certain(vector: MalformedVector) -> None:
    data = bytes.fromhex(vector.hex)
    receiver = rpc.Receiver({rpc.REQUEST})
    receiver.receive_data(data[: vector.certain_after - 1])
    assert receiver.next_message() is None
    receiver.receive_data(data[vector.certain_after - 1 :])

    with pytest.raises(ProtocolViolation) as caught:
        receiver.next_message()

    assert (caught.value.number, caught.value.name) == (vector.errno, vector.error)
