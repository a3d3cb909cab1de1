"""A person at a shell: commands typed into a terminal, one after the other.

Owns the terminal, what was shown on it, and the end of everything that was started there. Must not know the
commands.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from fakes.eventually import PATIENCE

COLUMNS, LINES = 80, 24
INTERRUPT = "\x03"


class Shell:
    """An interactive bash in `directory`; `patience` in seconds bounds each wait."""

    def __init__(self, directory: Path, environment: Mapping[str, str], patience: float = PATIENCE) -> None:
        self._terminal, theirs = os.openpty()
        self._patience = patience
        self._seen = ""
        self.background: list[int] = []
        """The pids of what runs beside, in the order of starting."""
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", LINES, COLUMNS, 0, 0))
        self._bash = subprocess.Popen(
            ["setsid", "--ctty", "bash", "--norc", "--noprofile"],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=directory,
            env={**environment, "TERM": "xterm", "PS1": "", "HISTFILE": ""},
        )  # fmt: skip
        os.close(theirs)
        self.run("stty -echo")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in self.background:
            with suppress(ProcessLookupError):  # which is what was wanted
                os.kill(pid, signal.SIGKILL)
        self._bash.kill()  # SIGHUP follows, to what is in the foreground
        self._bash.wait(PATIENCE)
        os.close(self._terminal)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def run(self, command: str) -> tuple[int, str]:
        """Type a whole command, wait for its end; its exit status, and what it showed."""
        self.start(command)
        return self.ended()

    def start(self, command: str) -> None:
        self.type(f"{command}\n")

    def start_beside(self, command: str) -> int:
        """Type a command that ends in &; its pid."""
        self.start(command)
        self.start('echo "pid=$!"')
        pid = int(self.wait_shown(r"pid=(\d+)")[1])
        self.background.append(pid)
        return pid

    def ended(self) -> tuple[int, str]:
        """Wait for the command that was started: its exit status, and what it showed since."""
        self.type('echo "status=$?"\n')
        before = self.wait_shown(r"status=(\d+)\r?\n")
        return int(before[1]), before.string[: before.start()]

    def wait_shown(self, pattern: str) -> re.Match[str]:
        """Wait for it, and forget all up to its end."""
        while (found := re.search(pattern, self._seen)) is None:
            ready, _, _ = select.select([self._terminal], [], [], self._patience)
            assert ready, f"waited for {pattern!r}, last shown: {self._seen[-2000:]}"
            self._seen += os.read(self._terminal, 65536).decode(errors="replace")
        self._seen = self._seen[found.end() :]
        return found
