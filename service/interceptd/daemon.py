"""The daemon: its listening sockets, its partitions, and its drain.

Owns the order of the start and of the end, and when the service manager is notified. Must not know roles,
methods or signals.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NoReturn

import structlog
import trio

from intercept_protocol import messages
from intercept_protocol.errors import WireError
from intercept_protocol.events import DaemonRestarted, DrainStarted
from intercept_protocol.messages import ADDRESS_SPACES, HYPERVISORS, PROTOCOL_VERSION, Architecture
from intercept_protocol.text import sentence
from interceptd import __version__
from interceptd.config.live import Settings
from interceptd.config.schema import Config
from interceptd.connections.accept import Shortage, accept_forever
from interceptd.connections.listen_address import ListenAddress
from interceptd.connections.unix_listener import ListenError, listen_unix
from interceptd.memory_budget import MemoryBudget, resident_bytes
from interceptd.partition.factory import PartitionFactory
from interceptd.partition.keeping import LAST_ID, Keeper
from interceptd.partition.partition import by_outcome
from interceptd.partition.registry import PartitionRegistry
from interceptd.recovery.compactor import Compactor
from interceptd.recovery.recover import Recovery
from interceptd.scheduling.step_monitor import StepMonitor
from interceptd.scheduling.time_share import TimeShares
from interceptd.sessions.dispatcher import Dispatcher
from interceptd.sessions.handshake import Endpoint
from interceptd.successor import require_successor
from interceptd.systemd.fd_store import FdStore, StoreRefused
from interceptd.systemd.notify import ServiceManager
from interceptd.systemd.socket_activation import OWN_OPERATOR, OWN_VMM, PassedSockets
from interceptd.telemetry.event_bus import EventBus
from interceptd.vital import EX_TEMPFAIL, leave, vital

log = structlog.get_logger()
OPERATOR_SOCKET_MODE = 0o600
END_SECONDS = 5
"""What the service manager is asked to allow after the drain, for the rest of the end."""
LAST_EVENTS_SECONDS = 0.5
"""How long operators have to read the last events, before their connections close."""
NONE_PASSED = PassedSockets()


class Daemon:
    """`run` serves until the daemon is drained; any task may call `drain`."""

    def __init__(
        self,
        settings: Settings,
        *,
        chaos: int = 0,
        passed: PassedSockets = NONE_PASSED,
        manager: ServiceManager | None = None,
        store: FdStore | None = None,
        check_successor: Sequence[str] = (),
    ) -> None:
        """`check_successor` is the command that finds out whether a restart would succeed."""
        self.partitions = PartitionRegistry()
        self.event_bus = EventBus()
        self._settings = settings
        self._passed = passed
        self._manager = manager or ServiceManager()
        self._check_successor = check_successor
        self._compactor = Compactor()
        self._keeper = Keeper(store, self._compactor.request, self._compactor.forget)
        self.monitor = StepMonitor()
        self._turns = TimeShares(self.monitor)
        self.dispatcher = Dispatcher(
            settings,
            PartitionFactory(settings, chaos, self.event_bus),
            self.partitions,
            overview=self,
            hello_reply=partial(_hello_reply, settings, chaos, lambda: self.keeps),
            event_bus=self.event_bus,
            turns=self._turns,
            keeper=self._keeper,
            memory=MemoryBudget(lambda: settings.now.limits.memory_mib << 20, resident_bytes()),
        )
        self._shortage = Shortage(self.dispatcher.admission.tenants.suspect)
        self.started = trio.Event()
        self.ended = False
        """Whether it has drained: a signal that comes now is too late."""
        self._drain_requested = trio.Event()
        self._drain_timeout: float | None = None
        self._started_at = time.monotonic()
        self._scrapes: Callable[[], int | None] = lambda: None
        """How often the metrics were fetched; None if none are served."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until drained. Raises `ListenError` if a socket path cannot be used."""
        failure: ListenError | None = None
        async with trio.open_nursery() as turns:
            self.start_vital(turns, self._turns.run)
            try:
                with ExitStack() as monitoring:
                    await self._serve(task_status, monitoring)
            except ListenError as error:  # carried out of the nursery, which would wrap it in a group
                failure = error
            turns.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _serve(self, task_status: trio.TaskStatus[None], monitoring: ExitStack) -> None:
        """`monitoring` begins when a client may wait: at once if connections were kept, otherwise after the
        start."""
        config = self._settings.now
        is_successor = bool(self._passed.kept)
        with (
            _telling_not_logged(self.dispatcher),
            listen_unix(
                config.socket,
                config.socket_mode,
                self._passed.vmm,
                group=config.socket_group,
                kept=self._passed.own_vmm,
            ) as vmm_socket,
            listen_unix(
                config.operator_path,
                OPERATOR_SOCKET_MODE,
                self._passed.operator,
                kept=self._passed.own_operator,
            ) as operator_socket,
            _metrics_listening(config) as metrics,
        ):
            async with trio.open_nursery() as connections:
                self.start_vital(connections, self.dispatcher.watch.run)
                self.start_vital(connections, self.dispatcher.restores.run)
                self.start_vital(connections, self._compactor.run)
                if is_successor:
                    monitoring.enter_context(self.monitor.installed())
                await self._go_on(vmm_socket, operator_socket, connections)
                async with trio.open_nursery() as listeners:
                    for endpoint, listener in (
                        (Endpoint.VMM, vmm_socket),
                        (Endpoint.OPERATOR, operator_socket),
                    ):
                        serve = partial(self.dispatcher.serve, endpoint)
                        self.start_vital(
                            listeners, accept_forever, listener, serve, connections, self._shortage
                        )
                    log.info(
                        "daemon_started",
                        socket=_place(self._passed.vmm, config.socket),
                        operator_socket=_place(self._passed.operator, config.operator_path),
                    )
                    if metrics is not None:  # until the very end, so that a drain can be watched
                        # Loaded here: it brings HTTP and Prometheus, a fifth of the time to start.
                        from interceptd.metrics.endpoint import MetricsEndpoint  # noqa: PLC0415

                        metrics_endpoint = MetricsEndpoint(
                            self.partitions, self.dispatcher, self._manager, self.monitor, self._shortage
                        )
                        self._scrapes = lambda: metrics_endpoint.scrapes
                        self.start_vital(connections, metrics_endpoint.run, *metrics)
                    task_status.started()
                    await self._manager.ready(self.status())
                    self.started.set()
                    if not is_successor:
                        monitoring.enter_context(self.monitor.installed())
                    self.start_vital(connections, self._manager.feed_watchdog, self.status)
                    await self._drain_requested.wait()
                    listeners.cancel_scope.cancel()
                self._stop_listening(vmm_socket, operator_socket)
                await self._manager.stopping(self.status(), self._drain_seconds + END_SECONDS)
                await self._end_partitions()
                with trio.move_on_after(LAST_EVENTS_SECONDS):
                    await self.event_bus.wait_drained()
                connections.cancel_scope.cancel()
            if (store := self._keeper.store) is not None:
                for name in (OWN_VMM, OWN_OPERATOR, LAST_ID):
                    store.remove(name)
        self.ended = True
        log.info("daemon_ended")

    async def _go_on(
        self, vmm_socket: socket.socket, operator_socket: socket.socket, connections: trio.Nursery
    ) -> None:
        """Have the listeners kept, and bring back what a predecessor left, before new clients can connect."""
        store, passed = self._keeper.store, self._passed
        if store is None:
            return
        own = {OWN_VMM: passed.own_vmm, OWN_OPERATOR: passed.own_operator}
        own_names = [name for name, listener in own.items() if listener is not None]
        store.adopt([*(kept.name for kept in passed.kept), *own_names, *passed.unused])
        for name in passed.unused:
            store.remove(name)
        last_id = next((kept.descriptor for kept in passed.kept if kept.name == LAST_ID), None)
        try:
            self.partitions.created = await self._keeper.keep_last_id(last_id)
            for name, listener, given in (
                (OWN_VMM, vmm_socket, passed.vmm),
                (OWN_OPERATOR, operator_socket, passed.operator),
            ):
                if given is None and own[name] is not listener:
                    store.remove(name)  # the old listener was bound elsewhere
                    await store.store(name, [listener.fileno()], poll=False)
        except (StoreRefused, OSError) as error:
            log.warning("nothing_kept", error=sentence(error))
        recovery = Recovery(self.dispatcher, self.partitions, self._keeper)
        recovery.start(passed.kept, connections)
        async with trio.open_nursery() as starting:
            starting.start_soon(self._manager.keep_starting, self.status)
            await recovery.wait_found()
            starting.cancel_scope.cancel()
        if passed.kept:
            log.info("daemon_restarted", partitions=len(self.partitions))
            self.event_bus.publish(
                DaemonRestarted(partitions=len(self.partitions), connections=recovery.connections)
            )

    def start_vital(
        self, nursery: trio.Nursery, task: Callable[..., Awaitable[object]], *args: object
    ) -> None:
        """Start a task without which the daemon is of no use."""
        nursery.start_soon(vital, lambda: self.keeps, task, *args, name=task)

    @property
    def keeps(self) -> bool:
        """Whether what is connected outlives this daemon."""
        return self._keeper.works

    def rest(self) -> NoReturn:
        """End the process without ending partitions: the service manager starts a successor, which goes
        on."""
        log.info("daemon_rests", partitions=len(self.partitions))
        self._keeper.rest()
        leave(EX_TEMPFAIL)

    def _stop_listening(self, vmm_socket: socket.socket, operator_socket: socket.socket) -> None:
        """A client that connects now is refused, and need not wait for the end; unless a service manager
        listens too. A thread closes the listeners: that closes the descriptors of what nobody accepted."""
        listeners = {vmm_socket: self._passed.vmm, operator_socket: self._passed.operator}
        for listener, passed in listeners.items():
            if passed is None:
                listener.shutdown(socket.SHUT_RDWR)
        closer = self.dispatcher.admission.tenants.of(os.geteuid()).closer
        closer.close([listener.detach() for listener in listeners])

    def drain(self, timeout: float | None = None) -> None:
        """End gracefully: answer what is in flight, unmap, close; cut off after `timeout` seconds."""
        if not self._drain_requested.is_set():
            self._drain_timeout = timeout
            log.info("drain_started", timeout_s=self._drain_seconds, partitions=len(self.partitions))
            self.event_bus.publish(
                DrainStarted(timeout_ms=round(self._drain_seconds * 1000), partitions=len(self.partitions))
            )
            self.partitions.closed = True
            self._drain_requested.set()

    async def restart(self) -> None:
        """Check that a successor could go on; then the caller may `rest`. Raises `WireError` if it could
        not."""
        self._require_restartable()
        await require_successor(self._check_successor)
        self._require_restartable()  # it may have changed meanwhile

    def _require_restartable(self) -> None:
        if not self.keeps:
            raise WireError(errno.EOPNOTSUPP, "nothing would start the daemon again and keep its partitions")
        if self.draining:
            raise WireError(errno.ESHUTDOWN, "the daemon is draining")

    @property
    def draining(self) -> bool:
        return self._drain_requested.is_set()

    @property
    def _drain_seconds(self) -> float:
        configured = self._settings.now.timeouts.drain_ms / 1000
        return configured if self._drain_timeout is None else self._drain_timeout

    def waiting_restores(self) -> Iterator[messages.PartitionSummary]:
        return self.dispatcher.restores.waiting()

    async def daemon_statistics(self) -> messages.DaemonStatistics:
        """Lets others run while it adds up many partitions."""
        totals = await self.partitions.totals()
        partitions = list(self.partitions)
        vps = sum(len(partition.vps) for partition in partitions)
        admission = self.dispatcher.admission
        return messages.DaemonStatistics(
            uptime_ms=int((time.monotonic() - self._started_at) * 1000),
            partitions=len(partitions),
            vps=vps,
            connections=admission.connections,
            connections_without_hello=admission.without_hello,
            tasks=trio.lowlevel.current_statistics().tasks_living,
            partitions_created=self.partitions.created,
            partitions_lost=self.partitions.lost,
            connections_refused=admission.refusals.total(),
            intercepts=by_outcome(totals.answers),
            invalidations=totals.invalidations.total(),
            latency=totals.intercepts.all.buckets,
            latency_waited=totals.intercepts.waited.buckets,
            scrapes=self._scrapes(),
        )

    def status(self) -> str:
        """One line for the service manager to show."""
        vps = sum(len(partition.vps) for partition in self.partitions)
        doing = "draining" if self.draining else "serving"
        return f"{doing} {_counted(len(self.partitions), 'partition')}, {_counted(vps, 'VP')}"

    async def _end_partitions(self) -> None:
        with trio.move_on_after(self._drain_seconds) as scope:
            self.dispatcher.restores.drain()
            for partition in self.partitions:
                partition.end()
            await self.partitions.wait_empty()
        if scope.cancelled_caught:
            log.warning("drain_cut_short", partitions=len(self.partitions))


