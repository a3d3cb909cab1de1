"""What a later version of the wire may add to today's messages (T-6, V-3, E-4, O-11, H-15).

Owns the additions; must not know connections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

LATER: Final = "of_a_later_version"
"""Every key, word, limit and reason that is not known today."""
LATER_NUMBER: Final = 4042
"""An errno that is not known today."""
_ADDED: Final[Mapping[str, object]] = {"is": [None, True, -1, 1.5, LATER, b"later", {}]}
UNKNOWN_EVENT: Final = {"event": LATER, "time_ms": 1, LATER: 2}
_WORDS: Final = frozenset({
    "address_space", "architecture", "hypervisor", "kind", "mmio_granularity", "reason", "source", "state",
    "watch",
})  # fmt: skip
"""Fields sent to operators whose values may be other words in a later version."""


def later_error(method: str, error: object) -> object:
    """With more details; that of `kick` has another errno."""
    match error:
        case [number, name, message, dict(details)]:
            if method == "kick":
                number, name = LATER_NUMBER, "ELATER"
            return [number, name, message, {**details, LATER: _ADDED}]
    return error


def later_reply(method: str, result: object) -> object:
    """With more keys wherever there is a map, other words for an operator, and another reason."""
    match result:
        case [str(outcome), str()] if method == "intercept":
            return [outcome, LATER]
        case dict() if method in ("inspect_partition", "list_partitions"):
            return _grown(result, other_words=True)
    return _grown(result, other_words=False)


def later_event(fields: Mapping[str, object]) -> object:
    """With a field more, and other words."""
    return _grown(fields, other_words=True)


def _grown(value: object, *, other_words: bool) -> object:
    match value:
        case dict():
            return {LATER: _ADDED} | {
                key: _field(key, item, other_words=other_words) for key, item in value.items()
            }
        case list():
            return [_grown(item, other_words=other_words) for item in value]
    return value


def _field(name: str, value: object, *, other_words: bool) -> object:
    match name, value:
        case "limits", dict():
            return {**value, LATER: 7}
        case "features", dict():
            lists = {key: [*words, LATER] for key, words in value.items() if isinstance(words, list)}
            return {**value, **lists, LATER: _ADDED}
        case "intercepts", dict():
            outcomes = {outcome: {**reasons, LATER: 1} for outcome, reasons in value.items()}
            return {**outcomes, LATER: {LATER: 1}}
        case "unresolved", dict():
            return {**value, LATER: 1}
        case _, str() if other_words and name in _WORDS:
            return LATER
    return _grown(value, other_words=other_words)
