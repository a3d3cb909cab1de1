"""Descriptors between a VMM's message and their attachment.

Owns them meanwhile, and examines them in a worker thread: a peer decides how long examining or closing a file
on its FUSE mount takes. After a timeout the side that finishes last closes them. Must not know userfaultfds.
"""

from __future__ import annotations

import errno
import threading

import trio

from interceptd.address_space import Undecided
from interceptd.address_space.attachment import Attachment
from interceptd.address_space.descriptors import attach
from interceptd.address_space.workers import Workers
from interceptd.connections.closer import Closer
from interceptd.connections.peer import Peer


class Handover:
    """`received` descriptors were sent, of which `descriptors` were kept. For one call of `attachment`."""

    def __init__(
        self, descriptors: list[int], received: int, peer: Peer, *, promised: bool, closer: Closer
    ) -> None:
        self._descriptors = descriptors
        self._received = received
        self._peer = peer
        self._promised = promised
        self._closer = closer
        self._lock = threading.Lock()
        self._begun = False
        self._abandoned = False
        self._made: Attachment | None = None

    async def attachment(self, seconds: float, workers: Workers) -> Attachment:
        """Blocks for up to `seconds`, then raises `Undecided`. Raises `WireError` for wrong descriptors."""
        try:
            with trio.fail_after(seconds):
                return await workers.ask(self._attach)
        except trio.TooSlowError:
            self._abandon()
            raise Undecided("examining a descriptor timed out", errno.ETIMEDOUT) from None
        except BaseException:
            self._abandon()
            raise

    def _attach(self) -> Attachment:
        with self._lock:
            if self._abandoned:
                raise Undecided("abandoned before it began")
            self._begun = True
        made = attach(
            self._descriptors, self._received, self._peer, promised=self._promised, closer=self._closer
        )
        with self._lock:
            self._made = made
            if self._abandoned:
                made.close()
        return made

    def _abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            if not self._begun:
                self._closer.close(self._descriptors)
            if self._made is not None:
                self._made.close()
