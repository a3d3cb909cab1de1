"""The environment of a private daemon.

Owns which variables such a daemon does not inherit; must not know how it is started.
"""

from __future__ import annotations

import os
from typing import Final

_STEERING: Final = ("INTERCEPT", "NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_")
"""Prefixes of variables that would configure it, or that a service manager set for us (sd_notify(3),
sd_listen_fds(3))."""


def private_environment() -> dict[str, str]:
    """Our environment without the variables meant for another daemon, its operator, or this process alone."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_STEERING)}
