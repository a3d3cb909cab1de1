"""One JSON line on standard error for each event, in the form of the daemon's own log. In the systemd journal
its priority stands in front of it, sd-daemon(3)."""

from __future__ import annotations

import json
import os
import select
import sys
from contextlib import suppress
from datetime import UTC, datetime

PIECE_BYTES = select.PIPE_BUF
"""A writable pipe takes this much without blocking."""
PRIORITY_PREFIXES = {"info": "<6>", "warning": "<4>", "error": "<3>", "critical": "<2>"}
"""Of syslog(3)."""


def log(level: str, event: str, **fields: object) -> None:
    """Never blocks: a line that finds no room is lost."""
    now = datetime.now(UTC).isoformat()
    line = json.dumps({**fields, "event": event, "level": level, "timestamp": now}) + "\n"
    writable = select.poll()
    with suppress(OSError, ValueError):
        stderr = os.fstat(sys.stderr.fileno())
        if os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}":  # systemd.exec(5)
            line = PRIORITY_PREFIXES[level] + line
        writable.register(sys.stderr.fileno(), select.POLLOUT)
        if writable.poll(0):
            os.write(sys.stderr.fileno(), line.encode()[:PIECE_BYTES])
