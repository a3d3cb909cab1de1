"""The clients for trio: one a role, each on its own connection.

Owns what a role adds to plain calls; must not do I/O itself. Every method may block until the daemon answers,
and may be cancelled: see `TrioConnection.run` for what a cancelled call leaves behind.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar

import trio

from intercept_protocol import messages
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.events import Event
from intercept_protocol.messages import HelloReply, PartitionCredentials
from intercept_protocol.outcomes import AnyAnswer
from intercept_protocol.rpc import Notification

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
from ._trio_connection import TrioConnection


class _Client:
    """A connection after its hello; `hello` is the daemon's answer, with its limits and features."""

    def __init__(self, connection: TrioConnection, hello: HelloReply) -> None:
        self._connection = connection
        self.hello = hello

    def close(self) -> None:
        """Close at once; a call in another task ends as `ConnectionLost`. May be repeated."""
        self._connection.close()


class _CallClient(_Client):
    async def call(self, call: messages.Call[Reply]) -> Reply:
        """Ask and wait for the typed answer.

        Raises `WireError` when the daemon refuses, `ConnectionLost` when the connection ended, and
        `ProtocolViolation` when the daemon's answer was none; the latter two are for good. Calls of several
        tasks take turns.
        """
        return await self._connection.run(call_exchange(call))


class VmmClient(_CallClient):
    """Role `vmm`: it is the partition, which ends when this is closed."""

    async def call(self, call: messages.Call[Reply], *, descriptors: Sequence[int] = ()) -> Reply:
        """As of every client; `AttachMemory` takes `descriptors`, which stay the caller's to close."""
        return await self._connection.run(call_exchange(call, descriptors))


class VpClient(_Client):
    """Role `vp`: one virtual processor, which is detached when this is closed."""

    async def intercept(self, message: bytes) -> AnyAnswer:
        """Hand in one 256-byte intercept message and wait for what to do about it. Raises as `call` does.

        Decide by the answer's `outcome`: a reason that only a later daemon has makes a `LaterAnswer`.
        """
        return await self._connection.run(intercept_exchange(message))


class NotifierClient(_CallClient):
    """Role `notifier`: tells of ranges whose frames are going. Closing it ends its own invalidations."""

    @asynccontextmanager
    async def invalidation(self, uaddrs: UaddrRange) -> AsyncIterator[None]:
        """Within the block the guest cannot reach `uaddrs` and faults on it wait.

        The end is sent however the block ends, shielded from cancellation, for at most `END_TIMEOUT` seconds;
        a daemon that does not answer by then loses the connection, which ends the invalidation too. When the
        block raised, that error goes on and the failed end is a note on it. A begin that was cancelled
        is ended as well, if it turns out to have been carried out.
        """
        begin, end = invalidation_exchanges(uaddrs)
        try:
            await self._connection.run(begin)
            yield
        except BaseException as error:
            try:
                await self._end(begin, end)
            except (ConnectionLost, ProtocolViolation, WireError) as failure:
                error.add_note(f"invalidation of {uaddrs}: the end failed: {failure}")
            raise
        await self._end(begin, end)

    async def _end(self, begin: Exchange[None], end: Exchange[None]) -> None:
        with trio.move_on_after(END_TIMEOUT, shield=True) as scope:
            if begin.is_owed:
                await self._connection.wait_idle()
            if begin.succeeded:
                await self._connection.run(end)
        if scope.cancelled_caught:
            self.close()
            raise ConnectionLost(f"{end.method} was not answered within {END_TIMEOUT:g} s, closed")


class OperatorClient(_CallClient):
    """Role `operator`, on the operator's socket: looks and steers, and hears what happens."""

    async def next_events(self) -> list[Event]:
        """Wait for what the daemon tells of that `Subscribe` asked for, oldest first; at least one event.

        Events of a later version of the wire are left out. Other tasks' calls on this connection wait
        meanwhile. Raises as `call` does.
        """
        return await self._connection.wait_events()

    def take_notifications(self) -> list[Notification]:
        """The notifications that came so far, oldest first; they are read while a call waits."""
        return self._connection.take_notifications()


def open_vmm(path: StrPath, *, name: str = "") -> AbstractAsyncContextManager[VmmClient]:
    """Connect as a VMM. Entering raises `OSError` that names the path, or what `call` raises."""
    return _open(VmmClient, path, messages.HelloVmm(name=name))


def open_vp(
    path: StrPath, partition: PartitionCredentials, *, vp_index: int
) -> AbstractAsyncContextManager[VpClient]:
    """Attach one VP of `partition`; errors as `open_vmm`."""
    hello = messages.HelloVp(partition_id=partition.partition_id, token=partition.token, vp_index=vp_index)
    return _open(VpClient, path, hello)


def open_notifier(
    path: StrPath, partition: PartitionCredentials
) -> AbstractAsyncContextManager[NotifierClient]:
    """Connect as a notifier of `partition`; errors as `open_vmm`."""
    hello = messages.HelloNotifier(partition_id=partition.partition_id, token=partition.token)
    return _open(NotifierClient, path, hello)


def open_operator(path: StrPath) -> AbstractAsyncContextManager[OperatorClient]:
    """Connect to the operator's socket; errors as `open_vmm`."""
    return _open(OperatorClient, path, messages.HelloOperator())


_ClientT = TypeVar("_ClientT", bound=_Client)


@asynccontextmanager
async def _open(
    form: type[_ClientT], path: StrPath, hello: messages.Call[HelloReply]
) -> AsyncIterator[_ClientT]:
    connection = await TrioConnection.open(path)
    try:
        yield form(connection, await connection.run(call_exchange(hello)))
    finally:
        connection.close()
