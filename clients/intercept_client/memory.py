"""Changing the VMM's own mappings without leaving the guest a window on what was there, for threads.

Each function wraps one system call in an invalidation: begin, the call, end. It blocks until the guest cannot
reach the range any more, and then makes the change. It raises the `OSError` of the system call, or what
`BlockingNotifier.invalidation` raises: from a begin, with the mappings untouched; from an end, with the
change made. A call that fails still ends its invalidation. Python objects that look into a range must be gone
before the range is, as with the bare calls of `intercept_client.libc`.

`own_memory` opens what `BlockingVmm.attach_memory` hands over. `intercept_client.trio_memory` is the same for
trio.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Concatenate, ParamSpec

from . import _changes
from ._blocking_clients import BlockingNotifier
from ._changes import Change, Leave, T
from ._own_memory import OwnMemory, Watch, own_memory
from ._showing import as_function, show_as_from
from ._userfaultfd import (
    USERFAULTFD_DEVICE,
    USERFAULTFD_SYSCTL,
    Permission,
    UserfaultfdNotPermitted,
    UserfaultfdNotSupported,
    UserfaultfdUnavailable,
    open_userfaultfd,
)
from .libc import Sharing

__all__ = [
    "USERFAULTFD_DEVICE", "USERFAULTFD_SYSCTL", "Leave", "OwnMemory", "Permission", "Sharing",
    "UserfaultfdNotPermitted", "UserfaultfdNotSupported", "UserfaultfdUnavailable", "Watch",
    "fallocate_punch_hole", "ftruncate", "madvise", "map_fixed", "mprotect", "mremap", "munmap",
    "open_userfaultfd", "own_memory",
]  # fmt: skip

show_as_from(__name__, (Leave, OwnMemory, Permission, Watch, open_userfaultfd, own_memory))
show_as_from(__name__, (UserfaultfdUnavailable, UserfaultfdNotPermitted, UserfaultfdNotSupported))
_P = ParamSpec("_P")


def _announced(build: Callable[_P, Change[T]]) -> Callable[Concatenate[BlockingNotifier, _P], T]:
    """A function that makes the change which `build` describes, inside an invalidation of each range.

    The ranges begin one after the other; each that began ends, also when a later one is refused.
    """

    def change(notifier: BlockingNotifier, /, *args: _P.args, **kwargs: _P.kwargs) -> T:
        described = build(*args, **kwargs)
        with ExitStack() as begun:
            for uaddrs in described.announced:
                begun.enter_context(notifier.invalidation(uaddrs))
            return described.carry_out()

    as_function(change, build, __name__, first="notifier: BlockingNotifier", wrapper="Change")
    return change


munmap = _announced(_changes.munmap)
mremap = _announced(_changes.mremap)
mprotect = _announced(_changes.mprotect)
madvise = _announced(_changes.madvise)
map_fixed = _announced(_changes.map_fixed)
fallocate_punch_hole = _announced(_changes.fallocate_punch_hole)
ftruncate = _announced(_changes.ftruncate)
