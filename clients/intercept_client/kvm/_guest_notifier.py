"""The notifier connection of a VMM whose guest runs here.

Owns what an invalidation does once the daemon is gone: it deletes the memslots over the range itself. So
every function of `intercept_client.memory` works as before, and none hangs or leaves a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from intercept_client._blocking_clients import BlockingNotifier
from intercept_client._connecting import StrPath
from intercept_client._errors import FATAL
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import PartitionCredentials

from ._daemon_loss import DaemonLoss

_LOST = (*FATAL, TimeoutError)


class GuestNotifier(BlockingNotifier):
    """A notifier that works without the daemon, too.

    `timeout` bounds a begin: a daemon that hangs counts as gone.
    """

    _loss: DaemonLoss

    @classmethod
    def open_for(
        cls, path: StrPath, partition: PartitionCredentials, loss: DaemonLoss, *, timeout: float | None
    ) -> Self:
        notifier = cls.open(path, partition, timeout=timeout)
        notifier._loss = loss
        return notifier

    @contextmanager
    def invalidation(self, uaddrs: UaddrRange) -> Iterator[None]:
        """As `BlockingNotifier.invalidation`, but never raises `ConnectionLost`."""
        announced = super().invalidation(uaddrs)
        try:
            announced.__enter__()
        except _LOST as error:
            self._loss.lose(str(error))
            self._loss.memory.unmap_behind(uaddrs)
            yield
            return
        try:
            yield
        except BaseException as error:
            announced.__exit__(type(error), error, error.__traceback__)
            raise
        try:
            announced.__exit__(None, None, None)
        except _LOST as error:
            self._loss.lose(str(error))  # the change was made while the guest could not reach it
