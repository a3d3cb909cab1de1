"""The descriptors by which a VMM lets the daemon see its memory.

Owns opening them and closing this process's copies. Must not know connections::

    with own_memory(Watch.IF_POSSIBLE) as memory:
        vmm.attach_memory(memory, promise_begin_end=True)

The copies are closed however the block ends: if a userfaultfd stays open in a process that does not read it,
then the death of the daemon makes that process's munmap hang. A child forked within the block keeps copies
unless it execs, so fork before or after.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum

from ._userfaultfd import UserfaultfdUnavailable, open_userfaultfd


class Watch(Enum):
    """Whether the kernel shall report unmaps to the daemon, through a userfaultfd."""

    REQUIRED = "fail if there is no userfaultfd"
    IF_POSSIBLE = "go on without a userfaultfd if there is none"
    NONE = "every change is announced by begin and end, or nothing is mapped"


@dataclass(frozen=True, slots=True)
class OwnMemory:
    """What `attach_memory` hands over, open for the length of the block."""

    descriptors: tuple[int, ...]
    unwatched_because: UserfaultfdUnavailable | None
    """Why there is no userfaultfd, with `Watch.IF_POSSIBLE`."""
    userfaultfd: int | None = None
    """One of the descriptors."""

    def renew_userfaultfd(self) -> None:
        """Put a new one in its place, if there is one: a daemon that took it may have initialised it.

        Raises as `own_memory`.
        """
        if self.userfaultfd is not None:
            new = open_userfaultfd()
            os.dup2(new, self.userfaultfd, inheritable=False)  # closes the old one
            os.close(new)


@contextmanager
def own_memory(watch: Watch) -> Iterator[OwnMemory]:
    """Open this process's maps, smaps and perhaps a userfaultfd.

    Raises `UserfaultfdUnavailable` if one is required and there is none, and `OSError` if /proc is not
    mounted or no descriptor is left. If the main thread has exited, call it in a thread that lives as long as
    the partition: a proc file of a thread that has ended reads as empty.
    """
    with ExitStack() as opened:

        def own(descriptor: int) -> int:
            opened.callback(os.close, descriptor)
            return descriptor

        directory = _proc_directory()
        descriptors = [own(os.open(f"{directory}/{name}", os.O_RDONLY)) for name in ("maps", "smaps")]
        refusal, userfaultfd = None, None
        if watch is not Watch.NONE:
            try:
                userfaultfd = own(open_userfaultfd())
                descriptors.append(userfaultfd)
            except UserfaultfdUnavailable as unavailable:
                if watch is Watch.REQUIRED:
                    raise
                refusal = unavailable
        yield OwnMemory(tuple(descriptors), refusal, userfaultfd)


def _proc_directory() -> str:
    """/proc/self is the main thread's: once that has exited, what is opened there is empty."""
    with open("/proc/self/maps", "rb", buffering=0) as maps:
        return "/proc/self" if maps.read(1) else "/proc/thread-self"
