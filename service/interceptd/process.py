"""The process around the daemon: signals, reading the configuration again on SIGHUP, the garbage collector.

Owns what each signal does, the exit status after one, and the order of a reload. A configuration that cannot
be used changes nothing. Must not know sockets, partitions or any configuration key.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import structlog
import trio

from interceptd.collector import collect_while_few
from interceptd.config.live import Settings
from interceptd.config.schema import Config
from interceptd.config.sources import ConfigError
from interceptd.connections.unix_listener import ListenError
from interceptd.daemon import Daemon
from interceptd.logs.configure import configure_logs
from interceptd.systemd.notify import ServiceManager

log = structlog.get_logger()

END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
RELOAD_SIGNAL = signal.SIGHUP
SIGNALS = (*END_SIGNALS, RELOAD_SIGNAL)
"""Every signal that the process handles."""


class Reloader:
    """Replaces the configuration in force. `load` reads it again; it blocks, and raises `ConfigError`."""

    def __init__(self, settings: Settings, load: Callable[[], Config], manager: ServiceManager) -> None:
        self._settings = settings
        self._load = load
        self._manager = manager

    async def reload(self, status: Callable[[], str]) -> None:
        """Apply the keys that can change while the daemon runs.

        Notifies the service manager when the reload starts and when it ends, even if it fails.
        """
        await self._manager.reloading()
        try:
            wanted = await trio.to_thread.run_sync(self._load, abandon_on_cancel=True)  # its disk may be slow
        except (ConfigError, RuntimeError) as error:  # RuntimeError: the system refuses a thread
            log.error("configuration_not_reloaded", error=str(error))  # noqa: TRY400 - the file's fault
        else:
            self._apply(wanted)
        await self._manager.ready(status())

    def _apply(self, wanted: Config) -> None:
        exchange = self._settings.exchange(wanted)
        configure_logs(self._settings.now.log)
        log.info("configuration_reloaded", changed=exchange.changed, needs_restart=exchange.needs_restart)
        tell_if_closed(self._settings.now)


def tell_if_closed(config: Config) -> None:
    """Log that nobody may connect, if it is so: then nobody can be told over the wire."""
    if not config.uids and not config.allowed_gids:
        log.warning("nobody_may_connect", error="allowed_uids and allowed_gids are empty")


async def run_until_signalled(daemon: Daemon, reloader: Reloader) -> int:
    """Run the daemon until it is drained. SIGTERM and SIGINT drain it, a second one ends it at once; SIGHUP
    reloads the configuration.

    Returns the exit status: 0 after a drain, 128 + n when signal n ended it. Raises `ListenError`. Block and
    ignore `SIGNALS` before the call: then an early signal is kept, and a late one does not kill the process.
    """
    status = 0
    failure: ListenError | None = None

    async def end(scope: trio.CancelScope) -> None:
        nonlocal status
        with trio.open_signal_receiver(*END_SIGNALS) as signals, _unblocked(END_SIGNALS):
            async for number in signals:
                if daemon.ended:
                    continue
                if daemon.draining:
                    log.warning("daemon_ended_at_once", signal=signal.Signals(number).name)
                    status = 128 + number
                    scope.cancel()
                elif number == signal.SIGTERM and daemon.keeps:
                    daemon.rest()
                else:
                    daemon.drain()

    async def reload() -> None:
        await daemon.started.wait()  # the service manager expects READY before RELOADING
        with trio.open_signal_receiver(RELOAD_SIGNAL) as signals, _unblocked((RELOAD_SIGNAL,)):
            async for _ in signals:
                if daemon.draining:
                    log.warning("configuration_not_reloaded", error="the daemon is draining")
                else:
                    await reloader.reload(daemon.status)

    async with trio.open_nursery() as nursery:
        daemon.start_vital(nursery, end, nursery.cancel_scope)
        daemon.start_vital(nursery, reload)
        daemon.start_vital(
            nursery, collect_while_few, lambda: daemon.dispatcher.admission.tenants.kept_objects
        )
        try:
            await daemon.run()
        except ListenError as error:  # carried out of the nursery, which would wrap it in a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return status


@contextmanager
def _unblocked(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Unblock `signals` within the context; on exit, block again those that were blocked before."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, before & set(signals))
