"""One Firecracker as a child process: its API over a Unix socket, and its guest's serial port.

Owns the process and both conversations. Must not know who serves the guest's memory.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import time
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from fakes.eventually import PATIENCE, eventually
from firecracker.binary import BINARY

MIB: Final = 1 << 20


class ApiError(Exception):
    """Firecracker refused a request; its own words."""


class GuestError(Exception):
    """The guest refused a request; its own words."""


class Snapshot(NamedTuple):
    """What Firecracker writes: the devices' and vCPUs' state, and all memory."""

    state: Path
    memory: Path


class Machine:
    """A Firecracker in `directory`, where its socket and log are put; killed at the end of the block."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self._api = directory / "firecracker.sock"
        self._log = directory / "firecracker.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [BINARY, "--api-sock", self._api, "--log-path", self._log, "--level", "Warn"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
            )
        self._heard = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    # ------------------------------------------------ the process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, -n for a death by signal n; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)

    def wait_ended(self) -> int:
        return self._process.wait(PATIENCE)

    # ------------------------------------------------ the API

    def wait_started(self) -> None:
        """Until it takes requests; the first request waits by itself."""
        self._connected().close()

    def put(self, path: str, **body: object) -> None:
        """Raises ApiError if Firecracker refuses."""
        self._ask("PUT", path, body)

    def boot(self, kernel: Path, mib: int, *, balloon: bool = True, huge: bool = False) -> str:
        """Boot the guest; returns the command line that Firecracker gave it. With pages of 2 MiB it cannot
        have a balloon."""
        self.put("/machine-config", vcpu_count=1, mem_size_mib=mib, huge_pages="2M" if huge else "None")
        self.put("/boot-source", kernel_image_path=str(kernel), boot_args="")
        if balloon:
            self.put("/balloon", amount_mib=0, deflate_on_oom=False)
        self.put("/actions", action_type="InstanceStart")
        return self.hear().removeprefix("ready ")

    def snapshot(self, to: Snapshot) -> None:
        """Pause the guest for a full snapshot, and let it go on."""
        self._ask("PATCH", "/vm", {"state": "Paused"})
        self.put(
            "/snapshot/create",
            snapshot_type="Full",
            snapshot_path=str(to.state),
            mem_file_path=str(to.memory),
        )
        self._ask("PATCH", "/vm", {"state": "Resumed"})

    def restore(self, state: Path, handler: Path) -> None:
        """Load the snapshot and let the guest run; its memory comes from who listens at `handler`."""
        backend = {"backend_type": "Uffd", "backend_path": str(handler)}
        self.put("/snapshot/load", snapshot_path=str(state), mem_backend=backend, resume_vm=True)

    # ------------------------------------------------ the guest

    def ask(self, *request: str | int) -> int:
        """The guest's answer to one of the requests in `guest.c`."""
        self.say(*request)
        return self.answer()

    def say(self, *request: str | int) -> None:
        """Ask without waiting: `answer` returns the result."""
        assert self._process.stdin is not None
        words = (word if isinstance(word, str) else f"{word:x}" for word in request)
        self._process.stdin.write(" ".join(words).encode() + b"\n")

    def answer(self) -> int:
        verdict, _, text = self.hear().partition(" ")
        if verdict != "=":
            raise GuestError(text)
        return int(text, 16)

    def hear(self) -> str:
        """The next line from the guest's serial port."""
        output = self._process.stdout
        assert output is not None
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._heard:
            readable, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"the guest says nothing more after {self._heard!r}: {self.log()}"
            more = output.read(4096)
            assert more, f"Firecracker ended with status {self.wait_ended()}: {self.log()}"
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    # ------------------------------------------------ helpers

    def _ask(self, method: str, path: str, body: object) -> None:
        connection = self._connected()
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status >= 300:
            raise ApiError(f"{method} {path}: {text}")

    def _connected(self) -> _UnixConnection:
        connection = _UnixConnection(self._api)
        eventually(lambda: self.status is not None or self._connects(connection), True)
        assert self.status is None, f"Firecracker ended with status {self.status}: {self.log()}"
        return connection

    def _connects(self, connection: _UnixConnection) -> bool:
        """It binds its socket before it listens."""
        try:
            connection.connect()
        except OSError:
            return False
        return True


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.close()
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))
