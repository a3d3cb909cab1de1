"""Notifications to a service manager: sd_notify(3), without libsystemd.

Owns $NOTIFY_SOCKET and $WATCHDOG_USEC. Must not know the daemon, which passes in every status. A manager that
cannot be reached is logged once; the daemon goes on.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn

import structlog
import trio

from intercept_protocol.text import sentence

log = structlog.get_logger()
SEND_SECONDS: Final = 1.0
"""How long a manager may take to make room for a datagram."""
EXTEND_SECONDS: Final = 6.0
LEDGER_FORMAT_FACT: Final = "X_INTERCEPTD_LEDGER_FORMAT"
"""Sent with READY. Before a restart `interceptd keep` asks the installed version whether it reads this
format."""


def manager_address(environment: Mapping[str, str]) -> str | None:
    """The address in $NOTIFY_SOCKET; None without one, or if it is invalid."""
    name = environment.get("NOTIFY_SOCKET", "")
    address = f"\0{name[1:]}" if name.startswith("@") else name  # @: in the abstract namespace, unix(7)
    return address if address.startswith(("/", "\0")) else None


class ServiceManager:
    """Without an `address` there is no manager, and nothing is sent. `watchdog` is its period in seconds,
    None without a watchdog; `facts` are further assignments that READY sends."""

    def __init__(
        self, address: str | None = None, watchdog: float | None = None, facts: Sequence[str] = ()
    ) -> None:
        self._address = address
        self._facts = facts
        self.watchdog = watchdog
        self.watchdog_notifications = 0
        self._reachable = True

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], pid: int, facts: Sequence[str] = ()
    ) -> ServiceManager:
        """Follows sd_notify(3) and sd_watchdog_enabled(3); an invalid address is ignored."""
        period = environment.get("WATCHDOG_USEC", "")
        is_ours = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        watched = is_ours and period.isdecimal() and int(period) > 0
        return cls(manager_address(environment), int(period) / 1e6 if watched else None, facts)

    async def ready(self, status: str) -> None:
        await self._send("READY=1", *self._facts, f"STATUS={status}")

    async def reloading(self) -> None:
        """A reload has begun; `ready` ends it."""
        await self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    async def stopping(self, status: str, seconds: float) -> None:
        """The daemon is ending, which may take `seconds`: extends the manager's timeout."""
        await self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}", f"STATUS={status}")

    async def keep_starting(self, status: Callable[[], str]) -> NoReturn:
        """Extend the manager's start timeout until cancelled."""
        while True:
            await self._send(f"EXTEND_TIMEOUT_USEC={int(EXTEND_SECONDS * 1e6)}", f"STATUS={status()}")
            await trio.sleep(EXTEND_SECONDS / 3)

    async def feed_watchdog(self, status: Callable[[], str]) -> None:
        """Report a live event loop twice per period; returns at once without a watchdog."""
        while self.watchdog is not None:
            await self._send("WATCHDOG=1", f"STATUS={status()}")
            self.watchdog_notifications += 1
            await trio.sleep(self.watchdog / 2)

    async def _send(self, *assignments: str) -> None:
        """Send one datagram on a new socket: the manager's may have been replaced since the last one."""
        if self._address is None:
            return
        try:
            with trio.fail_after(SEND_SECONDS), trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                await sock.connect(self._address)
                await sock.send("\n".join(assignments).encode())
        except (OSError, trio.TooSlowError) as error:
            if self._reachable:
                why = os.strerror(errno.EAGAIN) if isinstance(error, trio.TooSlowError) else sentence(error)
                log.warning("service_manager_not_told", error=why, facts=assignments)
            self._reachable = False
