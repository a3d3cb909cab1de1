"""Values that look like others: floats and booleans for integers, keys that come twice, and msgid 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conformance.guests import GFN, UADDR, RawVmm, region
from conformance.statements import statement
from conformance.wire import RawConnection, request

Connect = Callable[[], RawConnection]
HELLO = {"protocol": 1, "role": "vmm"}


@statement("T-16")
@pytest.mark.parametrize("gfn", [1.0, True, -1, "1", b"1"], ids=repr)
def test_a_non_integer_is_einval_that_names_the_field(vmm: RawVmm, gfn: object) -> None:
    refusal = vmm.connection.refusal("translate", {"gfn": gfn})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "gfn")


@statement("T-16")
@pytest.mark.parametrize("executable", [1, 1.0, "true"], ids=repr)
def test_a_non_boolean_is_einval_that_names_the_field(vmm: RawVmm, executable: object) -> None:
    refusal = vmm.connection.refusal("add_region", region(GFN, 1, UADDR, executable=executable))
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "executable")


@statement("T-16", "F-4")
@pytest.mark.parametrize("msgid", [1.0, True, -1, 2**32, "1", None], ids=repr)
def test_a_msgid_that_is_not_an_integer_of_32_bits_is_ebadmsg(connect: Connect, msgid: object) -> None:
    connection = connect()
    connection.send(request("hello", HELLO, msgid))
    assert connection.farewell().name == "EBADMSG"


@statement("T-17")
def test_msgid_0_is_answered_and_the_connection_stays_open(vmm: RawVmm) -> None:
    assert vmm.connection.ask("statistics", msgid=0)["regions"] == 0
    assert vmm.connection.refusal("translate").name == "EINVAL"
    assert vmm.connection.ask("statistics", msgid=0)["regions"] == 0


@statement("T-18")
@pytest.mark.parametrize("first", [b"\x01", b"\x90", b"\xa1x"], ids=["a number", "an array", "text"])
def test_the_last_value_of_a_key_that_comes_twice_counts(connect: Connect, first: bytes) -> None:
    connection = connect()
    fields = b"\xa4role" + first + b"\xa8protocol\x01\xa4role\xa3vmm"
    connection.send(b"\x94\x00\x01\xa5hello\x91\x83" + fields)
    assert connection.answer()["protocol"] == 1


@statement("T-18")
def test_a_wrong_last_value_of_a_key_that_comes_twice_is_einval(connect: Connect) -> None:
    connection = connect()
    connection.send(b"\x94\x00\x01\xa5hello\x91\x83\xa8protocol\x01\xa4role\xa3vmm\xa4role\x01")
    assert connection.farewell(msgid=1).details.get("field") == "role"
