"""The clients for trio: one per role, each on its own connection.

Owns what a role adds to plain calls; must not do I/O itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Concatenate, ParamSpec, Self

import trio

from intercept_protocol import messages
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import Event
from intercept_protocol.messages import HelloReply, PartitionCredentials
from intercept_protocol.outcomes import AnyAnswer
from intercept_protocol.rpc import Notification

from . import _notifier_requests, _operator_requests, _vmm_requests
from ._connecting import OPEN_SECONDS, StrPath
from ._errors import FATAL, ConnectionLost
from ._exchange import END_TIMEOUT, Exchange, Reply, call_exchange, intercept_exchange
from ._own_regions import OwnRegions
from ._series import Result, Series
from ._showing import as_function
from ._trio_connection import TrioConnection


class _Client:
    """What every client for trio has: `hello` and `close`.

    Every call may block until the daemon answers, and may be cancelled. A call that was cancelled after its
    first byte was sent may still be carried out. Nobody gets its answer, and the connection stays usable: the
    next call first waits for that answer.
    """

    hello: HelloReply
    """The daemon's answer to this client's hello, with its version, limits and features."""

    def __init__(self, connection: TrioConnection, hello: HelloReply) -> None:
        """Use `open`."""
        self._connection = connection
        self.hello = hello

    @classmethod
    @asynccontextmanager
    async def _open(
        cls, path: StrPath, hello: messages.Call[HelloReply], open_timeout: float
    ) -> AsyncIterator[Self]:
        connection, answer = await TrioConnection.open(path, lambda: call_exchange(hello), open_timeout)
        try:
            yield cls(connection, answer)
        finally:
            connection.close()

    def close(self) -> None:
        """Close at once; a call in another task raises `ConnectionLost`. May be repeated."""
        self._connection.close()


class _CallClient(_Client):
    async def call(self, call: messages.Call[Reply]) -> Reply:
        """Send any message of `intercept_protocol.messages`, and wait for its typed reply. Tasks take turns.

        Raises `WireError` if the daemon refuses the request, `ConnectionLost` if the connection ended, and
        `ProtocolViolation` if the reply was malformed. After the latter two the client is of no further use:
        every later call raises the same.
        """
        return await self._run(call_exchange(call))

    def _run(self, exchange: Exchange[Reply]) -> Awaitable[Reply]:
        return self._connection.run(exchange)


_P = ParamSpec("_P")


def _method(build: Callable[_P, Exchange[Reply]]) -> Callable[Concatenate[_CallClient, _P], Awaitable[Reply]]:
    """A method that makes the request which `build` describes, and waits for its result."""

    async def method(self: _CallClient, /, *args: _P.args, **kwargs: _P.kwargs) -> Reply:
        return await self._run(build(*args, **kwargs))

    as_function(method, build, __name__, first="self", wrapper="Exchange")
    return method


def _series_method(
    build: Callable[_P, Series[Result]],
) -> Callable[Concatenate[_CallClient, _P], Awaitable[Result]]:
    """A method that makes one request after the other, as `build` describes them."""

    async def method(self: _CallClient, /, *args: _P.args, **kwargs: _P.kwargs) -> Result:
        series = build(*args, **kwargs)
        step: Callable[[], Exchange[Any]] = partial(next, series)
        while True:
            try:
                request = step()
            except StopIteration as end:
                result: Result = end.value
                return result
            try:
                step = partial(series.send, await self._run(request))
            except WireError as refusal:
                step = partial(series.throw, refusal)

    as_function(method, build, __name__, first="self", wrapper="Series")
    return method


class TrioVmm(_CallClient):
    """A VMM's main connection, for trio. It is the partition: closing it ends the partition.

    Every method raises as `call` does.
    """

    regions: OwnRegions
    """What was added and not removed, for `TrioHypervisor`: it lets the daemon map nothing else."""

    create_partition = _method(_vmm_requests.create_partition)
    attach_memory = _series_method(_vmm_requests.attach_memory)
    restore = _series_method(_vmm_requests.restore)
    restore_progress = _method(_vmm_requests.restore_progress)
    add_region = _method(_vmm_requests.add_region)
    remove_region = _method(_vmm_requests.remove_region)
    change_regions = _method(_vmm_requests.change_regions)
    add_regions = _method(_vmm_requests.add_regions)
    map_vma = _method(_vmm_requests.map_vma)
    map_vmas = _method(_vmm_requests.map_vmas)
    unmap_vma = _method(_vmm_requests.unmap_vma)
    protect_vma = _method(_vmm_requests.protect_vma)
    kick = _method(_vmm_requests.kick)
    set_policy = _method(_vmm_requests.set_policy)
    statistics = _method(_vmm_requests.statistics)
    translate = _method(_vmm_requests.translate)
    prefault = _series_method(_vmm_requests.prefault)
    list_regions = _series_method(_vmm_requests.list_regions)
    list_vmas = _series_method(_vmm_requests.list_vmas)
    list_mappings = _series_method(_vmm_requests.list_mappings)

    @classmethod
    def open(
        cls, path: StrPath, *, name: str = "", open_timeout: float = OPEN_SECONDS
    ) -> AbstractAsyncContextManager[Self]:
        """Connect to the daemon's socket for VMMs, for the length of an `async with` block.

        Operators will see `name`. To connect and be welcomed may take `open_timeout` seconds; `math.inf`
        waits for as long as it takes.

        Raises `TimeoutError`, another `OSError` that names the path, or as `call` does.
        """
        return cls._open(path, messages.HelloVmm(name=name), open_timeout)

    def __init__(self, connection: TrioConnection, hello: HelloReply) -> None:
        """Use `open`."""
        self.regions = OwnRegions()
        super().__init__(connection, hello)

    async def call(self, call: messages.Call[Reply], *, descriptors: Sequence[int] = ()) -> Reply:
        """As `call` of every client; `descriptors` go along with the message and stay the caller's to close.

        Raises `ClientMisuse` for one that is not open.
        """
        return await self._run(call_exchange(call, descriptors))

    def _run(self, exchange: Exchange[Reply]) -> Awaitable[Reply]:
        return super()._run(self.regions.follow(exchange))


class TrioVp(_Client):
    """The connection of one virtual processor, for its task. Closing it detaches the VP."""

    @classmethod
    def open(
        cls,
        path: StrPath,
        partition: PartitionCredentials,
        *,
        vp_index: int,
        open_timeout: float = OPEN_SECONDS,
    ) -> AbstractAsyncContextManager[Self]:
        """Attach a VP of `partition`. Takes as long, and raises, as `TrioVmm.open` does."""
        hello = messages.HelloVp(
            partition_id=partition.partition_id, token=partition.token, vp_index=vp_index
        )
        return cls._open(path, hello, open_timeout)

    async def intercept(self, message: bytes) -> AnyAnswer:
        """Hand in one 256-byte intercept message and wait for what to do about it.

        Act on the answer's `outcome`, as `clients/VCPU_LOOP.md` shows: a `LaterAnswer` has a reason that only
        a later daemon knows. The daemon answers in bounded time, some seconds at most. To get a vCPU back
        that waits here, call `kick` of a notifier or of the VMM's client: the answer is then `KICKED`.

        Raises as `TrioVmm.call` does. If the daemon said why it closed the connection, the error is a
        `ConnectionEnded`, which holds its words.
        """
        return await self._connection.run(intercept_exchange(message))


class TrioNotifier(_CallClient):
    """Announces changes of the VMM's memory, for trio. Closing it ends the invalidations that it began.

    `intercept_client.trio_memory` has the system calls that need it, each inside an invalidation.
    """

    invalidate = _method(_notifier_requests.invalidate)
    kick = _method(_vmm_requests.kick)

    @classmethod
    def open(
        cls, path: StrPath, partition: PartitionCredentials, *, open_timeout: float = OPEN_SECONDS
    ) -> AbstractAsyncContextManager[Self]:
        """Connect as a notifier of `partition`. Takes as long, and raises, as `TrioVmm.open` does."""
        hello = messages.HelloNotifier(partition_id=partition.partition_id, token=partition.token)
        return cls._open(path, hello, open_timeout)

    @asynccontextmanager
    async def invalidation(self, uaddrs: UaddrRange) -> AsyncIterator[None]:
        """Within the block the guest cannot reach `uaddrs`, and faults there wait.

        The end is sent however the block ends, shielded from cancellation, and waited for at most 10 s. If
        the daemon does not answer by then, the connection is closed, which ends the invalidation too. If the
        block raised an error, that error is raised, with a note if the end failed as well. A begin that was
        cancelled is ended too, if it turns out that the daemon carried it out.
        """
        begin, end = _notifier_requests.invalidation(uaddrs)
        try:
            await self._connection.run(begin)
            yield
        except BaseException as error:
            try:
                await self._end(begin, end)
            except (*FATAL, WireError) as failure:
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


class TrioOperator(_CallClient):
    """A connection to the operators' socket, for trio: inspects, controls, and receives events.

    Every method raises as `call` does.
    """

    list_partitions = _series_method(_operator_requests.list_partitions)
    inspect_partition = _method(_operator_requests.inspect_partition)
    list_regions = _series_method(_operator_requests.list_regions)
    list_vmas = _series_method(_operator_requests.list_vmas)
    list_mappings = _series_method(_operator_requests.list_mappings)
    statistics = _method(_operator_requests.statistics)
    set_policy = _method(_operator_requests.set_policy)
    drain = _method(_operator_requests.drain)
    restart = _method(_operator_requests.restart)
    subscribe = _method(_operator_requests.subscribe)
    trace = _method(_operator_requests.trace)

    @classmethod
    def open(cls, path: StrPath, *, open_timeout: float = OPEN_SECONDS) -> AbstractAsyncContextManager[Self]:
        """Connect to the operators' socket. Takes as long, and raises, as `TrioVmm.open` does."""
        return cls._open(path, messages.HelloOperator(), open_timeout)

    async def next_events(self) -> list[Event]:
        """Wait for events that `subscribe` asked for; returns at least one, oldest first.

        Skips events that only a later version of the wire knows. Calls of other tasks on this connection wait
        meanwhile, so give events a connection of their own. Raises as `call` does.
        """
        return await self._connection.wait_events()

    def take_notifications(self) -> list[Notification]:
        """The raw notifications that arrived while a call waited, oldest first."""
        return self._connection.take_notifications()
