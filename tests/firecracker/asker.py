"""Who starts VMMs and has a daemon serve their memory: one connection, by raw bytes.

Owns the request's descriptors. As a program, `python -m firecracker.asker DAEMON IMAGE LISTEN`, it asks once,
prints the partition's id, and stays until it is killed.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fakes.raw_client import RawConnection, request


class Asker:
    """Connected as a VMM that has no partition."""

    def __init__(self, daemon: Path) -> None:
        self._connection = RawConnection(daemon)
        self._connection.say_hello("vmm")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def restore(
        self,
        image: Path | int,
        listen: Path,
        *,
        prefetch: Sequence[tuple[int, int]] | None = None,
        **options: object,
    ) -> int:
        """Ask the daemon to serve the VMM that connects to `listen`; the partition's id. `prefetch`: runs of
        pages, each the first one and their number."""
        with ExitStack() as held:
            listener = held.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(os.fspath(listen))
            listener.listen()
            descriptors = [held.enter_context(_opened(image)), listener.fileno()]
            if prefetch is not None:
                descriptors.append(held.enter_context(_page_list(prefetch)))
                options["prefetch"] = True
            self._connection.send(request("restore", options), descriptors)
            partition_id: int = self._connection.answer()["partition_id"]
            return partition_id

    def progress(self, partition_id: int) -> Any:
        return self._connection.ask("restore_progress", {"partition_id": partition_id})


@contextmanager
def _opened(image: Path | int) -> Iterator[int]:
    file = os.dup(image) if isinstance(image, int) else os.open(image, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


@contextmanager
def _page_list(runs: Sequence[tuple[int, int]]) -> Iterator[int]:
    file = os.memfd_create("prefetch")
    try:
        numbers = (number for run in runs for number in run)
        os.write(file, b"".join(number.to_bytes(4, "little") for number in numbers))
        yield file
    finally:
        os.close(file)


if __name__ == "__main__":
    daemon, image, listen = map(Path, sys.argv[1:])
    with Asker(daemon) as asker:
        print(asker.restore(image, listen), flush=True)
        signal.pause()
