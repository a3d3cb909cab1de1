"""One vCPU: running it, answering its exits, reading its registers, and getting it back.

Owns the descriptor, the kvm_run page and the kick; must not know what an exit means for the guest. Only the
thread that runs it may use it, except for `kick`.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from . import _ioctls as ioctls
from ._binary_stats import BinaryStats
from ._exits import MMIO_DATA_AT, Exit, Interrupted, PortRead, read_exit, read_host_fault
from ._registers import Register, StartState, code_base, make_flat

KICK_SIGNAL: Final = signal.SIGRTMIN
"""Blocked in the thread of the vCPU and let through by KVM_RUN alone, so it needs no handler: a program that
embeds this keeps its own."""
_IMMEDIATE_EXIT_AT: Final = 1
"""kvm_run.immediate_exit: closes the window between the last look at a flag and KVM_RUN."""


class Vcpu:
    def __init__(self, descriptor: int, run_size: int, index: int) -> None:
        self.index = index
        self._descriptor = descriptor
        self._run = mmap.mmap(descriptor, run_size)
        self._lock = threading.Lock()
        self._thread: int | None = None  # the one to signal
        self._signalled = False

    def close(self) -> None:
        """May be repeated; not while the vCPU runs."""
        if self._descriptor >= 0:
            self._run.close()
            os.close(self._descriptor)
            self._descriptor = -1

    def start_at(self, state: StartState) -> None:
        """Put a fresh vCPU into flat 32-bit mode at the program's entry."""
        special = ioctls.get_special_registers(self._descriptor)
        make_flat(special)
        ioctls.set_special_registers(self._descriptor, special)
        self.registers = state.general()

    @property
    def registers(self) -> tuple[int, ...]:
        """As `Register` numbers them."""
        return ioctls.get_registers(self._descriptor)

    @registers.setter
    def registers(self, values: tuple[int, ...]) -> None:
        ioctls.set_registers(self._descriptor, values)

    @contextmanager
    def on_this_thread(self) -> Iterator[None]:
        """Within the block the calling thread runs the vCPU, and a kick reaches it."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        ioctls.set_signal_mask(self._descriptor, {int(number) for number in before} - {int(KICK_SIGNAL)})
        with self._lock:
            self._thread = threading.get_ident()
        try:
            yield
        finally:
            with self._lock:
                self._thread = None
                self._signalled = False
            _forget_kicks()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> Exit:
        """Enter the guest, completing what its last exit was answered with, until the next exit."""
        try:
            ioctls.run(self._descriptor)
        except InterruptedError:
            with self._lock:
                self._run[_IMMEDIATE_EXIT_AT] = 0
                self._signalled = False
            _forget_kicks()
            return Interrupted()
        except OSError as error:
            if error.errno == errno.EFAULT:
                return read_host_fault(self._run)
            raise
        return read_exit(self._run)

    def finish(self) -> Exit:
        """Complete the instruction of the last exit without running the next one.

        Returns `Interrupted` when the instruction is complete, otherwise its next exit.
        """
        self._run[_IMMEDIATE_EXIT_AT] = 1
        return self.run()

    def kick(self) -> None:
        """Make the current or the next `run` return `Interrupted`. May be called by any thread."""
        with self._lock:
            if self._descriptor < 0:
                return
            self._run[_IMMEDIATE_EXIT_AT] = 1
            if self._thread is not None and not self._signalled:  # real-time signals queue: one is enough
                self._signalled = True
                signal.pthread_kill(self._thread, KICK_SIGNAL)

    def finish_read(self, data: bytes) -> None:
        """What the guest's `MmioRead` finds; taken at the next `run`."""
        self._run[MMIO_DATA_AT : MMIO_DATA_AT + len(data)] = data

    def finish_port_read(self, request: PortRead, data: bytes) -> None:
        """What the guest's `PortRead` finds; `size * count` bytes."""
        self._run[request.data_at : request.data_at + len(data)] = data

    def instruction_gpa(self, offset: int = 0, registers: tuple[int, ...] | None = None) -> int | None:
        """The gpa of the byte at the program counter plus `offset`; None where the guest's page tables have
        nothing there."""
        rip = (registers or self.registers)[Register.RIP]
        linear = code_base(ioctls.get_special_registers(self._descriptor)) + rip + offset
        return ioctls.translate(self._descriptor, linear & 0xFFFF_FFFF_FFFF_FFFF)

    def statistics(self) -> BinaryStats:
        """KVM's own counters of this vCPU, `mmio_exits` among them; the caller closes them."""
        return BinaryStats(ioctls.stats_descriptor(self._descriptor))


def _forget_kicks() -> None:
    """Consume every kick that is pending for the calling thread: real-time signals queue, and each would kill
    the process once unblocked."""
    while signal.sigtimedwait({KICK_SIGNAL}, 0) is not None:
        pass