@contextmanager
def _metrics_listening(config: Config) -> Iterator[tuple[socket.socket, ListenAddress] | None]:
    """The metrics listener and its address, if one is configured."""
    place = config.metrics.listen
    if place is None:
        yield None
        return
    with place.listen(config.metrics.socket_mode) as listener:
        yield listener, place.bound(listener)


@contextmanager
def _telling_not_logged(dispatcher: Dispatcher) -> Iterator[None]:
    """In the end, say how many lines were not logged."""
    try:
        yield
    finally:
        dispatcher.admission.tenants.tell_not_logged()


def _place(passed: socket.socket | None, path: str) -> object:
    """The address of a listener."""
    return path if passed is None else passed.getsockname()


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _hello_reply(settings: Settings, chaos: int, keeping: Callable[[], bool]) -> messages.HelloReply:
    config = settings.now
    limits = config.limits.stated() | {
        "hello_timeout_ms": config.timeouts.hello_ms,
        "invalidate_timeout_ms": config.timeouts.invalidate_ms,
        "hypervisor_timeout_ms": config.timeouts.hypervisor_ms,
    }
    features: dict[str, object] = {
        "address_spaces": [kind.value for kind in ADDRESS_SPACES],
        "hypervisors": [kind.value for kind in HYPERVISORS],
        "architectures": [architecture.value for architecture in Architecture],
        "kept": keeping(),
    }
    if chaos:
        features["chaos"] = chaos
    return messages.HelloReply(
        protocol=PROTOCOL_VERSION, server="interceptd", version=__version__, limits=limits, features=features
    )
