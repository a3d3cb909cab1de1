"""What the running case sent and received, and what a server on its first day answers instead.

Owns the last message in each direction, the methods of each role, and the two exceptions for what a server
does not have. Must not know the cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgpack

METHODS: Final[Mapping[str, frozenset[str]]] = {
    "vmm": frozenset({
        "create_partition", "add_region", "remove_region", "change_regions", "map_vma", "map_vmas",
        "unmap_vma", "protect_vma", "kick", "set_policy", "statistics", "translate", "attach_memory",
        "prefault", "list_regions", "list_vmas", "list_mappings", "restore", "restore_progress",
    }),
    "vp": frozenset({"intercept"}),
    "notifier": frozenset({"invalidate_begin", "invalidate_end", "invalidate", "kick"}),
    "operator": frozenset({
        "list_partitions", "inspect_partition", "statistics", "set_policy", "drain", "restart",
        "subscribe", "histograms", "list_regions", "list_vmas", "list_mappings", "trace",
    }),
}  # fmt: skip
"""By role. ENOSYS to one of these means that it is missing; to any other it is the right answer (P-3)."""
ROLES: Final = frozenset({"hypervisor", *METHODS})
PROFILES: Final = ("core", "notifier", "hypervisor", "operator", "process", "restore")
"""The parts of a server. Core is what every VMM needs: `vmm` and `vp` connections and declared memory."""
ENOSYS: Final = 38
_LINE: Final = 160
"""Characters of a message that a report shows."""


class NotImplementedYet(Exception):
    """The server does not know a method or a role of the specification."""


class NotOffered(Exception):
    """The server's hello says that it works without this."""


@dataclass
class Exchange:
    """The last message in each direction, on any connection."""

    role: str = ""
    sent: bytes | None = None
    came: object = "nothing"
    needs: frozenset[str] | None = None
    """The profiles that the running case needs; None outside the suite."""

    def begin(self, needs: frozenset[str] | None) -> None:
        """A case, or anything else that has connections, starts."""
        self.role, self.sent, self.came, self.needs = "", None, "nothing", needs

    def lines(self) -> list[str]:
        """Both messages, one line each."""
        sent = "nothing" if self.sent is None else _of_bytes(self.sent)
        came = self.came if isinstance(self.came, str) else _shown(self.came)
        return [f"sent  {self.role or 'no role yet'}: {sent}"[:_LINE], f"came  {came}"[:_LINE]]


RUNNING: Final = Exchange()
"""Of the running case: one process runs one case at a time."""


def missing_method(role: str, sent: bytes, came: object) -> str | None:
    """The method of this role that the server answers with ENOSYS."""
    match came:
        case [1, int(answered), [int(number), *_], _] if number == ENOSYS:
            match _unpacked(sent):
                case [0, msgid, str(method), _] if msgid == answered and method in METHODS.get(role, ()):
                    return method
    return None


def _unpacked(data: bytes) -> object:
    """The message that `data` is; None if it is not exactly one."""
    try:
        message: object = msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        return None
    return message


def _of_bytes(data: bytes) -> str:
    message = _unpacked(data)
    if isinstance(message, list):
        return _shown(message)
    return f"{len(data)} bytes {data[: _LINE // 2].hex()}"


def _shown(value: object) -> str:
    """A value as the specification writes it, truncated if long."""
    match value:
        case None | True | False:
            return {None: "nil", True: "true", False: "false"}[value]
        case bytes():
            return f"<{len(value)} bytes {value[:16].hex()}{'...' if len(value) > 16 else ''}>"
        case list() | tuple():
            return f"[{', '.join(map(_shown, value))}]"
        case dict():
            return "{" + ", ".join(f"{_shown(key)}: {_shown(item)}" for key, item in value.items()) + "}"
        case str():
            return '"' + value[:_LINE].encode("unicode_escape").decode() + '"'
        case _:
            return repr(value)
