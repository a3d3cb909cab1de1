"""Changing the VMM's own mappings without leaving the guest a window on what was there, for trio.

Each function wraps one system call in an invalidation: begin, the call, end. The call runs in a thread, since
a munmap of much memory takes long, and one of watched memory waits for the daemon. Cancelled before the call,
a function leaves the mappings untouched; once the call has begun, it is not interrupted. Errors are those of
`intercept_client.memory`, which has the same functions for threads, and what else is needed to hand over
memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Concatenate, ParamSpec

import trio

from . import _changes
from ._changes import Change, T
from ._showing import as_function
from ._trio_clients import TrioNotifier

__all__ = [
    "fallocate_punch_hole", "ftruncate", "madvise", "map_fixed", "mprotect", "mremap", "munmap",
]  # fmt: skip

_P = ParamSpec("_P")


def _announced(build: Callable[_P, Change[T]]) -> Callable[Concatenate[TrioNotifier, _P], Awaitable[T]]:
    """A function that makes the change which `build` describes, inside an invalidation of each range.

    The ranges begin one after the other; each that began ends, also when a later one is refused.
    """

    async def change(notifier: TrioNotifier, /, *args: _P.args, **kwargs: _P.kwargs) -> T:
        described = build(*args, **kwargs)
        async with AsyncExitStack() as begun:
            for uaddrs in described.announced:
                await begun.enter_async_context(notifier.invalidation(uaddrs))
            return await trio.to_thread.run_sync(described.carry_out)

    as_function(change, build, __name__, first="notifier: TrioNotifier", wrapper="Change")
    return change


munmap = _announced(_changes.munmap)
mremap = _announced(_changes.mremap)
mprotect = _announced(_changes.mprotect)
madvise = _announced(_changes.madvise)
map_fixed = _announced(_changes.map_fixed)
fallocate_punch_hole = _announced(_changes.fallocate_punch_hole)
ftruncate = _announced(_changes.ftruncate)
