"""The examples in `protocol/vectors/`: a form for each file, and how JSON holds bytes.

Owns the forms, in the order of their keys; `protocol/README.md` says what a client does with them. Must not
know what the examples are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from intercept_protocol.messages import Architecture

DIRECTORY = Path(__file__).parents[2] / "protocol" / "vectors"
VectorT = TypeVar("VectorT", bound=Struct)


class Served(Struct, frozen=True):
    gfn: int
    access: int


class InterceptVector(Struct, frozen=True):
    name: str
    architecture: Architecture
    hex: str
    message_type: int
    type_name: str | None
    payload_size: int
    message_flags: int
    sender: int
    memory: dict[str, object] | None
    """The payload's fields; None if it is not a memory intercept."""
    served: Served | None
    """None where the answer is `forward not_memory`."""


class ExchangeVector(Struct, frozen=True):
    role: str
    method: str
    name: str
    msgid: int
    fields: dict[str, object]
    request: str
    result: object
    reply: str


class ResponseVector(Struct, frozen=True, omit_defaults=True):
    """An answer to `intercept`, or an error."""

    msgid: int
    hex: str
    result: list[str] | None = None
    error: list[object] | None = None


class EventVector(Struct, frozen=True):
    event: str
    fields: dict[str, object]
    hex: str


class RefusalVector(Struct, frozen=True):
    """`role` is empty for a hello, whose fields say it."""

    role: str
    method: str
    request: str
    errno: int
    error: str
    field: str | None


class MalformedVector(Struct, frozen=True):
    name: str
    hex: str
    certain_after: int
    errno: int
    error: str


def load(name: str, form: type[VectorT]) -> list[VectorT]:
    """The examples of one file."""
    vectors: list[object] = json.loads((DIRECTORY / name).read_text(encoding="utf-8"))
    return [msgspec.convert(vector, form) for vector in vectors]


def as_json(value: object) -> object:
    """Bytes become {"hex": ...}; all else is what JSON has."""
    match value:
        case bytes():
            return {"hex": value.hex()}
        case dict():
            return {str(key): as_json(item) for key, item in value.items()}
        case list() | tuple():
            return [as_json(item) for item in value]
        case _:
            return value


def map_as_json(fields: dict[str, object]) -> dict[str, object]:
    """A map of fields, each as JSON has it."""
    return {name: as_json(item) for name, item in fields.items()}


def from_json(value: object) -> object:
    """What `as_json` was given, but for tuples, which come back as lists."""
    match value:
        case {"hex": str(text)}:
            return bytes.fromhex(text)
        case dict():
            return map_from_json(value)
        case list():
            return [from_json(item) for item in value]
        case _:
            return value


def map_from_json(fields: dict[str, object]) -> dict[str, object]:
    """A map of fields, as it goes over the wire."""
    return {name: from_json(item) for name, item in fields.items()}
