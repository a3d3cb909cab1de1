"""The clients for threads: one a role, each on its own connection.

Owns what a role adds to plain calls; must not do I/O itself, nor import trio. `timeout` is in seconds and
covers one whole call, waiting for other threads included; None waits for as long as the daemon takes.
See `BlockingConnection.run` for what a call that timed out leaves behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from intercept_protocol import messages
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.events import Event
from intercept_protocol.messages import HelloReply, PartitionCredentials
from intercept_protocol.outcomes import AnyAnswer
from intercept_protocol.rpc import Notification

from ._blocking_connection import BlockingConnection, deadline_in
from ._connecting import StrPath
from ._errors import ConnectionLost
from ._exchange import (
    END_TIMEOUT,
    Exchange,
    Reply,
    call_exchange,
    intercept_exchange,
    invalidation_exchanges,
)


class _Client:
    """A connection after its hello; `hello` is the daemon's answer, with its limits and features.

    `timeout` may be changed at any time and counts from the next call on.
    """

    def __init__(self, path: StrPath, hello: messages.Call[HelloReply], timeout: float | None) -> None:
        deadline = deadline_in(timeout)
        self.timeout = timeout
        self._connection = BlockingConnection.open(path, deadline)
        try:
            self.hello = self._connection.run(call_exchange(hello), deadline)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close at once; a call in another thread ends as `ConnectionLost`. May be repeated."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        self.close()


class _CallClient(_Client):
    def call(self, call: messages.Call[Reply]) -> Reply:
        """Ask and wait for the typed answer. Thread-safe: calls take turns.

        Raises `WireError` when the daemon refuses, `TimeoutError`, `ConnectionLost` when the connection
        ended, and `ProtocolViolation` when the daemon's answer was none; the latter two are for good.
        """
        return self._connection.run(call_exchange(call), deadline_in(self.timeout))


class BlockingVmm(_CallClient):
    """Role `vmm`: it is the partition, which ends when this is closed."""

    def call(self, call: messages.Call[Reply], *, descriptors: Sequence[int] = ()) -> Reply:
        """As of every client; `AttachMemory` takes `descriptors`, which stay the caller's to close."""
        return self._connection.run(call_exchange(call, descriptors), deadline_in(self.timeout))

    @classmethod
    def open(cls, path: StrPath, *, name: str = "", timeout: float | None = None) -> Self:
        """Connect as a VMM. Raises `OSError` that names the path, or what `call` raises."""
        return cls(path, messages.HelloVmm(name=name), timeout)


class BlockingVp(_Client):
    """Role `vp`: one virtual processor, which is detached when this is closed."""

    @classmethod
    def open(
        cls, path: StrPath, partition: PartitionCredentials, *, vp_index: int, timeout: float | None = None
    ) -> Self:
        """Attach one VP of `partition`; errors as `BlockingVmm.open`."""
        hello = messages.HelloVp(
            partition_id=partition.partition_id, token=partition.token, vp_index=vp_index
        )
        return cls(path, hello, timeout)

    def intercept(self, message: bytes) -> AnyAnswer:
        """Hand in one 256-byte intercept message and wait for what to do about it.

        Decide by the answer's `outcome`: a reason that only a later daemon has makes a `LaterAnswer`.

        One send and one receive. Raises as `BlockingVmm.call` does; to have a vCPU back while it waits here,
        `Kick` it through the VMM's connection, and it is answered KICKED.
        """
        return self._connection.run(intercept_exchange(message), deadline_in(self.timeout))


class BlockingNotifier(_CallClient):
    """Role `notifier`: tells of ranges whose frames are going. Closing it ends its own invalidations."""

    @classmethod
    def open(cls, path: StrPath, partition: PartitionCredentials, *, timeout: float | None = None) -> Self:
        """Connect as a notifier of `partition`; errors as `BlockingVmm.open`."""
        hello = messages.HelloNotifier(partition_id=partition.partition_id, token=partition.token)
        return cls(path, hello, timeout)

    @contextmanager
    def invalidation(self, uaddrs: UaddrRange) -> Iterator[None]:
        """Within the block the guest cannot reach `uaddrs` and faults on it wait. Thread-safe.

        The end is sent however the block ends, and waited for at most `END_TIMEOUT` seconds, whatever the
        client's timeout; a daemon that does not answer by then loses the connection, which ends the
        invalidation too. When the block raised, that error goes on and the failed end is a note on it. A
        begin that timed out is ended as well, if it turns out to have been carried out.
        """
        begin, end = invalidation_exchanges(uaddrs)
        try:
            self._connection.run(begin, deadline_in(self.timeout))
            yield
        except BaseException as error:
            try:
                self._end(begin, end)
            except (ConnectionLost, ProtocolViolation, WireError) as failure:
                error.add_note(f"invalidation of {uaddrs}: the end failed: {failure}")
            raise
        self._end(begin, end)

    def _end(self, begin: Exchange[None], end: Exchange[None]) -> None:
        deadline = deadline_in(END_TIMEOUT)
        try:
            if begin.is_owed:
                self._connection.wait_idle(deadline)
            if begin.succeeded:
                self._connection.run(end, deadline)
        except TimeoutError:
            self.close()
            raise ConnectionLost(f"{end.method} was not answered within {END_TIMEOUT:g} s, closed") from None


class BlockingOperator(_CallClient):
    """Role `operator`, on the operator's socket: looks and steers, and hears what happens."""

    @classmethod
    def open(cls, path: StrPath, *, timeout: float | None = None) -> Self:
        """Connect to the operator's socket; errors as `BlockingVmm.open`."""
        return cls(path, messages.HelloOperator(), timeout)

    def next_events(self) -> list[Event]:
        """Wait for what the daemon tells of that `Subscribe` asked for, oldest first; at least one event.

        Events of a later version of the wire are left out. Other threads' calls on this connection wait
        meanwhile. Raises as `call` does; `TimeoutError` leaves the connection as it was.
        """
        return self._connection.wait_events(deadline_in(self.timeout))

    def take_notifications(self) -> list[Notification]:
        """The notifications that came so far, oldest first; they are read while a call waits."""
        return self._connection.take_notifications()
