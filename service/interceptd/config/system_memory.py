"""How much memory the system lets this process use.

Owns reading its cgroup's limit. Must not know what the memory is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

WITHOUT_LIMIT_MIB: Final = 1024
ROOT: Final = Path("/sys/fs/cgroup")
_UNLIMITED: Final = 1 << 62
"""Version 1 shows a number near 2^63 where there is no limit."""


def default_memory_mib() -> int:
    """Three quarters of what the cgroup allows now: the kernel needs some, too. Without a limit, 1,024."""
    limit = cgroup_limit(Path("/proc/self/cgroup"), ROOT)
    return WITHOUT_LIMIT_MIB if limit is None else max(1, limit * 3 // 4 >> 20)


def cgroup_limit(memberships: Path, root: Path) -> int | None:
    """The lowest limit, in bytes, of the cgroup and those around it; None without one. `memberships` is like
    /proc/self/cgroup (cgroups(7)), `root` like /sys/fs/cgroup."""
    return min(_limits(memberships, root), default=None)


def _limits(memberships: Path, root: Path) -> Iterator[int]:
    for line in _text(memberships).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for group in _around(root, path):
                yield from _numbers(_text(group / "memory.max"))
        elif "memory" in controllers.split(","):
            for group in _around(root / "memory", path):
                yield from _hierarchical(_text(group / "memory.stat"))


def _around(root: Path, path: str) -> Iterator[Path]:
    """The group and its ancestors, as far as they can be seen."""
    group = root / path.lstrip("/")
    yield from (
        each for each in (group, *group.parents) if each.is_relative_to(root) and ".." not in each.parts
    )


def _hierarchical(statistics: str) -> Iterator[int]:
    """Of version 1, which includes limits further up than can be seen."""
    for line in statistics.splitlines():
        name, _, number = line.partition(" ")
        if name == "hierarchical_memory_limit":
            yield from _numbers(number)


def _numbers(text: str) -> Iterator[int]:
    """Version 2 says `max` where there is no limit."""
    if text.strip().isdecimal() and int(text) < _UNLIMITED:
        yield int(text)


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""
