"""Values that MessagePack libraries encode as another type, and the answers.

The bytes were written by the libraries that are named, of the versions in section 12 of the specification.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conformance.guests import UADDR, RawVmm, vma
from conformance.statements import statement
from conformance.wire import RawConnection, Refusal, intercept_message, pack, request

Connect = Callable[[], RawConnection]
HELLO = b"\x94\x00\x07\xa5hello\x91"
"""Up to the map."""
PLAIN = b"\xa8protocol\x01\xa4role\xa3vmm"
UNDEFINED = b"\xd4\x00\x00"
"""msgpackr's."""
FLOAT = b"\xcb\x42\xdf\xc0\x00\x00\x00\x00\x00"
"""`UADDR`, of msgpackr, msgpack-lite, and @msgpack/msgpack with useBigInt64."""
SIGNED = b"\xd3\x00\x00\x7f\x00\x00\x00\x00\x00"
"""`UADDR`, a BigInt of msgpackr."""


def map_vma_at(address: bytes) -> bytes:
    """`map_vma` with another encoding of its address."""
    return request("map_vma", vma(UADDR, 1)).replace(b"\xcf" + UADDR.to_bytes(8), address)


def old_bytes(value: bytes) -> bytes:
    """Of the format that had no `bin`: as text."""
    return b"\xda" + len(value).to_bytes(2) + value if len(value) > 31 else bytes([0xA0 | len(value)]) + value


def refusal_of(connection: RawConnection, sent: bytes) -> tuple[str, object]:
    """What is compared: the name and field of the error."""
    connection.send(sent)
    error = Refusal(*connection.receive()[2])
    return error.name, error.details.get("field")


@statement("T-4", "T-16")
def test_an_address_that_became_a_float_is_einval_and_a_signed_integer_is_as_good_as_an_unsigned_one(
    vmm: RawVmm,
) -> None:
    assert refusal_of(vmm.connection, map_vma_at(FLOAT)) == ("EINVAL", "start_uaddr")
    vmm.connection.send(map_vma_at(SIGNED))
    assert vmm.connection.answer() is None


@statement("T-4", "T-5")
@pytest.mark.parametrize(
    "fields",
    [b"\x83" + PLAIN + b"\xa4name\xc0", b"\xde\x00\x02" + PLAIN],
    ids=["undefined as nil", "msgpackr: 16-bit sizes"],
)
def test_nil_for_an_absent_field_and_any_size_of_a_map_are_understood(
    connect: Connect, fields: bytes
) -> None:
    connection = connect()
    connection.send(HELLO + fields)
    assert connection.answer(7)["protocol"] == 1


@statement("F-3")
@pytest.mark.parametrize(
    "fields",
    [
        b"\xde\x00\x03" + PLAIN + b"\xa4name" + UNDEFINED,
        b"\xd4\x72\x40\x92\xa8protocol\xa4role\x01\xa3vmm",
        b"\x83" + PLAIN + b"\xa4name\xa3\xed\xa0\x80",
        b"\x83" + PLAIN + b"\xa5token\xd8\x12" + bytes(16),
        b"\x83" + PLAIN + b"\xa5token\xd8\x1a" + bytes(16),
    ],
    ids=[
        "msgpackr: undefined",
        "msgpackr: a record",
        "@msgpack/msgpack: half a surrogate pair",
        "msgpack-lite: a Uint8Array",
        "msgpack-lite: an ArrayBuffer",
    ],
)
def test_an_ext_and_text_that_is_not_utf_8_are_ebadmsg_and_close(connect: Connect, fields: bytes) -> None:
    connection = connect()
    connection.send(HELLO + fields)
    assert connection.farewell().name == "EBADMSG"


@statement("T-5", "E-2")
def test_a_map_that_was_sent_empty_is_einval_that_names_the_first_required_field(connect: Connect) -> None:
    """A Map of @msgpack/msgpack, notepack.io and msgpack-lite."""
    connection = connect()
    connection.send(HELLO + b"\x80")
    assert connection.farewell(msgid=7).details.get("field") == "protocol"


@statement("T-4", "E-2")
@pytest.mark.parametrize("token", [old_bytes(b"0123456789abcdef"), b"\x80"], ids=["text", "an empty map"])
def test_bytes_that_were_sent_as_something_else_are_einval(
    vmm: RawVmm, connect: Connect, token: bytes
) -> None:
    """Python's msgpack without use_bin_type; an ArrayBuffer of @msgpack/msgpack."""
    connection = connect()
    fields = {"protocol": 1, "role": "notifier", "partition_id": vmm.partition_id}
    connection.send(HELLO + bytes([0x80 | 4]) + pack(fields)[1:] + b"\xa5token" + token)
    assert connection.farewell(msgid=7).details.get("field") == "token"


@statement("T-4", "F-3", "V-1")
def test_an_intercept_message_that_was_sent_as_text_is_einval_or_ebadmsg(vmm: RawVmm) -> None:
    """The type of a memory intercept is not UTF-8; a message of zeros is."""
    head = b"\x94\x00\x07\xa9intercept\x91"
    assert refusal_of(vmm.vp(), head + old_bytes(bytes(256))) == ("EINVAL", "params")
    vp = vmm.vp(1)
    vp.send(head + old_bytes(intercept_message(1, 0)))
    assert vp.farewell().name == "EBADMSG"


@statement("F-4", "F-5")
def test_names_that_were_sent_as_bytes_are_einval_as_keys_and_ebadmsg_as_the_method(vmm: RawVmm) -> None:
    assert refusal_of(vmm.connection, pack([0, 7, "translate", [{b"gfn": 1}]])) == ("EINVAL", "params")
    vmm.connection.send(pack([0, 7, b"statistics", []]))
    assert vmm.connection.farewell().name == "EBADMSG"
