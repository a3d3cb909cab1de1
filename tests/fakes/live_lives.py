"""What becomes of a VMM's process, and what its threads go on with meanwhile.

Owns the endings that need the process's own help, and loops that run until the daemon is gone.
"""

from __future__ import annotations

import os
import threading

from fakes.live_vmm import ELSEWHERE, LiveVmm, Memory
from intercept_client import ConnectionLost, libc
from intercept_protocol.addresses import UaddrRange

progress = threading.Semaphore(0)


def exec_something_else(vmm: LiveVmm) -> None:
    """Soon after this is answered: a program that lives until the control socket closes."""
    vmm.after_the_answer(_exec)


def exec_something_else_with_the_sockets(vmm: LiveVmm) -> None:
    vmm.let_sockets_survive_exec()
    vmm.after_the_answer(_exec)


def fork_a_child_that_unmaps_everything_of(vmm: LiveVmm, start_gfn: int) -> None:
    held = vmm.translate(start_gfn)
    assert held is not None
    vmm.fork_and_reap(lambda: libc.munmap(vmm.mapped[-1]))


def fault_until_refused(vmm: LiveVmm, gfn: int) -> str:
    """Returns the error's name."""
    try:
        while True:
            vmm.fault(gfn, vp_index=7)
            progress.release()
    except ConnectionLost as error:
        return type(error).__name__


def announce_until_refused(vmm: LiveVmm) -> str:
    try:
        while True:
            with vmm.notifier.invalidation(ELSEWHERE):
                progress.release()
    except ConnectionLost as error:
        return type(error).__name__


def fault_everywhere(vmm: LiveVmm, start_gfn: int, page_count: int) -> None:
    for gfn in range(start_gfn, start_gfn + page_count, 512):
        vmm.fault(gfn)


def unmap_from_the_end(_: LiveVmm, memory: Memory, down_to: int) -> int:
    """Page by page; returns how many."""
    for page in range(memory.uaddrs.end, memory.uaddrs.start + down_to, -1):
        libc.munmap(UaddrRange(start=page - 1, end=page))
        progress.release()
    return memory.uaddrs.page_count - down_to


def wait_for_progress(_: LiveVmm, steps: int = 300) -> None:
    """Until the loops above have made some steps between them."""
    for _step in range(steps):
        progress.acquire()


def _exec(control: int) -> None:
    os.dup2(control, 0)
    os.execv("/bin/cat", ["cat"])
