"""Text from outside in a line: escaped, and cut where a client may have chosen it.

Owns both, of all values of an event and of tracebacks. Must not know which line it is.
"""

from __future__ import annotations

from io import StringIO
from typing import TextIO

import structlog
from structlog.typing import EventDict, ExcInfo

from intercept_protocol.text import visible
from interceptd.log_share import TEXT_LENGTH, current_share


def make_visible(_: object, __: str, event: EventDict) -> EventDict:
    """A processor. The console escapes no value without blanks; lone surrogates stop JSON readers."""
    return {key: _visible(value) for key, value in event.items()}


def _visible(value: object) -> object:
    match value:
        case str():
            return visible(_cut(value))
        case list() | tuple():
            return [_visible(item) for item in value]
        case dict():
            return {key: _visible(item) for key, item in value.items()}
        case _:
            return value


def write_traceback(to: TextIO, exc_info: ExcInfo) -> None:
    text = StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    to.write("\n".join(visible(_cut(line)) for line in text.getvalue().split("\n")))


def _cut(text: str) -> str:
    """`text`, cut if a client may have chosen it."""
    if len(text) <= TEXT_LENGTH or current_share() is None:
        return text
    return f"{text[: TEXT_LENGTH - 3]}..."
