"""A crowd at the daemon's door: `python -m fakes.crowd SOCKET KIND`, until it is killed.

1,000 connections that say nothing, 100 that send one byte a second, and 10 processes that send as fast as
they can, what KIND says. A peer that is refused connects again. Says "here" once all are there.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, cycle

from fakes.raw_client import ConnectionClosed, RawConnection, request
from fakes.raw_vmm import RawVmm

SILENT, SLOW, FAST = 1000, 100, 10
PR_SET_PDEATHSIG = 1
HELLO = request("hello", {"protocol": 1, "role": "vmm", "name": "slow"})
LONG_REQUEST = request("create_partition", {"name": "n" * 600})
GARBAGE = bytes(65536)
MANY_VALUES = b"\x94\x00\x01\xa6create\x91\xdd\x00\x00\xff\x00" + bytes(0xFF00)


def requests(path: str) -> None:
    """Create a partition and query its statistics."""
    with RawVmm(path) as vmm:
        while True:
            vmm.ask("statistics")


def garbage(path: str) -> None:
    """Alternately an invalid message and one of 65,280 values, each on a new connection."""
    for rubbish in cycle((GARBAGE, MANY_VALUES)):
        with suppress(OSError), RawConnection(path) as connection:
            connection.send(rubbish)
            connection.receive_all()


KINDS: dict[str, Callable[[str], None]] = {"requests": requests, "garbage": garbage}


def start_fast(path: str, kind: str) -> None:
    for _ in range(FAST):
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            KINDS[kind](path)
            os._exit(1)


class Quiet:
    """The silent and the slow: connected again whenever the daemon closes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._selector = selectors.DefaultSelector()
        for _ in range(SILENT):
            self._connect()
        self._slow: list[Iterator[None]] = [self._dribbling(number) for number in range(SLOW)]

    def live(self) -> None:
        """One byte of each slow one a second, spread over the second."""
        for turn in count():
            next(self._slow[turn % SLOW])
            end = time.monotonic() + 1 / SLOW
            while (left := end - time.monotonic()) > 0:
                for key, _ in self._selector.select(left):
                    self._answered(key.data)

    def _connect(self) -> RawConnection:
        connection = RawConnection(self._path)
        self._selector.register(connection, selectors.EVENT_READ, connection)
        return connection

    def _answered(self, silent: RawConnection) -> None:
        """Told that its time is up: another one comes in its place."""
        self._selector.unregister(silent)
        silent.close()
        self._connect()

    def _dribbling(self, number: int) -> Iterator[None]:
        """Every second one says hello first, and dribbles what follows; the others dribble theirs."""
        while True:
            with suppress(OSError, ConnectionClosed), RawConnection(self._path) as connection:
                if number % 2:
                    connection.say_hello("vmm")
                for byte in LONG_REQUEST if number % 2 else HELLO:
                    if connection.is_readable():
                        break
                    connection.send(bytes([byte]))
                    yield
            yield


if __name__ == "__main__":
    path, kind = sys.argv[1:]
    quiet = Quiet(path)
    start_fast(path, kind)
    print("here", flush=True)
    quiet.live()
