"""`hello`: who may connect, to which socket, and what the server says of itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from conformance.conftest import Server
from conformance.guests import RawVmm
from conformance.statements import needs, statement
from conformance.wire import ConnectionClosed, RawConnection, Refusal, Refused, request

Connect = Callable[[], RawConnection]
PATIENCE_MS = 10_000
"""The longest wait to be tried."""


def field_refused(connection: RawConnection, fields: object) -> object:
    """The field for which a hello is refused, under its own msgid; then the connection is closed."""
    connection.send(request("hello", fields, 7))
    refusal = connection.farewell(msgid=7)
    assert refusal.name == "EINVAL"
    return refusal.details.get("field")


def refusal_of_one_too_many(path: Path, role: str, limit: int) -> Refusal:
    """The refusal of the first connection that is not accepted; the server may have others."""
    with ExitStack() as opened:
        try:
            for _ in range(limit + 1):
                connection = opened.enter_context(RawConnection(path))
                connection.say_hello(role)
                opened.callback(connection.leave)
        except Refused as refused:
            return refused.refusal
    raise AssertionError(f"{limit + 1} of role {role} were accepted")


@statement("H-1")
def test_a_first_request_other_than_hello_is_eproto_under_msgid_0(connect: Connect) -> None:
    connection = connect()
    connection.send(request("statistics", msgid=7))
    assert connection.farewell().name == "EPROTO"


@statement("H-2")
@pytest.mark.parametrize("said", [b"", request("hello")[:-1]], ids=["nothing", "most of it"])
def test_a_hello_that_does_not_come_in_time_is_etimedout(
    connect: Connect, limits: dict[str, int], said: bytes
) -> None:
    if limits["hello_timeout_ms"] > PATIENCE_MS:
        pytest.skip(f"limits.hello_timeout_ms is {limits['hello_timeout_ms']}, too long to wait for")
    connection = connect()
    connection.send(said)
    assert connection.farewell().name == "ETIMEDOUT"


@statement("H-3")
def test_a_connection_over_the_limit_of_those_without_hello_is_eagain(
    server: Server, limits: dict[str, int]
) -> None:
    if limits["connections_without_hello"] > 600:
        pytest.skip(
            f"limits.connections_without_hello is {limits['connections_without_hello']}: set it lower"
        )
    with ExitStack() as opened:
        for _ in range(limits["connections_without_hello"]):
            opened.callback(opened.enter_context(RawConnection(server.socket)).leave)
        refusal = opened.enter_context(RawConnection(server.socket)).farewell()
    assert (refusal.name, refusal.details.get("limit")) == ("EAGAIN", "connections_without_hello")


@statement("H-13", "L-1")
def test_a_connection_over_the_limit_of_its_uid_is_enospc_under_msgid_0(
    connect: Connect, vmm: RawVmm, limits: dict[str, int]
) -> None:
    """The uid may have other connections; accepted ones stay."""
    if limits["connections_per_uid"] > min(600, limits["vps_per_partition"]):
        pytest.skip(f"limits.connections_per_uid is {limits['connections_per_uid']}: set it lower")
    first = vmm.vp(0)
    inside: list[RawConnection] = []
    for vp_index in range(1, limits["connections_per_uid"] + 1):
        connection = connect()
        connection.send(
            request("hello", {"protocol": 1, "role": "vp", "vp_index": vp_index, **vmm.credentials})
        )
        _, msgid, error, _ = connection.receive()
        if error is not None:
            break
        inside.append(connection)
    refusal = Refusal(*error)
    assert (msgid, refusal.name, refusal.details.get("limit")) == (0, "ENOSPC", "connections_per_uid")
    assert connection.receive_all() == []
    assert first.intercept(0) == ["forward", "no_region"]
    for vp in inside:
        vp.leave()


@statement("H-4", "E-3")
def test_a_refused_hello_is_answered_under_its_own_msgid_and_closed(connect: Connect) -> None:
    assert field_refused(connect(), {"protocol": 1, "role": "admin"}) == "role"


@statement("H-5", "P-3")
def test_a_second_hello_is_an_unknown_method(vmm: RawVmm) -> None:
    refusal = vmm.connection.refusal("hello", {"protocol": 1, "role": "vmm"})
    assert (refusal.name, vmm.ask("statistics")["regions"]) == ("ENOSYS", 0)


@statement("H-6")
@pytest.mark.parametrize(
    "fields", [{"protocol": 2}, {"protocol": 0, "role": "admin"}, {"protocol": 2**64 - 1, "x": 1}]
)
def test_another_version_is_eprotonosupport_that_lists_the_supported_ones_whatever_else_it_says(
    connect: Connect, fields: dict[str, object]
) -> None:
    connection = connect()
    connection.send(request("hello", fields, 7))
    refusal = connection.farewell(msgid=7)
    assert (refusal.name, refusal.details.get("supported")) == ("EPROTONOSUPPORT", [1])


@statement("H-6")
@pytest.mark.parametrize("protocol", [{}, {"protocol": None}, {"protocol": "1"}, {"protocol": True}])
def test_a_protocol_that_is_not_an_integer_is_einval(connect: Connect, protocol: dict[str, object]) -> None:
    assert field_refused(connect(), {"role": "vmm", **protocol}) == "protocol"


@statement("H-6")
@pytest.mark.parametrize("role", [{}, {"role": None}, {"role": 3}, {"role": "guest"}])
def test_an_unknown_role_is_einval(connect: Connect, role: dict[str, object]) -> None:
    assert field_refused(connect(), {"protocol": 1, "x": 1, **role}) == "role"


@statement("H-7")
def test_operators_are_eacces_on_the_vmms_socket(connect: Connect) -> None:
    connection = connect()
    connection.send(request("hello", {"protocol": 1, "role": "operator"}))
    assert connection.farewell(msgid=1).name == "EACCES"


@statement("H-7")
def test_vmms_are_eacces_on_the_operators_socket(server: Server) -> None:
    if server.operator_socket is None:
        pytest.skip("no --operator-socket PATH was given")
    with RawConnection(server.operator_socket) as connection:
        connection.send(request("hello", {"protocol": 1, "role": "vmm"}))
        assert connection.farewell(msgid=1).name == "EACCES"


@statement("H-8", "P-6")
@pytest.mark.parametrize("role", ["vp", "notifier", "hypervisor"])
def test_an_unknown_partition_and_a_wrong_token_are_one_error(
    connect: Connect, vmm: RawVmm, role: str
) -> None:
    vp_index = {"vp_index": 0} if role == "vp" else {}
    joining = {"protocol": 1, "role": role, **vp_index}

    def refused(partition_id: int, token: bytes) -> Refusal:
        return connect().refusal("hello", {**joining, "partition_id": partition_id, "token": token})

    wrong_token = refused(vmm.partition_id, bytes(16))
    last_byte = refused(vmm.partition_id, vmm.token[:-1] + bytes([vmm.token[-1] ^ 1]))
    unknown = refused(2**63, vmm.token)
    assert (wrong_token.name, wrong_token) == ("EACCES", unknown)
    assert last_byte == unknown


@statement("H-8")
def test_the_token_of_another_partition_is_eacces(server: Server, connect: Connect, vmm: RawVmm) -> None:
    with RawVmm(server.socket) as other:
        joining = {"protocol": 1, "role": "notifier", "partition_id": vmm.partition_id}
        assert connect().refusal("hello", {**joining, "token": other.token}).name == "EACCES"


@statement("H-8")
@needs("notifier")
def test_a_partition_that_ended_is_eacces(connect: Connect, server: Server) -> None:
    with RawVmm(server.socket) as gone:
        notifier = gone.notifier()
        gone.connection.close()
        assert notifier.receive_all() == []
    fields = {"protocol": 1, "role": "notifier", **gone.credentials}
    assert connect().refusal("hello", fields).name == "EACCES"


@statement("H-10")
def test_an_index_that_is_attached_is_eexist_and_free_when_its_connection_has_ended(
    connect: Connect, vmm: RawVmm
) -> None:
    first = vmm.vp(3)
    fields = {"protocol": 1, "role": "vp", "vp_index": 3, **vmm.credentials}
    assert connect().refusal("hello", fields).name == "EEXIST"
    first.half_close()
    assert first.receive_all() == []
    assert connect().ask("hello", fields)["protocol"] == 1


@statement("H-10")
def test_an_index_at_the_limit_is_einval(connect: Connect, vmm: RawVmm, limits: dict[str, int]) -> None:
    limit = limits["vps_per_partition"]
    assert vmm.vp(limit - 1).intercept(0) == ["forward", "no_region"]
    fields = {"protocol": 1, "role": "vp", "vp_index": limit, **vmm.credentials}
    assert field_refused(connect(), fields) == "vp_index"


@statement("H-11", "L-1")
@needs("notifier")
def test_one_notifier_too_many_is_enospc_that_names_the_limit(
    connect: Connect, vmm: RawVmm, limits: dict[str, int]
) -> None:
    for _ in range(limits["notifiers_per_partition"]):
        last = vmm.notifier()
    connection = connect()
    connection.send(request("hello", {"protocol": 1, "role": "notifier", **vmm.credentials}))
    refusal = connection.farewell(msgid=1)
    assert (refusal.name, refusal.details.get("limit")) == ("ENOSPC", "notifiers_per_partition")
    assert last.ask("invalidate", {"start_uaddr": 0, "length": 4096}) is None


@statement("H-12")
def test_a_hypervisor_of_a_partition_that_has_the_servers_is_einval(connect: Connect, vmm: RawVmm) -> None:
    assert field_refused(connect(), {"protocol": 1, "role": "hypervisor", **vmm.credentials}) == "role"


@statement("H-12")
def test_a_second_hypervisor_is_eexist(connect: Connect, hosted: RawVmm) -> None:
    hosted.link()
    fields = {"protocol": 1, "role": "hypervisor", **hosted.credentials}
    assert connect().refusal("hello", fields).name == "EEXIST"


@statement("H-14")
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"role": "vmm", "token": bytes(16)}, "token"),
        ({"role": "vmm", "name": "x" * 65}, "name"),
        ({"role": "vmm", "name": "a\nb"}, "name"),
        ({"role": "notifier", "partition_id": 1}, "token"),
        ({"role": "notifier", "partition_id": 1, "token": bytes(15)}, "token"),
        ({"role": "notifier", "partition_id": -1, "token": bytes(16)}, "partition_id"),
        ({"role": "vp", "partition_id": 1, "token": bytes(16)}, "vp_index"),
        ({"role": "vp", "partition_id": 1, "token": bytes(16), "vp_index": 1 << 32}, "vp_index"),
    ],
)
def test_a_field_that_the_role_has_not_or_has_otherwise_is_einval_that_names_it(
    connect: Connect, fields: dict[str, object], field: str
) -> None:
    assert field_refused(connect(), {"protocol": 1, **fields}) == field


@statement("H-14")
def test_a_name_of_64_characters_is_taken(connect: Connect) -> None:
    assert connect().say_hello("vmm", name="ü" * 64)["protocol"] == 1


@statement("H-15", "L-1")
def test_the_answer_says_protocol_server_version_limits_and_features(hello: dict[str, Any]) -> None:
    assert hello["protocol"] == 1
    assert {type(hello[key]) for key in ("server", "version")} == {str}
    assert all(type(key) is str and type(value) is int for key, value in hello["limits"].items())
    features = hello["features"]
    assert set(features["architectures"]) <= {"x86_64", "arm64"}
    assert ("declared" in features["address_spaces"], "software" in features["hypervisors"]) == (True, True)
    assert type(features["kept"]) is bool
    assert features.get("chaos", 1), "chaos is there only if the server adds delays"


@statement("H-11")
def test_one_vmm_too_many_is_enospc_that_names_the_limit(server: Server, limits: dict[str, int]) -> None:
    if limits["vmms_per_uid"] > 600:
        pytest.skip(f"limits.vmms_per_uid is {limits['vmms_per_uid']}: set it lower")
    refusal = refusal_of_one_too_many(server.socket, "vmm", limits["vmms_per_uid"])
    assert (refusal.name, refusal.details.get("limit")) == ("ENOSPC", "vmms_per_uid")


@statement("H-11")
@needs("operator")
def test_one_operator_too_many_is_enospc_that_names_the_limit(server: Server, limits: dict[str, int]) -> None:
    if server.operator_socket is None:
        pytest.skip("no --operator-socket PATH was given")
    refusal = refusal_of_one_too_many(server.operator_socket, "operator", limits["operators"])
    assert (refusal.name, refusal.details.get("limit")) == ("ENOSPC", "operators")


@statement("H-4")
def test_nothing_is_answered_after_a_refused_hello(connect: Connect) -> None:
    connection = connect()
    assert connection.refusal("hello", {"protocol": 2}).name == "EPROTONOSUPPORT"
    connection.send(request("hello", {"protocol": 1, "role": "vmm"}))
    with pytest.raises(ConnectionClosed):
        connection.receive()
