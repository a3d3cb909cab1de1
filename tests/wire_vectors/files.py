"""Which example is in which file of `protocol/vectors/`, and the file's text.

Must not know what the examples are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import msgspec

from wire_vectors import events, exchanges, intercepts, refusals, responses
from wire_vectors.forms import DIRECTORY

FILES: Mapping[str, Callable[[], Sequence[msgspec.Struct]]] = {
    "intercept_messages.json": intercepts.intercept_messages,
    "methods.json": exchanges.methods,
    "responses.json": responses.responses,
    "events.json": events.told,
    "refused.json": refusals.refused,
    "refused_hellos.json": refusals.refused_hellos,
    "malformed.json": refusals.malformed,
}


def text_of(name: str) -> str:
    """What the file should hold."""
    return json.dumps(msgspec.to_builtins(list(FILES[name]())), indent=1) + "\n"


def write() -> None:
    for name in FILES:
        (DIRECTORY / name).write_text(text_of(name), encoding="utf-8")
