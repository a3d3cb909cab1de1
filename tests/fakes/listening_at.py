"""Whether a process listens on a Unix socket, without connecting: the first connection may be what is tested.

Owns the reading of /proc/net/unix. A path that is there may be one to which nobody listens yet, but for a
daemon's own, which it gives its name when it listens.
"""

from __future__ import annotations

from pathlib import Path

_ACCEPTS = "00010000"
"""__SO_ACCEPTCON of linux/net.h, as the fourth field has it."""


def is_listening(path: Path) -> bool:
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(fields[3] == _ACCEPTS and fields[7:] == [str(path)] for fields in sockets)
