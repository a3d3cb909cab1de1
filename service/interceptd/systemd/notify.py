"""What a service manager is told of us: sd_notify(3), without its library.

Owns $NOTIFY_SOCKET and $WATCHDOG_USEC. Must not know the daemon: it is told what to say. A manager
that cannot be told is logged once and is no reason to stop.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Final

import structlog
import trio

from intercept_protocol.text import sentence

log = structlog.get_logger()
PATIENCE: Final = 1.0
"""Seconds that a manager may take to make room for a datagram."""


class ServiceManager:
    """Nobody, if there is no `address`; `watchdog` is in seconds, None: the manager does not watch."""

    def __init__(self, address: str | None = None, watchdog: float | None = None) -> None:
        self._address = address
        self.watchdog = watchdog
        self.watchdog_notifications = 0
        self._reachable = True

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], pid: int) -> ServiceManager:
        """As sd_notify(3) and sd_watchdog_enabled(3) have it; an address of another form is nobody's."""
        name = environment.get("NOTIFY_SOCKET", "")
        address = f"\0{name[1:]}" if name.startswith("@") else name  # @: in the abstract namespace, unix(7)
        period = environment.get("WATCHDOG_USEC", "")
        meant = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        watched = meant and period.isdecimal() and int(period) > 0
        return cls(
            address if address.startswith(("/", "\0")) else None, int(period) / 1e6 if watched else None
        )

    async def ready(self, status: str) -> None:
        await self._tell("READY=1", f"STATUS={status}")

    async def reloading(self) -> None:
        """The configuration is being read again; `ready` says that this is over."""
        await self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    async def stopping(self, status: str, seconds: float) -> None:
        """The end has begun, and may take `seconds`: more than the manager allows by itself."""
        await self._tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}", f"STATUS={status}")

    async def feed_watchdog(self, status: Callable[[], str]) -> None:
        """Say at half of the period that the event loop turns; returns at once where nobody watches."""
        while self.watchdog is not None:
            await self._tell("WATCHDOG=1", f"STATUS={status()}")
            self.watchdog_notifications += 1
            await trio.sleep(self.watchdog / 2)

    async def _tell(self, *facts: str) -> None:
        """One datagram on a socket of its own: the manager's may have been replaced since the last one."""
        if self._address is None:
            return
        try:
            with trio.fail_after(PATIENCE), trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                await sock.connect(self._address)
                await sock.send("\n".join(facts).encode())
        except (OSError, trio.TooSlowError) as error:
            if self._reachable:
                why = os.strerror(errno.EAGAIN) if isinstance(error, trio.TooSlowError) else sentence(error)
                log.warning("service_manager_not_told", error=why, facts=facts)
            self._reachable = False
