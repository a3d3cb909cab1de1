"""Keeps every vCPU out of the guest while memslots are taken away or replaced.

KVM changes one slot at a time, and a vCPU in the middle of an instruction sees the steps: the half of a slot
that is to stay exits as MMIO, and a locked instruction reads through a slot and writes into none. So code
that removes slots closes the gate first, which kicks the vCPUs that are in the guest. Adding slots needs no
gate.

Owns which vCPUs are in the guest. Must not know memslots. A vCPU whose exit is being answered is outside: one
that waits for the daemon is not waited for. One that has KVM walk the guest's page tables, which lie in
memslots too, is inside.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Kickable(Protocol):
    def kick(self) -> None:
        """Make the vCPU leave the guest soon, even if it is only about to enter."""


class RunGate:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: set[Kickable] = set()
        self._closers = 0

    def enter(self, vcpu: Kickable) -> None:
        """Call it before entering the guest; blocks while the gate is closed."""
        with self._changed:
            while self._closers:
                self._changed.wait()
            self._inside.add(vcpu)

    def leave(self, vcpu: Kickable) -> None:
        """Call it after leaving the guest, for whatever reason."""
        with self._changed:
            self._inside.discard(vcpu)
            if self._closers:
                self._changed.notify_all()

    @contextmanager
    def inside(self, vcpu: Kickable) -> Iterator[None]:
        """`enter` and `leave` around the block, which must take no lock of the memory."""
        self.enter(vcpu)
        try:
            yield
        finally:
            self.leave(vcpu)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Within the block no vCPU is in the guest. A thread that runs one must not call it meanwhile."""
        with self._changed:
            self._closers += 1
            for vcpu in self._inside:
                vcpu.kick()
        try:
            with self._changed:
                while self._inside:
                    self._changed.wait()
            yield
        finally:
            with self._changed:
                self._closers -= 1
                self._changed.notify_all()
