"""The values that an enumerated field may hold, for the error about any other.

Owns deriving them from the type of the field, and their wording; must not know any method.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Literal, get_args, get_origin, get_type_hints

import msgspec


class Choices(msgspec.Struct, frozen=True):
    """`words` is empty unless the field is enumerated; `numbers` says whether it takes numbers too."""

    words: tuple[str, ...]
    numbers: bool

    def __str__(self) -> str:
        words = ", ".join(self.words)
        return f"{'a number or ' if self.numbers else ''}{'one of ' if len(self.words) > 1 else ''}{words}"


@cache
def narrowed(struct: type) -> Mapping[str, Choices]:
    """The enumerated fields of `struct` that take fewer words than their type has, as its `Meta` says."""
    found = {}
    for field in msgspec.inspect.type_info(struct).fields:  # type: ignore[attr-defined]  # it is a StructType
        match field.type:
            case msgspec.inspect.Metadata(extra={"choices": words}):
                found[field.encode_name] = Choices(tuple(str(word.value) for word in words), numbers=False)
    return found


def choices_at(struct: type, path: str) -> Choices:
    """The choices at `path` of `struct`: "kind", or "events[...]" for an element of a list."""
    field, *elements = re.split(r"(?=\[)", path)
    if field in (fewer := narrowed(struct)):
        return fewer[field]
    hint = get_type_hints(struct).get(field)
    for _ in elements:
        hint = next((inner for option in _options(hint) for inner in get_args(option)), None)
    options = _options(hint)
    return Choices(tuple(word for option in options for word in _words(option)), int in options)


def _options(hint: object) -> tuple[object, ...]:
    """The members of a union without None; of any other hint, the hint itself."""
    if get_origin(hint) in (Literal, list) or not get_args(hint):
        return (hint,)
    return tuple(option for option in get_args(hint) if option is not type(None))


def _words(option: object) -> tuple[str, ...]:
    if isinstance(option, type) and issubclass(option, Enum):
        return tuple(str(member.value) for member in option)
    return tuple(map(str, get_args(option))) if get_origin(option) is Literal else ()
