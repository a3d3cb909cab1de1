"""SIGHUP: the configuration is read again.

Owns the order: told, read, exchanged, logged, told. A configuration that cannot be used changes nothing. Must
not know any key.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from interceptd.config.live import Settings
from interceptd.config.schema import Config
from interceptd.config.sources import ConfigError
from interceptd.logs import configure_logs
from interceptd.systemd.notify import ServiceManager

log = structlog.get_logger()


class Reloader:
    """`load` reads the configuration anew; it blocks, and raises `ConfigError`."""

    def __init__(self, settings: Settings, load: Callable[[], Config], manager: ServiceManager) -> None:
        self._settings = settings
        self._load = load
        self._manager = manager

    async def reload(self, status: Callable[[], str]) -> None:
        """Take over what may change live; whatever comes of it, the service manager hears that it is over."""
        await self._manager.reloading()
        try:
            wanted = await trio.to_thread.run_sync(self._load)  # the file's disk may be slow
        except (ConfigError, RuntimeError) as error:  # or the system refuses a thread
            log.error("configuration_not_reloaded", error=str(error))  # noqa: TRY400 - the file's fault
        else:
            self._take_over(wanted)
        await self._manager.ready(status())

    def _take_over(self, wanted: Config) -> None:
        exchange = self._settings.exchange(wanted)
        configure_logs(self._settings.now.log)
        log.info("configuration_reloaded", changed=exchange.changed, needs_restart=exchange.needs_restart)
