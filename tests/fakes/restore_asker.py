"""Who starts VMMs from snapshots, and has the daemon serve their memory.

Owns its connection, its image and its listening sockets. Must not know what the VMM does.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from fakes.eventually import eventually
from fakes.raw_client import RawConnection, Refusal, Refused, request
from fakes.restoring_vmm import image_bytes

PAGES: Final = 1024
"""Of the image."""


class Asker:
    """Who starts VMMs: its connection, its image, and its sockets."""

    def __init__(self, connection: RawConnection, directory: Path) -> None:
        self.connection = connection
        self.directory = directory
        self.image = directory / "image"
        self.image.write_bytes(image_bytes(PAGES))
        connection.say_hello("vmm")

    @property
    def listener(self) -> Path:
        return self.directory / "uffd.sock"

    def ask(self, *descriptors: int, **fields: object) -> Any:
        """Raises `Refused`."""
        self.connection.send(request("restore", fields), descriptors)
        return self.connection.answer()

    def refusal(self, *descriptors: int, **fields: object) -> Refusal:
        with pytest.raises(Refused) as refused:
            self.ask(*descriptors, **fields)
        return refused.value.refusal

    def restore(self, *more: int, **fields: object) -> int:
        """With a listener of its own, which it then closes."""
        with listening(self.listener) as listener, self.image.open("rb") as image:
            reply = self.ask(image.fileno(), listener.fileno(), *more, **fields)
        assert reply["image_pages"] == PAGES
        partition_id: int = reply["partition_id"]
        return partition_id

    def progress(self, partition_id: int) -> Any:
        return self.connection.ask("restore_progress", {"partition_id": partition_id})

    def wait_state(self, partition_id: int, state: str) -> Any:
        eventually(lambda: self.progress(partition_id)["state"], state)
        return self.progress(partition_id)

    def wait_error(self, partition_id: int, part: str) -> None:
        eventually(lambda: part in self.progress(partition_id)["error"], True)


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener


def numbers(first: int, count: int) -> str:
    """What a VMM reads of pages that have the image's content."""
    return " ".join(map(str, range(first, first + count)))
