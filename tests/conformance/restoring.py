"""A restore: who asks for it, its image, and the VMM that hands its memory over.

Owns how both are made; a test shows what they do. The VMM is a process, because its pages may never come in.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest

from conformance.guests import PAGE
from conformance.wire import RawConnection, Refusal, request

PAGES: Final = 16
VMM: Final = Path(__file__).with_name("restoring_vmm.py")


def content(page: int) -> bytes:
    """Of a page of the image; no page is zero."""
    return (page + 1).to_bytes(8, "big") * (PAGE // 8)


def found(page: int) -> str:
    """What a VMM says of a page of the image that is in."""
    return content(page)[:8].hex()


ZERO: Final = bytes(8).hex()


class VmmProcess:
    """A VMM that has `pages` pages, of which none is in. Skips where it can have no userfaultfd."""

    def __init__(self, listen: Path, pages: int = PAGES) -> None:
        self._process = subprocess.Popen(
            [sys.executable, VMM, listen, str(pages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        start = self.said()
        if not start.isdecimal():
            self.end()
            pytest.skip(start)
        self.start = int(start)
        self.size = pages * PAGE

    @property
    def region(self) -> dict[str, object]:
        """All of its memory, as Firecracker tells it."""
        return {"base_host_virt_addr": self.start, "size": self.size, "offset": 0, "page_size": PAGE}

    def begin(self, *words: object) -> None:
        """Have it do something; `said` waits for the end of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")

    def said(self) -> str:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], RawConnection.patience)
        assert readable, "the VMM says nothing: it waits for a page"
        return self._process.stdout.readline().strip()

    def do(self, *words: object) -> str:
        self.begin(*words)
        return self.said()

    def is_waiting(self) -> bool:
        """Whether it has not said yet what it was to do."""
        assert self._process.stdout is not None
        return not select.select([self._process.stdout], [], [], 0)[0]

    def hand_over(self, text: bytes, *descriptors: str) -> None:
        """On a new connection."""
        assert self.do("connect") == "connected"
        assert self.do("send", text.hex(), *descriptors) == "sent"

    def end(self) -> None:
        self._process.kill()
        self.wait()

    def wait(self) -> int:
        """Blocks until it has ended; returns its status."""
        status = self._process.wait(RawConnection.patience)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        return status


class Asker:
    """A `vmm` connection, an image of `PAGES` pages, and a socket that nobody knows yet. What it asked for is
    ended with the block."""

    def __init__(self, server: Path, directory: Path) -> None:
        self.connection = RawConnection(server)
        self.connection.say_hello("vmm")
        self.image = directory / "image"
        self.image.write_bytes(b"".join(map(content, range(PAGES))))
        self.listen = directory / "listen"
        self._vmms: list[VmmProcess] = []
        self._waiting: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.connection, ExitStack() as ending:
            if self._waiting is not None and kind is None:
                ending.callback(self.until, self._waiting, lambda now: now["state"] == "ended")
            for vmm in self._vmms:
                ending.callback(vmm.end)
            if self._waiting is not None and self.progress(self._waiting)["state"] == "waiting":
                ending.callback(self.served(self._waiting).end)

    def listener(self) -> socket.socket:
        """That at `listen`."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(self.listen))
        listener.listen()
        return listener

    def vmm(self) -> VmmProcess:
        vmm = VmmProcess(self.listen)
        self._vmms.append(vmm)
        return vmm

    def send(self, descriptors: Sequence[int], **fields: object) -> Any:
        """Ask for a restore; returns its reply, or a `Refusal`."""
        self.connection.send(request("restore", fields), descriptors)
        _, _, error, reply = self.connection.receive()
        return reply if error is None else Refusal(*error)

    def ask(self, *others: int, **fields: object) -> int:
        """Ask for a restore of the image, keep no listener, and return its partition_id."""
        with self.listener() as listener, self.image.open("rb") as image:
            return self.begun(self.send([image.fileno(), listener.fileno(), *others], **fields))

    def begun(self, reply: Any) -> int:
        """The partition_id in the reply to a restore, which the block then ends."""
        assert isinstance(reply, dict), reply
        assert reply["image_pages"] == PAGES
        self._waiting = reply["partition_id"]
        return self._waiting

    def served(self, partition_id: int, **fields: object) -> VmmProcess:
        """A VMM that has handed over its memory."""
        vmm = self.vmm()
        vmm.hand_over(as_json(vmm.region | fields), "userfaultfd")
        self.until(partition_id, lambda now: now["state"] != "waiting")
        return vmm

    def progress(self, partition_id: int) -> dict[str, Any]:
        figures: dict[str, Any] = self.connection.ask("restore_progress", {"partition_id": partition_id})
        return figures

    def until(self, partition_id: int, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first figures of which that holds."""
        deadline = time.monotonic() + RawConnection.patience
        while not holds(now := self.progress(partition_id)):
            assert time.monotonic() < deadline, now
            time.sleep(0.01)
        return now


def as_json(*regions: dict[str, object]) -> bytes:
    """As Firecracker writes them."""
    fields = (",".join(f'"{name}":{value}' for name, value in region.items()) for region in regions)
    return ("[" + ",".join(f"{{{each}}}" for each in fields) + "]").encode()


def memfd(data: bytes) -> int:
    descriptor = os.memfd_create("conformance")
    os.write(descriptor, data)
    return descriptor
