"""The ends of a VMM's process, and what its threads do meanwhile.

Owns the endings that need the process's own help, and loops that run until the daemon is gone.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import threading
from pathlib import Path
from typing import Final

from fakes import live_vmm_program
from fakes.live_vmm import ELSEWHERE, LiveVmm, Memory
from intercept_client import ConnectionLost, libc
from intercept_protocol.addresses import UaddrRange

progress = threading.Semaphore(0)
_SYS_EXIT: Final = {"x86_64": 60}.get(platform.machine(), 93)
"""exit(2), which ends a thread alone; 93 on all newer architectures."""


def exec_something_else(vmm: LiveVmm) -> None:
    """Soon after this is answered: a program that lives until the control socket closes."""
    vmm.after_the_answer(_exec)


def exec_something_else_with_the_sockets(vmm: LiveVmm) -> None:
    vmm.let_sockets_survive_exec()
    vmm.after_the_answer(_exec)


def go_on_without_the_main_thread(vmm: LiveVmm) -> None:
    """Soon after this is answered: the main thread exits, and another obeys from then on."""
    vmm.after_the_answer(lambda control: _leave_to_another_thread(vmm, control))


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


def _leave_to_another_thread(vmm: LiveVmm, control: int) -> None:
    vmm.after_the_answer(lambda _: None)
    main_thread = threading.get_native_id()

    def go_on() -> None:
        stat = Path(f"/proc/self/task/{main_thread}/stat")
        while " Z " not in stat.read_text():
            os.sched_yield()
        live_vmm_program.obey_all(socket.socket(fileno=control), vmm)
        os._exit(0)

    threading.Thread(target=go_on).start()
    ctypes.CDLL(None).syscall(ctypes.c_long(_SYS_EXIT), ctypes.c_long(0))


def _exec(control: int) -> None:
    os.dup2(control, 0)
    os.execv("/bin/cat", ["cat"])
