"""Starting the daemon with descriptors: sd_listen_fds(3), seen from the manager."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NoReturn

FIRST_DESCRIPTOR: Final = 3
"""SD_LISTEN_FDS_START."""
LISTEN_VARIABLES: Final = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


def passed_to_us(environment: Mapping[str, str]) -> list[tuple[str, int]]:
    """Names and descriptors that our own manager passed to this process. They become close-on-exec."""
    count, pid, names = (environment.get(name, "") for name in LISTEN_VARIABLES)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    descriptors = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count))
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return list(zip(names.split(":") if names else ["vmm"], descriptors, strict=True))


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    named: Sequence[tuple[str, int]],
    own_signals: Iterable[signal.Signals],
) -> int:
    """Start a program with duplicates of descriptors; returns its pid. Raises OSError if the system refuses
    a process.

    The program gets a process group of its own: only the keeper receives Ctrl-C.
    """
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, own_signals
    )  # one that comes meanwhile reaches the program
    try:
        if pid := os.fork():
            return pid
        try:
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            for number in own_signals:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _become(command, environment, named)
        finally:
            os._exit(127)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _become(
    command: Sequence[str], environment: Mapping[str, str], named: Sequence[tuple[str, int]]
) -> NoReturn:
    own = str(os.getpid())
    facts = {"WATCHDOG_PID": own} if "WATCHDOG_PID" in environment else {}
    if named:
        names = ":".join(name for name, _ in named)
        facts |= {"LISTEN_FDS": str(len(named)), "LISTEN_PID": own, "LISTEN_FDNAMES": names}
    end = FIRST_DESCRIPTOR + len(named)
    beyond = [
        descriptor if descriptor >= end else fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, end)
        for _, descriptor in named
    ]
    for number, descriptor in enumerate(beyond, start=FIRST_DESCRIPTOR):
        os.dup2(descriptor, number)
    os.execve(command[0], list(command), {**environment, **facts})
