"""A procfs at other places than /proc, in a mount namespace of this process's own. For root.

Owns the system calls (mount(2), fsopen(2)). Must not know who looks at the mounts.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
FSOPEN, FSCONFIG, FSMOUNT = 430, 431, 432
"""The same on every architecture (Linux 5.2)."""
FSCONFIG_CMD_CREATE = 6
_libc = ctypes.CDLL(None, use_errno=True)

Mount = Callable[[Path], AbstractContextManager[Path]]
"""Makes a procfs, at this place if anywhere, and says where it is reached for the length of the block."""


@contextmanager
def nowhere(_: Path) -> Iterator[Path]:
    """As libraries open it that do not trust what is at /proc."""
    procfs = _system_call(FSOPEN, ctypes.c_char_p(b"proc"), 0)
    _system_call(FSCONFIG, procfs, FSCONFIG_CMD_CREATE, None, None, 0)
    root = _system_call(FSMOUNT, procfs, 0, 0)
    yield Path(f"/proc/self/fd/{root}")
    os.close(root)
    os.close(procfs)


@contextmanager
def at(place: Path) -> Iterator[Path]:
    _own_namespace()
    _mount(b"proc", place, b"proc", 0)
    yield place


@contextmanager
def unmounted_from(place: Path) -> Iterator[Path]:
    """As a jail does it, once all is open that it needs."""
    with at(place):
        yield place
    _check(_libc.umount2(bytes(place), MNT_DETACH), f"umount {place}")


def bind(source: Path, place: Path) -> None:
    _own_namespace()
    _mount(bytes(source), place, None, MS_BIND)


def _own_namespace() -> None:
    _check(_libc.unshare(CLONE_NEWNS), "unshare")
    _mount(b"none", Path("/"), None, MS_REC | MS_PRIVATE)


def _mount(source: bytes, place: Path, kind: bytes | None, flags: int) -> None:
    _check(_libc.mount(source, bytes(place), kind, ctypes.c_ulong(flags), None), f"mount {place}")


def _system_call(number: int, *arguments: ctypes.c_char_p | int | None) -> int:
    longs = [ctypes.c_long(it) if isinstance(it, int) else it for it in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *longs), f"system call {number}")


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
