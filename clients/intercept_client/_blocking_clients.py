"""The clients for threads: one per role, each on its own connection.

Owns what a role adds to plain calls; must not do I/O itself, nor import trio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self

from intercept_protocol import messages
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import Event
from intercept_protocol.messages import HelloReply, PartitionCredentials
from intercept_protocol.outcomes import AnyAnswer
from intercept_protocol.rpc import Notification

from . import _notifier_requests, _operator_requests, _vmm_requests
from ._blocking_connection import BlockingConnection, deadline_in, opening_deadline
from ._connecting import StrPath
from ._errors import FATAL, ConnectionLost
from ._exchange import (
    END_TIMEOUT,
    Exchange,
    Reply,
    call_exchange,
    intercept_exchange,
)
from ._own_regions import OwnRegions
from ._series import Result, Series
from ._showing import as_function


class _Client:
    """What every client for threads has: `timeout`, `hello` and `close`."""

    hello: HelloReply
    """The daemon's answer to this client's hello, with its version, limits and features."""
    timeout: float | None
    """Seconds for one whole call, waiting for other threads included; None waits for as long as the daemon
    takes. May be changed at any time, and counts from the next call on.

    A call that timed out after its first byte was sent may still be carried out. Nobody gets its answer, and
    the connection stays usable: the next call first waits for that answer.
    """

    def __init__(
        self,
        path: StrPath,
        hello: messages.Call[HelloReply],
        timeout: float | None,
        open_timeout: float | None,
    ) -> None:
        """Use `open`."""
        deadline = opening_deadline(timeout, open_timeout)
        self.timeout = timeout
        self._connection, self.hello = BlockingConnection.open(path, lambda: call_exchange(hello), deadline)

    def close(self) -> None:
        """Close at once; a call in another thread raises `ConnectionLost`. May be repeated."""
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
        """Send any message of `intercept_protocol.messages`, and wait for its typed reply. Thread-safe.

        Raises `WireError` if the daemon refuses the request, `TimeoutError`, `ConnectionLost` if the
        connection ended, and `ProtocolViolation` if the reply was malformed. After the latter two the client
        is of no further use: every later call raises the same.
        """
        return self._run(call_exchange(call))

    def _run(self, exchange: Exchange[Reply]) -> Reply:
        return self._connection.run(exchange, deadline_in(self.timeout))


_P = ParamSpec("_P")


def _method(build: Callable[_P, Exchange[Reply]]) -> Callable[Concatenate[_CallClient, _P], Reply]:
    """A method that makes the request which `build` describes, and waits for its result."""

    def method(self: _CallClient, /, *args: _P.args, **kwargs: _P.kwargs) -> Reply:
        return self._run(build(*args, **kwargs))

    as_function(method, build, __name__, first="self", wrapper="Exchange")
    return method


def _series_method(
    build: Callable[_P, Series[Result]],
) -> Callable[Concatenate[_CallClient, _P], Result]:
    """A method that makes one request after the other, as `build` describes them."""

    def method(self: _CallClient, /, *args: _P.args, **kwargs: _P.kwargs) -> Result:
        series = build(*args, **kwargs)
        step: Callable[[], Exchange[Any]] = partial(next, series)
        while True:
            try:
                request = step()
            except StopIteration as end:
                result: Result = end.value
                return result
            try:
                step = partial(series.send, self._run(request))
            except WireError as refusal:
                step = partial(series.throw, refusal)

    as_function(method, build, __name__, first="self", wrapper="Series")
    return method


class BlockingVmm(_CallClient):
    """A VMM's main connection, for threads. It is the partition: closing it ends the partition.

    Every method may be called by any thread, and raises as `call` does.
    """

    regions: OwnRegions
    """What was added and not removed, for `BlockingHypervisor`: it lets the daemon map nothing else."""

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

    def __init__(
        self,
        path: StrPath,
        hello: messages.Call[HelloReply],
        timeout: float | None,
        open_timeout: float | None,
    ) -> None:
        """Use `open`."""
        self.regions = OwnRegions()
        super().__init__(path, hello, timeout, open_timeout)

    def call(self, call: messages.Call[Reply], *, descriptors: Sequence[int] = ()) -> Reply:
        """As `call` of every client; `descriptors` go along with the message and stay the caller's to close.

        Raises `ClientMisuse` for one that is not open.
        """
        return self._run(call_exchange(call, descriptors))

    def _run(self, exchange: Exchange[Reply]) -> Reply:
        return super()._run(self.regions.follow(exchange))

    @classmethod
    def open(
        cls,
        path: StrPath,
        *,
        name: str = "",
        timeout: float | None = None,
        open_timeout: float | None = None,
    ) -> Self:
        """Connect to the daemon's socket for VMMs; operators will see `name`.

        `timeout` becomes that of the calls. To connect and be welcomed may take `open_timeout` seconds, by
        default `timeout`, or 15 s without one; `math.inf` waits for as long as it takes.

        Raises an `OSError` that names the path, or as `call` does.
        """
        return cls(path, messages.HelloVmm(name=name), timeout, open_timeout)


class BlockingVp(_Client):
    """The connection of one virtual processor, for its thread. Closing it detaches the VP."""

    @classmethod
    def open(
        cls,
        path: StrPath,
        partition: PartitionCredentials,
        *,
        vp_index: int,
        timeout: float | None = None,
        open_timeout: float | None = None,
    ) -> Self:
        """Attach a VP of `partition`. The time-outs and errors are those of `BlockingVmm.open`."""
        hello = messages.HelloVp(
            partition_id=partition.partition_id, token=partition.token, vp_index=vp_index
        )
        return cls(path, hello, timeout, open_timeout)

    def intercept(self, message: bytes) -> AnyAnswer:
        """Hand in one 256-byte intercept message and wait for what to do about it.

        Act on the answer's `outcome`, as `clients/VCPU_LOOP.md` shows: a `LaterAnswer` has a reason that only
        a later daemon knows. The daemon answers in bounded time, some seconds at most. To get a vCPU back
        that waits here, call `kick` of a notifier or of the VMM's client: the answer is then `KICKED`.

        Raises as `BlockingVmm.call` does. If the daemon said why it closed the connection, the error is a
        `ConnectionEnded`, which holds its words.
        """
        return self._connection.run(intercept_exchange(message), deadline_in(self.timeout))


class BlockingNotifier(_CallClient):
    """Announces changes of the VMM's memory, for threads. Closing it ends the invalidations that it began.

    `intercept_client.memory` has the system calls that need it, each inside an invalidation.
    """

    invalidate = _method(_notifier_requests.invalidate)
    kick = _method(_vmm_requests.kick)

    @classmethod
    def open(
        cls,
        path: StrPath,
        partition: PartitionCredentials,
        *,
        timeout: float | None = None,
        open_timeout: float | None = None,
    ) -> Self:
        """Connect as a notifier of `partition`. The time-outs and errors are those of `BlockingVmm.open`."""
        hello = messages.HelloNotifier(partition_id=partition.partition_id, token=partition.token)
        return cls(path, hello, timeout, open_timeout)

    @contextmanager
    def invalidation(self, uaddrs: UaddrRange) -> Iterator[None]:
        """Within the block the guest cannot reach `uaddrs`, and faults there wait. Thread-safe.

        The end is sent however the block ends, and waited for at most 10 s, whatever the client's timeout. If
        the daemon does not answer by then, the connection is closed, which ends the invalidation too. If the
        block raised an error, that error is raised, with a note if the end failed as well. A begin that timed
        out is ended too, if it turns out that the daemon carried it out.
        """
        begin, end = _notifier_requests.invalidation(uaddrs)
        try:
            self._run(begin)
            yield
        except BaseException as error:
            try:
                self._end(begin, end)
            except (*FATAL, WireError) as failure:
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
    """A connection to the operators' socket, for threads: inspects, controls, and receives events.

    Every method may be called by any thread, and raises as `call` does.
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
    def open(cls, path: StrPath, *, timeout: float | None = None, open_timeout: float | None = None) -> Self:
        """Connect to the operators' socket. The time-outs and errors are those of `BlockingVmm.open`."""
        return cls(path, messages.HelloOperator(), timeout, open_timeout)

    def next_events(self) -> list[Event]:
        """Wait for events that `subscribe` asked for; returns at least one, oldest first.

        Skips events that only a later version of the wire knows. Calls of other threads on this connection
        wait meanwhile, so give events a connection of their own. Raises as `call` does; after a
        `TimeoutError` it may be called again.
        """
        return self._connection.wait_events(deadline_in(self.timeout))

    def take_notifications(self) -> list[Notification]:
        """The raw notifications that arrived while a call waited, oldest first."""
        return self._connection.take_notifications()
