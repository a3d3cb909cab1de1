"""Processes that are killed while they write to a ledger, at whichever instruction that hits them.

Owns the processes and the moments: a drawn number of turns of a loop after something that they did, no time.
What must be left of them is the callers' to say.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from interceptd.ledger.inbox import Inbox
from interceptd.ledger.ledger import Ledger

SPINS = 1000
"""Turns of an empty loop, some 30 us: about a request, or ten records."""
COPYING = 3000
"""Turns before a server that copies has copied: else few kills would hit it."""
HEAD = b"\x94\x00\x07\xa9intercept\x91\xc5\x01\x00"
"""Of a request, whose 256 bytes follow."""
ANSWER = 8
"""Bytes of an answer: the last ones of its request."""


@contextmanager
def killed(work: Callable[[], NoReturn]) -> Iterator[None]:
    """A process that works during the block, and is killed at its end."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "it worked until it was killed"


def spin(rng: random.Random) -> None:
    for _ in range(rng.randrange(SPINS)):
        pass


def appended(rng: random.Random, ledger: Ledger) -> int:
    """Have numbered records of drawn lengths appended, until a kill; how many were, by the writer's word."""
    word = mmap.mmap(-1, mmap.PAGESIZE)
    count = memoryview(word).cast("Q")
    seed = rng.random()

    def append() -> NoReturn:
        lengths = random.Random(seed)
        while True:
            ledger.append(record(count[0], lengths.randrange(400)))
            count[0] += 1

    with killed(append):
        while not count[0]:
            os.sched_yield()
        spin(rng)
    return count[0]


def record(number: int, length: int) -> bytes:
    return number.to_bytes(8, "little") + bytes([number % 251]) * length


def torn(seed: int, ledger: Ledger) -> str | None:
    """What is wrong with a log whose writer was killed."""
    said = appended(random.Random(seed), ledger)
    successor = Ledger.open(os.dup(ledger.descriptor))
    frames = [frame for frame, _ in successor.frames()]
    successor.close()
    for number, frame in enumerate(frames):
        if frame != record(number, len(frame) - 8):
            return f"record {number} of {len(frames)} is {frame[:16]!r}"
    return None if said <= len(frames) <= said + 1 else f"{said} were appended, and {len(frames)} are there"


class KilledServer:
    """A server of one connection that receives into an inbox, and is killed in the middle of a request.

    It notes nothing where `pieces` is 0: requests are then sent whole, as intercepts are. `copies` is for a
    server that receives elsewhere and copies what it has received. `lost` counts the requests of which no
    trace was left; `answered`, `owed` and `unread` what became of the others, and `twice` those that were
    sent an answer and are owed one.
    """

    def __init__(
        self, rng: random.Random, ledger: Ledger, number: int, *, pieces: int = 0, copies: bool = False
    ) -> None:
        ledger.inbox(number).clear()
        self.lost = self.answered = self.owed = self.unread = self.twice = 0
        self._rng = rng
        self._ledger = ledger
        self._number = number
        self._pieces = pieces
        self._copies = copies
        self._ours, self._theirs = socket.socketpair()
        self._steps = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        """How often it has received or sent something."""

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()

    def live(self) -> None:
        """Some requests are answered, and during the last one it is killed."""
        before = b""
        with killed(self._serve):
            for _ in range(self._rng.randrange(3)):
                request = self._request()
                self._send(request)
                assert self._theirs.recv(ANSWER) == request[-ANSWER:]
                before = request
            request = self._request()
            at = self._steps[0] + self._rng.randrange(3)
            self._send(request)
            while self._steps[0] < at:
                os.sched_yield()
            spin(self._rng)
        self._look(before, request)

    def _look(self, before: bytes, request: bytes) -> None:
        inbox = self._ledger.inbox(self._number)
        answer, unread, owed = _rest(self._theirs), _rest(self._ours), inbox.take_over()
        if owed and owed == before:
            self.twice += 1
            owed = b""
        if answer:
            assert answer == request[-ANSWER:]
            self.answered += 1
            self.twice += bool(owed)
        elif owed + unread != request:
            self.lost += 1
        else:
            self.owed += bool(owed)
            self.unread += bool(unread)
        inbox.answered()

    def _request(self) -> bytes:
        """Like an intercept; no byte of it is an idle inbox's."""
        seed = self._rng.getrandbits(64) & 0x7F7F_7F7F_7F7F_7F7F
        return HEAD + seed.to_bytes(ANSWER, "little") * (256 // ANSWER)

    def _send(self, request: bytes) -> None:
        for at in range(0, len(request), self._pieces or len(request)):
            self._theirs.send(request[at : at + (self._pieces or len(request))])

    def _serve(self) -> NoReturn:
        inbox = self._ledger.inbox(self._number)
        while True:
            received = b""
            while len(received) < len(HEAD) + 256:
                piece = self._receive(inbox)
                if self._pieces:
                    inbox.note(len(piece))
                received += piece
            self._ours.send(received[-ANSWER:])
            self._steps[0] += 1
            inbox.answered()

    def _receive(self, inbox: Inbox) -> bytes:
        [space] = inbox.space(4096)
        if not self._copies:
            data = inbox.received(self._ours.recv_into(space))
            self._steps[0] += 1
            return data
        data = self._ours.recv(len(space))
        self._steps[0] += 1
        for _ in range(COPYING):
            pass
        space[: len(data)] = data
        return data


def _rest(source: socket.socket) -> bytes:
    """All that is unread."""
    try:
        return source.recv(1 << 16, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""
