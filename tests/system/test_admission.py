"""Admission: the first request, the role, the socket, the partition and its token."""

from __future__ import annotations

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.raw_client import Connect, RawConnection, Refusal
from fakes.raw_vmm import RawVmm
from fakes.witness import Witness

JOINING_ROLES = {"vp": {"vp_index": 7}, "notifier": {}, "hypervisor": {}}


def refused_hello(connection: RawConnection, fields: object) -> Refusal:
    """The error that a hello is answered with, which must be the end of the connection."""
    refusal = connection.refusal("hello", fields)
    assert connection.receive_all() == []
    return refusal


@pytest.mark.parametrize("method", ["create_partition", "intercept", "list_partitions", "HELLO", ""])
def test_another_first_request_than_hello_is_eproto_and_closed(connect: Connect, method: str) -> None:
    connection = connect()
    connection.send(b"\x94\x00\x01" + bytes([0xA0 + len(method)]) + method.encode() + b"\x90")
    assert connection.farewell().name == "EPROTO"


@pytest.mark.parametrize("version", [0, 2, 1 << 63])
def test_another_protocol_version_is_eprotonosupport_whatever_else_it_says(
    connect: Connect, version: int
) -> None:
    refusal = refused_hello(connect(), {"protocol": version, "role": "vmm", "shape": "new"})
    assert (refusal.name, refusal.details) == ("EPROTONOSUPPORT", {"supported": [1]})


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (None, "protocol"),
        ({"role": "vmm"}, "protocol"),
        ({"protocol": "1", "role": "vmm"}, "protocol"),
        ({"protocol": None, "role": "vmm"}, "protocol"),
        ({"protocol": 1.0, "role": "vmm"}, "protocol"),
        ({"protocol": True, "role": "vmm"}, "protocol"),
        ({"protocol": 1}, "role"),
        ({"protocol": 1, "role": "root"}, "role"),
        ({"protocol": 1, "role": ["vmm"]}, "role"),
        ({"protocol": 1, "role": "vmm", "name": "n" * 65}, "name"),
        ({"protocol": 1, "role": "vmm", "name": b"n"}, "name"),
        ({"protocol": 1, "role": "vmm", "token": bytes(16)}, "token"),
        ({"protocol": 1, "role": "vp", "partition_id": 1, "vp_index": 0}, "token"),
        ({"protocol": 1, "role": "vp", "partition_id": 1, "vp_index": 0, "token": bytes(15)}, "token"),
        ({"protocol": 1, "role": "vp", "partition_id": 1, "vp_index": 0, "token": "t" * 16}, "token"),
        (
            {"protocol": 1, "role": "vp", "partition_id": -1, "vp_index": 0, "token": bytes(16)},
            "partition_id",
        ),
        (
            {"protocol": 1, "role": "vp", "partition_id": 1, "vp_index": 1 << 32, "token": bytes(16)},
            "vp_index",
        ),
        ([], "params"),
    ],
)
def test_a_hello_of_wrong_fields_is_einval_that_names_it_and_closed(
    connect: Connect, fields: object, field: str
) -> None:
    refusal = refused_hello(connect(), fields)
    assert (refusal.name, refusal.details["field"], field in refusal.message) == ("EINVAL", field, True)


@pytest.mark.parametrize("role", JOINING_ROLES)
def test_a_wrong_token_and_an_unknown_partition_are_one_error(
    connect: Connect, vmm: RawVmm, role: str
) -> None:
    hello = {"protocol": 1, "role": role, **JOINING_ROLES[role], **vmm.credentials}
    wrong_token = refused_hello(connect(), hello | {"token": bytes(16)})
    one_bit_off = refused_hello(connect(), hello | {"token": bytes([vmm.token[0] ^ 1]) + vmm.token[1:]})
    unknown = refused_hello(connect(), hello | {"partition_id": 1 << 60})
    assert wrong_token == one_bit_off == unknown
    assert (unknown.name, unknown.details) == ("EACCES", {})


def test_a_token_of_another_partition_is_refused(connect: Connect, vmm: RawVmm, witness: Witness) -> None:
    hello = {"protocol": 1, "role": "vp", "vp_index": 7, **witness.credentials, "token": vmm.token}
    assert refused_hello(connect(), hello).name == "EACCES"


def test_a_vp_index_that_is_attached_is_eexist_until_it_leaves(connect: Connect, vmm: RawVmm) -> None:
    vmm.vp(3)
    hello = {"protocol": 1, "role": "vp", "vp_index": 3, **vmm.credentials}
    refusal = refused_hello(connect(), hello)
    assert (refusal.name, refusal.details) == ("EEXIST", {"vp_index": 3})


def test_a_hypervisor_of_a_partition_that_has_the_software_one_is_einval(
    connect: Connect, vmm: RawVmm
) -> None:
    refusal = refused_hello(connect(), {"protocol": 1, "role": "hypervisor", **vmm.credentials})
    assert (refusal.name, refusal.details["field"]) == ("EINVAL", "role")


def test_an_operator_on_the_vmms_socket_is_eacces(connect: Connect) -> None:
    refusal = refused_hello(connect(), {"protocol": 1, "role": "operator"})
    assert (refusal.name, refusal.details) == ("EACCES", {"role": "operator"})


@pytest.mark.parametrize("role", JOINING_ROLES)
def test_a_role_that_joins_a_partition_on_the_operators_socket_is_eacces(
    daemon: DaemonProcess, vmm: RawVmm, role: str
) -> None:
    with RawConnection(daemon.operator_socket) as connection:
        hello = {"protocol": 1, "role": role, **JOINING_ROLES[role], **vmm.credentials}
        refusal = refused_hello(connection, hello)
    assert (refusal.name, refusal.details) == ("EACCES", {"role": role})


def test_a_vmm_on_the_operators_socket_is_eacces(daemon: DaemonProcess, witness: Witness) -> None:
    with RawConnection(daemon.operator_socket) as connection:
        refusal = refused_hello(connection, {"protocol": 1, "role": "vmm"})
    assert (refusal.name, refusal.details) == ("EACCES", {"role": "vmm"})
    assert witness.serve() == Witness.SERVED


@pytest.mark.parametrize("method", ["create_partition", "translate", "intercept", "invalidate", "hello"])
def test_a_method_that_is_not_an_operators_is_enosys(
    daemon: DaemonProcess, witness: Witness, method: str
) -> None:
    assert witness.serve() == Witness.SERVED
    assert daemon.operator().refusal(method).name == "ENOSYS"


@pytest.mark.parametrize("method", ["inspect_partition", "set_policy"])
def test_an_operator_asking_for_a_partition_that_is_not_there_is_enoent(
    daemon: DaemonProcess, witness: Witness, method: str
) -> None:
    refusal = daemon.operator().refusal(method, {"partition_id": witness.partition_id + 1})
    assert (refusal.name, refusal.details) == ("ENOENT", {"partition_id": witness.partition_id + 1})


def test_a_vmm_that_dribbles_its_hello_is_served(connect: Connect, witness: Witness) -> None:
    connection = connect()
    for byte in bytes.fromhex("94000aa568656c6c6f9182a4726f6c65a3766d6da870726f746f636f6c01"):
        connection.send(bytes([byte]))
        assert witness.first_vp.intercept(0) == ["forward", "no_region"]
    assert connection.answer(msgid=10)["protocol"] == 1
