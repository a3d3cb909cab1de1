"""Errors about one element of a list."""

from __future__ import annotations

import errno

import pytest

from intercept_protocol.addresses import GfnRange
from intercept_protocol.elements import about_element
from intercept_protocol.errors import WireError


def test_refusal_of_an_element_keeps_its_details_and_says_which_it_is() -> None:
    with pytest.raises(WireError) as caught, about_element("add", 3):
        raise WireError(errno.EEXIST, "taken", start_gfn=1)

    assert caught.value.to_wire() == [
        errno.EEXIST,
        "EEXIST",
        "add[3]: taken",
        {"start_gfn": 1, "list": "add", "index": 3},
    ]


def test_range_of_an_element_that_is_none_names_the_field() -> None:
    with pytest.raises(WireError) as caught, about_element("remove", 0):
        GfnRange.of(1, 0)

    assert (caught.value.number, caught.value.details) == (
        errno.EINVAL,
        {"field": "page_count", "list": "remove", "index": 0},
    )
    assert caught.value.message.startswith("remove[0]: page_count: ")


def test_error_that_is_no_refusal_passes() -> None:
    with pytest.raises(ZeroDivisionError), about_element("add", 0):
        raise ZeroDivisionError
