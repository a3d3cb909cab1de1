"""Descriptors on their way from a VMM's message to an attachment.

Owns them in between, and sorts them out in a worker thread: to look at a file on a peer's FUSE mount, or to
close it, takes as long as the peer likes. Given up, they are closed by whoever finds them last.
"""

from __future__ import annotations

import errno
import threading

import trio

from interceptd.address_space import Undecided
from interceptd.address_space.attachment import Attachment
from interceptd.address_space.descriptors import attach
from interceptd.address_space.workers import Workers
from interceptd.connections.peer import Peer
from interceptd.connections.received_fds import close_in_thread


class Handover:
    """Of `received` descriptors, `descriptors` are kept. Good for one `attachment`."""

    def __init__(self, descriptors: list[int], received: int, peer: Peer, *, promised: bool) -> None:
        self._descriptors = descriptors
        self._received = received
        self._peer = peer
        self._promised = promised
        self._lock = threading.Lock()
        self._begun = False
        self._abandoned = False
        self._made: Attachment | None = None

    async def attachment(self, seconds: float, workers: Workers) -> Attachment:
        """Raises `Undecided` after `seconds`, and `WireError` for what is not to be had or wrong."""
        try:
            with trio.fail_after(seconds):
                return await workers.ask(self._sort_out)
        except trio.TooSlowError:
            self._abandon()
            raise Undecided("a descriptor does not answer", errno.ETIMEDOUT) from None
        except BaseException:
            self._abandon()
            raise

    def _sort_out(self) -> Attachment:
        with self._lock:
            if self._abandoned:
                raise Undecided("given up before it began")
            self._begun = True
        made = attach(self._descriptors, self._received, self._peer, promised=self._promised)
        with self._lock:
            self._made = made
            if self._abandoned:
                made.close()
        return made

    def _abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            if not self._begun and self._descriptors:
                close_in_thread(self._descriptors)
            if self._made is not None:
                self._made.close()
