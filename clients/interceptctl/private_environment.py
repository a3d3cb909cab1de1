"""The environment of a daemon that a program starts for itself.

Owns which variables such a daemon does not inherit; must not know how it is started.
"""

from __future__ import annotations

import os
from typing import Final

_STEERING: Final = ("INTERCEPT", "NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_")
"""How the variables begin that would configure it, or that a service manager meant for us (sd_notify(3),
sd_listen_fds(3))."""


def private_environment() -> dict[str, str]:
    """Ours without what is meant for another daemon, for its operator, or for this process alone."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_STEERING)}
