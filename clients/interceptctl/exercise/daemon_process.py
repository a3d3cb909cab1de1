"""A private daemon, for the duration of an exercise, under a keeper that starts it again.

Owns the processes, their temporary directory and their log; must not know what requests the daemon gets. It
is started by name: the tool shares no code with the daemon. Settings meant for another daemon are not passed
on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL
from typing import Final

import trio

from interceptctl.private_environment import private_environment

HANG_GUARD: Final = 120.0
"""Seconds after which a daemon that neither listens nor exits counts as hung, and one that ignores SIGTERM is
killed. Far beyond what a busy machine takes: no verdict depends on how fast a daemon is."""
_LOOK_AGAIN: Final = 0.02
_LOG_SHOWN: Final = 2000

UNKEPT_DAEMON: Final = (sys.executable, "-m", "interceptd")
KEPT_DAEMON: Final = (*UNKEPT_DAEMON, "keep", "--")


class DaemonFailed(Exception):
    """The daemon did not start or end properly; the message ends with the tail of its log."""


@dataclass(frozen=True, slots=True)
class PrivateDaemon:
    path: str
    """Of its socket for VMMs."""
    log: Path

    def kill(self) -> None:
        """End the daemon by SIGKILL; its keeper starts the next one. Call it while the daemon answers."""
        os.kill(self._pid(), signal.SIGKILL)

    def _pid(self) -> int:
        """Of the daemon that was started last, as its keeper says in the log."""
        started = [line for line in self.log.read_text().splitlines() if '"daemon_process_started"' in line]
        return int(json.loads(started[-1])["pid"])


@asynccontextmanager
async def running_daemon(command: Sequence[str] = KEPT_DAEMON) -> AsyncIterator[PrivateDaemon]:
    """Run a daemon by a command that `serve` follows. It is ended by SIGTERM and must exit with status 0.

    Exceptions of the block propagate, with the tail of the daemon's log as a note. Our uid is put into
    allowed_uids: in many containers it is the overflow uid, which is refused by default.
    """
    with tempfile.TemporaryDirectory(prefix="interceptd-") as directory:
        path, log = Path(directory, "vmm.sock"), Path(directory, "log")
        with log.open("wb") as log_file:  # noqa: ASYNC230 - a local file in our own temporary directory
            process = await trio.lowlevel.open_process(
                [*command, "serve", "--set", f"allowed_uids=[{os.geteuid()}]", "--socket", str(path)],
                stdin=DEVNULL,
                stdout=log_file,
                stderr=log_file,
                env=private_environment(),
            )
        try:
            await _wait_until_it_listens(process, path, log)
            yield PrivateDaemon(str(path), log)
        except BaseException as error:
            await _end(process)
            error.add_note(_end_of(log))
            raise
        status = await _end(process)
        if status != 0:
            raise DaemonFailed(f"the daemon ended with status {status} instead of 0\n{_end_of(log)}")


async def _wait_until_it_listens(process: trio.Process, path: Path, log: Path) -> None:
    """Connect until it works or the process exits: nothing else says that the daemon is ready."""
    with trio.move_on_after(HANG_GUARD):
        while process.poll() is None:
            try:
                await (await trio.open_unix_socket(path)).aclose()
            except OSError:
                await trio.sleep(_LOOK_AGAIN)
            else:
                return
    raise DaemonFailed(f"the daemon does not listen at {path}\n{_end_of(log)}")


async def _end(process: trio.Process) -> int:
    """Send SIGTERM, then SIGKILL if that has no effect; returns the exit status."""
    with trio.CancelScope(shield=True):
        process.terminate()
        with trio.move_on_after(HANG_GUARD) as patience:
            await process.wait()
        if patience.cancelled_caught:
            process.kill()
        status: int = await process.wait()
    return status


def _end_of(log: Path) -> str:
    return f"the daemon's log ends:\n{log.read_text(errors='replace')[-_LOG_SHOWN:]}"
