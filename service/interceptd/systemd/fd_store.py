"""The descriptor store of a service manager: FDSTORE of sd_pid_notify_with_fds(3), without libsystemd.

Owns $FDSTORE and $INTERCEPTD_KEEP, the socket to the manager, and the count of stored descriptors. A datagram
has no answer, so it never learns what the manager did. Must not know what a name means.
"""

from __future__ import annotations

import array
import errno
import math
import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import structlog
import trio

from intercept_protocol.text import sentence
from interceptd.systemd.notify import manager_address

log = structlog.get_logger()

CAPACITY: Final = 4096
"""Descriptors that a store takes if its manager does not say: FileDescriptorStoreMax= of our units."""
SEND_SECONDS: Final = 1.0
"""How long a manager may take to make room for a datagram."""
KEEP_VARIABLE: Final = "INTERCEPTD_KEEP"
"""`yes`: the manager has a store. Only systemd 254 or newer says so itself, by $FDSTORE."""


class StoreRefused(Exception):
    """Descriptors were not stored; the text says why."""


class FdStore:
    """Duplicates of our descriptors, which the next daemon gets. Names are short: ASCII without a colon."""

    def __init__(self, address: str, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._held: Counter[str] = Counter()
        self._unremoved: list[str] = []
        """Names whose FDSTOREREMOVE found no room."""
        self._logged = False
        self.works = True
        """Whether the manager that holds our descriptors lives. If it dies, everything that it held is
        gone."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._waiting = trio.socket.from_stdlib_socket(self._socket)
        """The same socket, for a call that may wait."""
        self._turn = trio.Lock()
        """Only one task may wait for room."""
        self._sent_at = -math.inf
        """When the manager last had room for what was stored."""
        try:
            self._socket.connect(address)  # fails if no manager is bound there
        except OSError as error:
            self._lose(sentence(error))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> FdStore | None:
        """None without a manager, or with one that does not keep descriptors."""
        address, stated = manager_address(environment), environment.get("FDSTORE", "")
        promised = environment.get(KEEP_VARIABLE) == "yes"
        capacity = int(stated) if stated.isdecimal() else (CAPACITY if promised else 0)
        return cls(address, capacity) if address is not None and capacity else None

    def close(self) -> None:
        """Call it when no `store` waits."""
        self._socket.close()

    def adopt(self, names: Iterable[str]) -> None:
        """Count what a predecessor stored: one name per descriptor."""
        self._held.update(names)

    @property
    def held(self) -> int:
        """How many descriptors are in the store, by our own count."""
        return self._held.total()

    @property
    def room(self) -> int:
        """How many more it takes."""
        return self._capacity - self.held

    def held_as(self, names: Iterable[str]) -> int:
        """How many descriptors are in it under these names."""
        return sum(self._held[name] for name in names)

    async def store(self, name: str, descriptors: Sequence[int], *, poll: bool) -> None:
        """Have duplicates of all `descriptors` kept. None are if it raises `StoreRefused` or is cancelled.

        With `poll` the manager drops one that hangs up; then call `hung_up`. Waits at most `SEND_SECONDS` for
        a manager that reads nothing; tasks that wait at the same time share that limit.
        """
        if not self.works:
            raise StoreRefused("the service manager that kept descriptors is gone")
        if self.held + len(descriptors) > self._capacity:
            raise self._refusal(f"the store holds {self.held} of {self._capacity}")
        self._held[name] += len(descriptors)  # before the wait: others may store meanwhile
        asked_at = trio.current_time()
        try:
            async with self._turn:
                with trio.fail_at(max(asked_at, self._sent_at) + SEND_SECONDS):
                    await self._send(_stored(name, poll), descriptors)
                self._sent_at = trio.current_time()
        except BaseException as error:
            self._give_back(name, len(descriptors))
            match error:
                case trio.TooSlowError():
                    raise self._refusal(f"the service manager has not read for {SEND_SECONDS} s") from None
                case OSError():
                    raise self._refusal_after(error) from None
            raise
        self._logged = False

    def remove(self, name: str) -> bool:
        """Have everything dropped that was stored under `name`. Does not wait: a message that finds no room
        is sent before the next store. Returns whether anything was stored.
        """
        if not (self.works and name in self._held):
            return False
        self._unremoved.append(name)
        self._send_unremoved()
        return True

    def hung_up(self, name: str) -> None:
        """Give back the room of a polled descriptor: it was shut down, so the manager drops it by itself."""
        self._give_back(name, 1)

    async def settle(self) -> None:
        """Wait until the manager has handled every message so far: sd_notify_barrier(3); at most
        `SEND_SECONDS`.

        Call it between `remove` and a close that may wait for a peer. That must be the last close: a manager
        that waits holds up everyone whom it serves.
        """
        ours, theirs = socket.socketpair()
        with ours, trio.move_on_after(SEND_SECONDS), suppress(OSError):
            with theirs:
                async with self._turn:
                    await self._send(b"BARRIER=1", [theirs.fileno()])
            await trio.lowlevel.wait_readable(ours)  # the manager has closed the other end

    # ------------------------------------------------ helpers

    def _give_back(self, name: str, count: int) -> None:
        self._held[name] -= count
        if self._held[name] <= 0:
            del self._held[name]

    async def _send(self, message: bytes, descriptors: Sequence[int]) -> None:
        """Wait until the manager has room. Removals go first: they may concern the same name."""
        while not self._send_unremoved():
            await trio.lowlevel.wait_writable(self._socket)
        await self._waiting.sendmsg([message], [_passing(descriptors)])

    def _send_unremoved(self) -> bool:
        """Returns whether there was room for all."""
        while self._unremoved:
            name = self._unremoved[0]
            try:
                self._socket.send(f"FDSTOREREMOVE=1\nFDNAME={name}".encode())
            except BlockingIOError:
                return False
            except OSError as error:
                self._lose(sentence(error))
                break
            del self._unremoved[0], self._held[name]
        return True

    def _refusal_after(self, error: OSError) -> StoreRefused:
        if error.errno in (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE):
            self._lose(sentence(error))
        return self._refusal(sentence(error))

    def _lose(self, why: str) -> None:
        self.works = False
        self._refusal(why)

    def _refusal(self, why: str) -> StoreRefused:
        """Logged once, until something is stored again."""
        if not self._logged:
            log.error("descriptors_not_stored", error=why, stored=self.held)
        self._logged = True
        return StoreRefused(why)


def _stored(name: str, poll: bool) -> bytes:
    facts = ["FDSTORE=1", f"FDNAME={name}", *([] if poll else ["FDPOLL=0"])]
    return "\n".join(facts).encode()


def _passing(descriptors: Sequence[int]) -> tuple[int, int, array.array[int]]:
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors)
