"""A line of the log as an entry of the systemd journal: a priority, a message, and a field for each fact.

Owns the names of the fields and the message. Must not know the encoding (`systemd.journald`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from io import StringIO
from types import MappingProxyType
from typing import Final

from structlog.typing import EventDict, Processor

from interceptd.logs.text import make_visible, write_traceback
from interceptd.systemd.journald import PRIORITIES, Priority, encode, field_name


def _add_traceback(_: object, __: str, event: EventDict) -> EventDict:
    """A processor: the traceback as text of several lines."""
    exc_info = event.pop("exc_info", None)
    if exc_info is True:
        exc_info = sys.exc_info()
    if not exc_info or exc_info == (None, None, None):
        return event
    text = StringIO()
    write_traceback(text, exc_info)
    return {**event, "exception": text.getvalue().strip("\n")}


def _render_entry(_: object, method: str, event: EventDict) -> tuple[tuple[bytes, str], dict[str, object]]:
    """A processor: the arguments of `JournalLogger.entry`."""
    fields = {field_name("interceptd_", key): _text(value) for key, value in event.items()}
    return entry(PRIORITIES[method], _message(event), fields), {}


def entry(
    priority: Priority, message: str, fields: Mapping[str, str] = MappingProxyType({})
) -> tuple[bytes, str]:
    """An entry, and what stands for it on standard error: one line."""
    common = {"PRIORITY": str(priority.value), "SYSLOG_IDENTIFIER": "interceptd", "MESSAGE": message}
    return encode({**common, **fields}), priority.prefix + message.replace("\n", "\\n")


def _message(event: EventDict) -> str:
    """What `journalctl` shows: the event and its fields, and below them the traceback."""
    fields = " ".join(
        f"{key}={_quoted(_text(value))}" for key, value in event.items() if key not in ("event", "exception")
    )
    line = f"{event['event']} {fields}".rstrip()
    return f"{line}\n{event['exception']}" if "exception" in event else line


def _render_message(_: object, __: str, event: EventDict) -> str:
    return _message(event)


def _without(*keys: str) -> Processor:
    def leave_out(_: object, __: str, event: EventDict) -> EventDict:
        return {key: value for key, value in event.items() if key not in keys}

    return leave_out


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _quoted(text: str) -> str:
    """With quotes where a reader could not tell where it ends."""
    return text if text and not set(text) & set(' "=') else '"' + text.replace('"', r"\"") + '"'


_FIELDS: Final[list[Processor]] = [_without("level", "timestamp"), make_visible, _add_traceback]
"""The journal has both of its own."""
ENTRY: Final[list[Processor]] = [*_FIELDS, _render_entry]
MESSAGE: Final[list[Processor]] = [*_FIELDS, _render_message]
