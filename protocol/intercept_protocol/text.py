"""Makes text from outside safe to show on a terminal, in a log or in an answer.

Owns which characters are escaped, and the wording of exceptions and values. Must not know where text goes.
"""

from __future__ import annotations

import os


def visible(text: str) -> str:
    """`text` with every unprintable character replaced by its escape.

    Control characters, bidirectional overrides, line separators and lone surrogates (bytes of a path that are
    not UTF-8) become `\\x1b`, `\\u202e`, `\\udcff`. The result is one line, and every encoder accepts it.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def visible_lines(text: str) -> str:
    """`visible` for each line of `text`: for our tracebacks and notes, which may quote a peer."""
    return "\n".join(map(visible, text.split("\n")))


def sentence(error: BaseException) -> str:
    """An exception for people: its text, or that of the first exception in a group.

    For an `OSError`, the path and the cause without Python's number in brackets; for an exception without a
    text, its type.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError) and error.strerror is not None:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return visible(f"{where}{error.strerror}")
    return visible(str(error)) or type(error).__name__


def shape_of(value: object) -> str:
    """The type and size of a decoded MessagePack value, without its contents: "an array of 3", "a string"."""
    match value:
        case list():
            return f"an array of {len(value)}"
        case dict():
            return f"a map of {len(value)}"
        case None:
            return "nil"
        case _:
            return _TYPE_NAMES.get(type(value), "a value of another type")


_TYPE_NAMES = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", bytes: "bytes"}
