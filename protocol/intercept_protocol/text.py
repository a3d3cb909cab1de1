"""Text from outside, made safe to show: on a terminal, in a log, in an answer.

Owns which characters are escaped, and what an exception says in a sentence. Must not know where text goes.
"""

from __future__ import annotations

import os


def visible(text: str) -> str:
    """`text` with everything that does not print shown as its escape; what prints is left as it is.

    Control characters, bidirectional overrides, line separators and lone surrogates (bytes of a path that are
    not UTF-8) become `\\x1b`, `\\u202e`, `\\udcff`. So the result is one line, and every encoder takes it.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def visible_lines(text: str) -> str:
    """`text` made visible line by line: for a traceback or notes of ours, which may quote others."""
    return "\n".join(map(visible, text.split("\n")))


def sentence(error: BaseException) -> str:
    """What went wrong, for people: the text of the exception, or of the first one in a group.

    Of an `OSError` the path and the cause, without Python's number in brackets; an exception without a text
    is named by its type.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError) and error.strerror is not None:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return visible(f"{where}{error.strerror}")
    return visible(str(error)) or type(error).__name__


def form(value: object) -> str:
    """What a decoded MessagePack value is, without what it holds: "an array of 3", "a string"."""
    match value:
        case list():
            return f"an array of {len(value)}"
        case dict():
            return f"a map of {len(value)}"
        case None:
            return "nil"
        case _:
            return _FORMS.get(type(value), "a value of another type")


_FORMS = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", bytes: "bytes"}
