"""Errors as they travel: four elements, whose number, name and details a program can go by."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from conformance.guests import MODEL, RawVmm
from conformance.statements import statement
from conformance.wire import RawConnection, request

Refused = tuple[str, object]


def raw_error(connection: RawConnection, method: str, fields: object) -> list[object]:
    connection.send(request(method, fields))
    error: list[object] = connection.receive()[2]
    return error


@statement("E-1")
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("translate", {}),
        ("kick", {"vp_index": 200}),
        ("create_partition", MODEL),
        ("no_such_method", {}),
    ],
)
def test_an_error_is_the_errno_of_linux_its_name_a_sentence_and_a_map(
    vmm: RawVmm, method: str, fields: object
) -> None:
    number, name, message, details = raw_error(vmm.connection, method, fields)
    assert isinstance(number, int)
    assert (errno.errorcode[number], type(message), type(details)) == (name, str, dict)


@statement("E-3", "F-5")
def test_after_an_error_under_the_requests_own_msgid_the_connection_continues(vmm: RawVmm) -> None:
    for msgid in (5, 6, 7):
        vmm.connection.send(request("translate", {}, msgid))
        assert vmm.connection.receive()[1] == msgid
    assert vmm.ask("statistics")["regions"] == 0


@statement("E-1", "F-7")
def test_an_error_under_msgid_0_is_of_the_same_form(connect: Callable[[], RawConnection]) -> None:
    connection = connect()
    connection.send(b"GET / HTTP/1.1\r\n")
    refusal = connection.farewell()
    assert (refusal.number, refusal.name, type(refusal.message), type(refusal.details)) == (
        74,
        "EBADMSG",
        str,
        dict,
    )
