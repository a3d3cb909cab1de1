"""Something that may block, in a thread, so that a test that waits for it in vain fails and does not hang.

Owns the thread. It is left behind if what it does never ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from fakes.eventually import PATIENCE


class Doing:
    """Something that may block, done in a thread."""

    def __init__(self, do: Callable[[], object]) -> None:
        self._failure: BaseException | None = None

        def run() -> None:
            try:
                do()
            except BaseException as error:
                self._failure = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until it is over; raises what it raised."""
        self._thread.join(PATIENCE)
        assert self.is_over, "it still waits"
        if self._failure is not None:
            raise self._failure
