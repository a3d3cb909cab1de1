"""A daemon with a trouble that no client can cause, or only some kernels do, for the alerts that tell of it.

Owns the troubles. The first argument names one, the rest go to `interceptd`.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Final

from interceptd.address_space.procmaps import ProcMaps
from interceptd.cli import main
from interceptd.mmu_notifier import MmuNotifier
from interceptd.partition.restored_guest import RestoredGuest

STEP_SECONDS: Final = 0.01


def long_steps() -> None:
    """Each announced invalidation computes for long."""
    invalidate = MmuNotifier.invalidate

    def compute(*arguments: object, **options: object) -> object:
        end = time.thread_time() + STEP_SECONDS
        while time.thread_time() < end:
            pass
        return invalidate(*arguments, **options)  # type: ignore[arg-type]

    MmuNotifier.invalidate = compute  # type: ignore[method-assign, assignment]


def held_mmap_locks() -> None:
    """From a SIGUSR1 on, the kernel answers no question about VMAs, as while a mmap lock is held."""

    def wait(*_: object) -> None:
        threading.Event().wait()

    def hold(*_: object) -> None:
        ProcMaps.vma_at = wait  # type: ignore[method-assign, assignment]

    signal.signal(signal.SIGUSR1, hold)


def failing_restores() -> None:
    """What serves a restored guest fails, with its VMM's memory handed over."""

    async def fail(*_: object) -> None:
        raise RuntimeError("a fault of the daemon")

    RestoredGuest.wait_vmm_ended = fail  # type: ignore[method-assign, assignment]


TROUBLES: Final = {trouble.__name__: trouble for trouble in (long_steps, held_mmap_locks, failing_restores)}

if __name__ == "__main__":
    TROUBLES[sys.argv.pop(1)]()
    sys.exit(main())
