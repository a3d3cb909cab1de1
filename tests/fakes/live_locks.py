"""Threads of a VMM that hold a lock while they change memory, and others that need it.

Owns the lock. What the hypervisor thread answers is a daemon that is held at a barrier.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from fakes.barrier import Barrier
from fakes.live_vmm import LiveVmm
from fakes.raw_client import RawConnection, pack
from intercept_client import libc
from intercept_protocol.addresses import UaddrRange

CLEARING_SECONDS = 0.5
_lock = threading.Lock()
reached: set[int] = set()


def unmap_all_under_the_lock(_: LiveVmm, parts: list[UaddrRange]) -> int:
    """Returns how many were unmapped before the lock was released."""
    with _lock:
        for part in parts:
            libc.munmap(part)
        return len(parts)


def answer_the_hypervisor_under_the_lock(_: LiveVmm, directory: Path) -> None:
    """A hypervisor thread: answers each arrival at the barrier once it could acquire the lock."""
    barrier = Barrier(directory)
    while True:
        barrier.wait_arrived()
        with _lock:
            barrier.let_go()


def serve_the_hypervisor_under_the_lock(vmm: LiveVmm, served: Path) -> None:
    """The `hypervisor` connection: every map and unmap is carried out once the lock could be had.

    `served` appears when the connection is there. A guest's table is a set of the gfns that it reaches.
    """
    with RawConnection(vmm.path) as link:
        link.ask("hello", {"protocol": 1, "role": "hypervisor", **vmm.credentials})
        served.touch()
        while True:
            _, msgid, method, (fields,) = link.receive()
            gfns = set(range(fields["start_gfn"], fields["start_gfn"] + fields["page_count"]))
            with _lock:
                reached.difference_update(gfns)
                if method == "map_gpa" and fields["access"]:
                    reached.update(gfns)
            link.send(pack([1, msgid, None, None]))


def reached_through_the_link(_: LiveVmm) -> list[int]:
    return sorted(reached)


def clear_nonblocking_for_a_while(vmm: LiveVmm) -> int:
    """Returns how often."""
    end = time.monotonic() + CLEARING_SECONDS
    count = 0
    while time.monotonic() < end:
        vmm.clear_nonblocking()
        count += 1
    return count
