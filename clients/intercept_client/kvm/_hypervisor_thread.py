"""The thread that lets the daemon change this VMM's memslots.

Owns the thread of a hypervisor connection, and reporting its end; must not know what is mapped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from intercept_client._blocking_hypervisor import BlockingHypervisor

CLOSE_SECONDS: Final = 10.0


class HypervisorThread:
    """Serves from now on. `on_end` is called once, in the thread, with why no request will come."""

    def __init__(self, hypervisor: BlockingHypervisor, on_end: Callable[[str], None]) -> None:
        self._hypervisor = hypervisor
        self._on_end = on_end
        self._thread = threading.Thread(target=self._serve, name="hypervisor connection", daemon=True)
        self._thread.start()

    def wait_ended(self, seconds: float = CLOSE_SECONDS) -> None:
        """Block until the daemon has closed the connection, as it does when the partition has ended, or until
        `seconds` have passed."""
        self._thread.join(seconds)

    def close(self) -> None:
        """Close the connection; while the partition lives, the partition is lost. May be repeated, also by
        the thread itself."""
        self._hypervisor.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS)

    def _serve(self) -> None:
        why = "the hypervisor connection failed"
        try:
            why = self._hypervisor.serve()
        except OSError as error:  # memslots that KVM did not take back: see `GuestMemory`
            why = str(error)
        finally:
            self._on_end(why)
