"""A keeper as a child process, and the programs that it starts.

Owns their start and end. Every wait is for a program to say something, or for an end of file.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fakes import kept_program
from fakes.eventually import PATIENCE, eventually

LAUNCH = """
import sys
from interceptd.keeper.keeper import Keeper
program, patience, *arguments = sys.argv[1:]
sys.exit(Keeper([sys.executable, "-I", program], arguments, float(patience)).run())
"""


class KeptProgram:
    """A program that the keeper started, seen from the test."""

    def __init__(self, control: socket.socket, hello: Mapping[str, Any]) -> None:
        self._control = control
        credentials = control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid = int.from_bytes(credentials[:4], sys.byteorder)
        """Ours to use, also if the program is in another pid namespace."""
        self._pidfd = os.pidfd_open(self.pid)
        self.arguments: list[str] = hello["arguments"]
        self.group: int = hello["group"]
        self.environment: dict[str, str | None] = hello["environment"]

    def tell(self, *facts: str, descriptors: Sequence[int] = ()) -> None:
        """Send the keeper a message, which it may not have read yet when this returns."""
        self._ask("tell", "\n".join(facts), descriptors=descriptors)

    def store(self, name: str, *sockets: socket.socket, poll: bool = True) -> None:
        unpolled = [] if poll else ["FDPOLL=0"]
        self.tell("FDSTORE=1", f"FDNAME={name}", *unpolled, descriptors=[each.fileno() for each in sockets])

    def ready(self) -> Self:
        self.tell("READY=1")
        return self

    @property
    def passed(self) -> list[tuple[str, int]]:
        return [(name, inode) for name, inode in self._ask("passed")]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.passed]

    @property
    def open_descriptors(self) -> int:
        return int(self._ask("open"))

    def wait_signal(self) -> int:
        return int(self._ask("signal"))

    def leave_an_orphan(self) -> None:
        self._ask("leave an orphan")

    def exit(self, status: int) -> None:
        self._control.send(json.dumps(["exit", status]).encode())
        self.wait_end()

    def kill(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.wait_end()

    def wait_end(self) -> None:
        assert self._control.recv(1) == b""

    def close(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        os.close(self._pidfd)
        self._control.close()

    def _ask(self, *order: object, descriptors: Sequence[int] = ()) -> Any:
        socket.send_fds(self._control, [json.dumps(order).encode()], descriptors)
        return json.loads(self._control.recv(1 << 20))


class KeeperProcess:
    """Keeps programs that the test commands; `before` is a command to run the keeper by."""

    def __init__(
        self,
        directory: Path,
        *,
        patience: float = PATIENCE,
        environment: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        self._log = directory / "keeper.log"
        self._programs: list[KeptProgram] = []
        control = directory / "control"
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.bind(str(control))
        self._control.listen()
        self._control.settimeout(PATIENCE)
        keep = [sys.executable, "-c", LAUNCH, kept_program.__file__, str(patience), "serve", "--set", "a=1"]
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [*before, *keep],
                stdin=subprocess.DEVNULL,
                stderr=output,
                env={**os.environ, kept_program.CONTROL: str(control), **(environment or {})},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)
        for program in self._programs:
            program.close()
        self._control.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def next(self) -> KeptProgram:
        """The next program that it starts, and that lives long enough to say so."""
        while True:
            control, _ = self._control.accept()
            control.settimeout(PATIENCE)
            if hello := control.recv(4096):
                self._programs.append(KeptProgram(control, json.loads(hello)))
                return self._programs[-1]
            control.close()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)

    def wait_ended(self) -> int:
        return self._process.wait(PATIENCE)

    def log(self) -> list[dict[str, Any]]:
        lines = self._log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def events(self) -> list[str]:
        return [line["event"] for line in self.log()]

    def wait_event(self, event: str) -> None:
        eventually(lambda: event in self.events(), True)

    def children(self) -> list[int]:
        return children(self.pid)


def children(pid: int) -> list[int]:
    """The child processes of a process, with those that ended and were not reaped."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
