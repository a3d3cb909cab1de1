"""Errors through both ends of the wire."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol.errors import ProtocolViolation, WireError, error_name, unwatched
from intercept_protocol.text import visible

details = st.dictionaries(st.text(), st.integers(0, 2**64 - 1) | st.text() | st.lists(st.integers(0, 9)))


@given(st.integers(1, 200), st.text(), details)
def test_error_survives_to_wire_and_from_wire(number: int, message: str, details: dict[str, object]) -> None:
    received = WireError.from_wire(WireError(number, message, **details).to_wire())

    assert (received.number, received.message, received.details) == (number, visible(message), details)


def test_text_quoted_from_outside_is_escaped_at_both_ends() -> None:
    hostile = "the file /tmp/\udcff\x1b[2J\u202e"
    shown = "the file /tmp/\\udcff\\x1b[2J\\u202e"

    assert WireError(errno.EINVAL, hostile).message == shown
    assert str(WireError.from_wire([22, "EINVAL", hostile, {}])) == f"EINVAL: {shown}"


def test_to_wire_is_number_name_message_details() -> None:
    error = WireError(errno.EEXIST, "taken", start_gfn=0x100)

    assert error.to_wire() == [17, "EEXIST", "taken", {"start_gfn": 0x100}]


def test_to_wire_without_details_is_an_empty_map() -> None:
    assert WireError(errno.ENOENT, "none").to_wire() == [2, "ENOENT", "none", {}]


@pytest.mark.parametrize("key", ["number", "message", "self", "name"])
def test_details_may_bear_any_name(key: str) -> None:
    assert WireError.from_wire([22, "EINVAL", "m", {key: 1}]).details == {key: 1}


def test_from_wire_makes_keys_strings() -> None:
    assert WireError.from_wire([22, "EINVAL", "m", {5: 1}]).details == {"5": 1}


@pytest.mark.parametrize(
    "value",
    [
        None,
        "EINVAL",
        [],
        [22, "EINVAL", "no details"],
        [22, "EINVAL", "m", {}, "more"],
        ["22", "EINVAL", "m", {}],
        [True, "EPERM", "m", {}],
        [22, None, "m", {}],
        [22, "EINVAL", b"m", {}],
        [22, "EINVAL", "m", []],
        [22.0, "EINVAL", "m", {}],
        [0, "OK", "m", {}],
        [-12, "ENOMEM", "m", {}],
        [4096, "E4096", "m", {}],
    ],
)
def test_a_malformed_error_is_a_violation_and_from_any_makes_it_eproto(value: object) -> None:
    with pytest.raises(ProtocolViolation, match="EPROTO: the peer sent a malformed error"):
        WireError.from_wire(value)

    error = WireError.from_any(value)
    assert error.number == errno.EPROTO
    assert "malformed" in error.message
    assert repr(value) not in error.message


@pytest.mark.parametrize("number", [errno.EPERM, errno.ERFKILL])
def test_from_wire_takes_the_name_from_the_number(number: int) -> None:
    error = WireError.from_wire([number, "EANYTHING", "m", {}])

    assert (error.number, error.name) == (number, error_name(number))


def test_from_any_of_a_well_formed_error_is_from_wire() -> None:
    value = [22, "EINVAL", "m", {"field": "x"}]

    assert WireError.from_any(value).to_wire() == value


def test_a_huge_malformed_error_is_shortened() -> None:
    assert len(WireError.from_any("x" * 65_536).message) < 300


def test_from_wire_keeps_the_name_of_a_number_that_is_not_known_here() -> None:
    error = WireError.from_wire([4042, "EFUTURE", "not yet", {}])

    assert str(error) == "EFUTURE: not yet"
    assert error.to_wire() == [4042, "EFUTURE", "not yet", {}]


def test_error_prints_its_name_and_message() -> None:
    assert str(WireError(errno.EINVAL, "gfn: is missing")) == "EINVAL: gfn: is missing"


def test_error_name_of_an_unnamed_number_is_the_number() -> None:
    assert error_name(4242) == "E4242"


@pytest.mark.parametrize(("number", "name"), [(11, "EAGAIN"), (35, "EDEADLK"), (95, "EOPNOTSUPP")])
def test_error_name_is_the_kernels_and_not_an_alias(number: int, name: str) -> None:
    assert error_name(number) == name


def test_violation_travels_in_the_form_of_a_refusal_and_is_none() -> None:
    violation = ProtocolViolation(errno.EBADMSG, "garbage")

    assert not isinstance(violation, WireError)

    assert violation.to_wire() == [74, "EBADMSG", "garbage", {}]


@pytest.mark.parametrize(
    ("number", "text"),
    [(errno.EPERM, "EPERM, as under a container's default seccomp profile"), (errno.ENOSYS, "ENOSYS")],
)
def test_a_refused_userfaultfd_is_explained_where_the_cause_is_usual(number: int, text: str) -> None:
    assert unwatched(number) == text
