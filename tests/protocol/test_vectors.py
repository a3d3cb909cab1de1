"""The published vectors say what the code does, in both directions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from intercept_protocol import codec, rpc
from intercept_protocol import messages as m
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.events import EVENT_METHOD, EVENTS_DROPPED, EventName, decode_event
from intercept_protocol.hv_message import (
    Arm64MemoryIntercept,
    InterceptMessage,
    X64MemoryIntercept,
    memory_access,
)
from intercept_protocol.memory_intercept import MemoryAccessInfo, Segment
from intercept_protocol.outcomes import Answer

HERE = Path(__file__).parent
PROTOCOL = HERE.parents[1] / "protocol"
VECTORS = PROTOCOL / "vectors"
SPECIFICATION = (PROTOCOL / "README.md").read_text(encoding="utf-8")
TABLES = {
    "vmm": m.VMM_METHODS,
    "notifier": m.NOTIFIER_METHODS,
    "hypervisor": m.HYPERVISOR_METHODS,
    "operator": m.OPERATOR_METHODS,
}
FORMS = {"x86_64": X64MemoryIntercept, "arm64": Arm64MemoryIntercept}


def load(name: str) -> list[dict[str, object]]:
    return json.loads((VECTORS / name).read_text(encoding="utf-8"))


def from_json(value: object) -> object:
    match value:
        case {"hex": str(text)}:
            return bytes.fromhex(text)
        case dict():
            return {key: from_json(item) for key, item in value.items()}
        case list():
            return [from_json(item) for item in value]
        case _:
            return value


def receive(encoded: str, kind: int) -> rpc.Message | None:
    receiver = rpc.Receiver({kind})
    receiver.receive_data(bytes.fromhex(encoded))
    return receiver.next_message()


def decode(role: str, method: str, params: list[object]) -> m.Call[object]:
    if method == "hello":
        return codec.decode_hello(params)
    return codec.decode_call(TABLES[role], method, params)


def memory_intercept(
    architecture: str, fields: dict[str, object]
) -> X64MemoryIntercept | Arm64MemoryIntercept:
    typed = fields | {"access_info": MemoryAccessInfo(fields["access_info"])}
    if "cs_segment" in typed:
        typed["cs_segment"] = Segment(**typed["cs_segment"])
    return FORMS[architecture](**typed)


INTERCEPTS = load("intercept_messages.json")
MEMORY_INTERCEPTS = [vector for vector in INTERCEPTS if vector["memory"]]
METHODS = load("methods.json")
RESPONSES = load("responses.json")
ANSWERS = [vector for vector in RESPONSES if "result" in vector]
ERRORS = [vector for vector in RESPONSES if "error" in vector]


def test_files_are_as_the_generator_writes_them() -> None:
    done = subprocess.run(
        [sys.executable, HERE / "make_vectors.py", "--check"], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


def hex_blocks(text: str) -> list[str]:
    return ["".join(block.split()) for block in re.findall(r"```hex\n(.*?)```", text, flags=re.DOTALL)]


def published_hex() -> set[str]:
    return {
        value
        for path in VECTORS.glob("*.json")
        for vector in load(path.name)
        for value in vector.values()
        if isinstance(value, str)
    }


def test_hex_in_the_specification_is_in_the_vectors() -> None:
    blocks = hex_blocks(SPECIFICATION)

    assert len(blocks) >= 8
    assert [block for block in blocks if block not in published_hex()] == []


def test_events_hold_every_event_and_the_specification_names_them_and_their_fields() -> None:
    told = {vector["event"] for vector in load("events.json")}
    words = told | {field for vector in load("events.json") for field in vector["fields"]}

    assert told == {*EventName, EVENTS_DROPPED}
    assert {word for word in words if not re.search(rf"\b{word}\b", SPECIFICATION)} == set()


def test_specification_names_every_method_field_and_reason() -> None:
    forms = [form for table in TABLES.values() for form in table.values()] + list(m.HELLOS.values())
    replies = [
        m.HelloReply,
        m.PartitionStatistics,
        m.PartitionSummary,
        m.RegionView,
        m.VpView,
        m.DaemonStatistics,
    ]
    words = {form.METHOD for form in forms} | {answer.reason for answer in Answer} | {*m.HELLOS}
    words |= {field.name for form in (*forms, *replies) for field in msgspec.structs.fields(form)}

    assert {word for word in words if not re.search(rf"\b{word}\b", SPECIFICATION)} == set()


def test_statements_of_the_specification_are_numbered_once() -> None:
    numbers = re.findall(r"^- \*\*([A-Z]-\d+)\*\*", SPECIFICATION, flags=re.MULTILINE)

    assert len(numbers) > 50
    assert len(numbers) == len(set(numbers))


def test_methods_hold_every_method_of_every_role() -> None:
    expected = {(role, method) for role, table in TABLES.items() for method in table}
    expected |= {(role, "hello") for role in m.HELLOS}

    assert {(vector["role"], vector["method"]) for vector in METHODS} == expected


def test_responses_hold_every_answer() -> None:
    assert [tuple(vector["result"]) for vector in ANSWERS] == [answer.value for answer in Answer]


@pytest.mark.parametrize("vector", INTERCEPTS)
def test_intercept_message_is_decoded_to_its_header(vector: dict[str, object]) -> None:
    message = InterceptMessage.parse(bytes.fromhex(vector["hex"]))

    assert message.message_type == vector["message_type"]
    assert (message.known_type and message.known_type.name) == vector["type_name"]
    assert message.payload_size == vector["payload_size"]
    assert (message.message_flags, message.sender) == (vector["message_flags"], vector["sender"])


@pytest.mark.parametrize("vector", INTERCEPTS)
def test_intercept_message_is_decoded_to_its_memory_intercept(vector: dict[str, object]) -> None:
    message = InterceptMessage.parse(bytes.fromhex(vector["hex"]))

    assert (message.memory(m.Architecture(vector["architecture"])) is None) == (vector["memory"] is None)


@pytest.mark.parametrize("vector", MEMORY_INTERCEPTS)
def test_memory_intercept_is_built_from_its_fields(vector: dict[str, object]) -> None:
    message = InterceptMessage.parse(bytes.fromhex(vector["hex"]))
    expected = memory_intercept(vector["architecture"], from_json(vector["memory"]))

    assert message.memory(m.Architecture(vector["architecture"])) == expected
    assert message.payload.startswith(expected.build())


@pytest.mark.parametrize("vector", INTERCEPTS)
def test_intercept_message_is_served_as_it_says(vector: dict[str, object]) -> None:
    wanted = memory_access(bytes.fromhex(vector["hex"]), m.Architecture(vector["architecture"]))

    assert (wanted and {"gfn": wanted[0], "access": int(wanted[1])}) == vector["served"]


@pytest.mark.parametrize("vector", METHODS)
def test_request_is_decoded_to_its_fields_and_encoded_from_them(vector: dict[str, object]) -> None:
    fields = from_json(vector["fields"])

    request = receive(vector["request"], rpc.REQUEST)

    assert request == rpc.Request(vector["msgid"], vector["method"], [fields])
    assert codec.to_fields(decode(vector["role"], vector["method"], [fields])) == fields
    assert rpc.encode_request(vector["msgid"], vector["method"], [fields]).hex() == vector["request"]


@pytest.mark.parametrize("vector", METHODS)
def test_reply_is_decoded_to_its_result_and_encoded_from_it(vector: dict[str, object]) -> None:
    result = from_json(vector["result"])
    call = decode(vector["role"], vector["method"], [from_json(vector["fields"])])

    response = receive(vector["reply"], rpc.RESPONSE)

    assert response == rpc.Response(vector["msgid"], None, result)
    codec.decode_reply(call, result)  # of the form that the method answers with, or EPROTO
    assert rpc.encode_result(vector["msgid"], result).hex() == vector["reply"]


@pytest.mark.parametrize("vector", ANSWERS)
def test_answer_is_decoded_and_encoded(vector: dict[str, object]) -> None:
    assert receive(vector["hex"], rpc.RESPONSE) == rpc.Response(vector["msgid"], None, vector["result"])
    assert rpc.encode_result(vector["msgid"], vector["result"]).hex() == vector["hex"]


@pytest.mark.parametrize("vector", ERRORS)
def test_error_is_decoded_and_encoded(vector: dict[str, object]) -> None:
    error = WireError.from_wire(vector["error"])

    assert receive(vector["hex"], rpc.RESPONSE) == rpc.Response(vector["msgid"], vector["error"], None)
    assert rpc.encode_error(vector["msgid"], error).hex() == vector["hex"]


@pytest.mark.parametrize("vector", load("events.json"))
def test_event_is_decoded_to_its_fields_and_encoded_from_them(vector: dict[str, object]) -> None:
    notification = receive(vector["hex"], rpc.NOTIFICATION)

    assert notification == rpc.Notification(EVENT_METHOD, [vector["fields"]])
    event = decode_event(notification.params)
    assert (event.fact.event_name, event.to_fields()) == (vector["event"], vector["fields"])


@pytest.mark.parametrize("vector", load("refused.json") + load("refused_hellos.json"))
def test_refused_request_is_received_and_refused_as_it_says(vector: dict[str, object]) -> None:
    request = receive(vector["request"], rpc.REQUEST)
    assert isinstance(request, rpc.Request)

    with pytest.raises(WireError) as caught:
        decode(vector["role"], request.method, request.params)

    assert (caught.value.number, caught.value.name) == (vector["errno"], vector["error"])
    assert caught.value.details.get("field") == vector["field"]


@pytest.mark.parametrize("vector", load("malformed.json"))
def test_malformed_bytes_are_refused_as_soon_as_it_is_certain(vector: dict[str, object]) -> None:
    data, certain = bytes.fromhex(vector["hex"]), vector["certain_after"]
    receiver = rpc.Receiver({rpc.REQUEST})
    receiver.receive_data(data[: certain - 1])
    assert receiver.next_message() is None
    receiver.receive_data(data[certain - 1 :])

    with pytest.raises(ProtocolViolation) as caught:
        receiver.next_message()

    assert (caught.value.number, caught.value.name) == (vector["errno"], vector["error"])
