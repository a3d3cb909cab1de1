"""A vCPU's loop: run, handle the exit, run again.

Owns the order of one exit and the loop around it; accesses and failed fetches are handled elsewhere. Must not
know sockets or memslots.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from intercept_protocol.outcomes import Answer

from ._devices import Bus
from ._exits import (
    Broken,
    Exit,
    Halted,
    HostFault,
    Interrupted,
    MmioRead,
    MmioWrite,
    NotEmulated,
    PortRead,
    PortWrite,
    Shutdown,
)
from ._fetch_fault import FetchFault
from ._guest_access import GuestAccess
from ._intercepts import InterceptLoop
from ._locked import CodeReader, is_second_half
from ._registers import Register
from ._run_gate import RunGate
from ._stop import Stop, StopReason, VcpuStopped
from ._tally import VcpuTally


class RunningVcpu(Protocol):
    """What the loop needs of a vCPU; see `Vcpu`."""

    registers: tuple[int, ...]

    def run(self) -> Exit: ...

    def finish(self) -> Exit: ...

    def kick(self) -> None: ...

    def finish_read(self, data: bytes) -> None: ...

    def finish_port_read(self, request: PortRead, data: bytes) -> None: ...


class VcpuLoop:
    """One thread calls `run`; any thread may call `stop`."""

    def __init__(
        self,
        vcpu: RunningVcpu,
        *,
        intercepts: InterceptLoop,
        access: GuestAccess,
        fetch_fault: FetchFault,
        gate: RunGate,
        code: CodeReader,
        ports: Bus,
        tally: VcpuTally,
    ) -> None:
        self._vcpu = vcpu
        self._intercepts = intercepts
        self._access = access
        self._fetch_fault = fetch_fault
        self._gate = gate
        self._code = code
        self._ports = ports
        self._unanswered: Exit | None = None
        self._following: Exit | None = None  # the next exit of the instruction whose last one was answered
        self.tally: Final = tally

    def run(self) -> Stop:
        """Run until the guest halts or cannot go on, or until `stop`, which ends one run.

        May be called again, and goes on where it was: an exit that could not be answered is answered first.
        """
        stop = None
        while stop is None and not self._intercepts.stopping.is_set():
            exit_ = self._unanswered or self._enter(self._vcpu.run)
            self._unanswered = exit_
            try:
                stop = self._answer(exit_)
            except VcpuStopped as stopped:
                stop = stopped.stop
            else:
                self._unanswered = self._following
        stop = stop or Stop(StopReason.ASKED)
        if stop.reason is StopReason.ASKED:
            self._intercepts.stopping.clear()
        return stop

    def stop(self) -> None:
        """Make `run` return soon.

        If it waits for an intercept, the caller also has to kick the VP at the daemon.
        """
        self._intercepts.stopping.set()
        self._vcpu.kick()

    def _enter(self, run: Callable[[], Exit]) -> Exit:
        self._gate.enter(self._vcpu)
        try:
            return run()
        finally:
            self._gate.leave(self._vcpu)

    def _answer(self, exit_: Exit) -> Stop | None:
        self._following = None
        self.tally.exits[type(exit_).__name__] += 1
        began, mapped = time.perf_counter(), self.tally.intercepts[Answer.MAPPED]
        stop = self._dispatch(exit_)
        if self.tally.intercepts[Answer.MAPPED] != mapped:
            self.tally.first_touch(time.perf_counter() - began)
        return stop

    def _dispatch(self, exit_: Exit) -> Stop | None:
        match exit_:
            case MmioRead():
                self._read(exit_)
            case MmioWrite():
                self._write(exit_)
            case PortRead():
                self._read_port(exit_)
            case PortWrite(port, size, data):
                for start in range(0, len(data), size):
                    self._ports.write(port, data[start : start + size])
            case NotEmulated():
                self._fetch_fault.fetch(StopReason.NOT_EMULATED)
            case HostFault():
                self._fetch_fault.fault(exit_)
            case Halted():
                return Stop(StopReason.HALTED)
            case Shutdown():
                return Stop(StopReason.TRIPLE_FAULT)
            case Broken(why):
                return Stop(StopReason.BROKEN, detail=why)
            case Interrupted():
                pass
        return None

    def _read(self, exit_: MmioRead) -> None:
        """Answer a read; see `locked` for why the instruction is then finished before the guest goes on."""
        registers = self._vcpu.registers
        found = self._access.read(exit_.gpa, exit_.size, registers[Register.RIP])
        self._vcpu.finish_read(found.data)
        if not found.on_memory:
            return
        match self._enter(self._vcpu.finish):
            case Interrupted():
                pass
            case MmioWrite() as write if is_second_half(exit_, write, self._code(registers)):
                while not isinstance(self._enter(self._vcpu.finish), Interrupted):
                    pass  # its other fragments, dropped like the first
                self._vcpu.registers = registers
                self.tally.replayed += 1
            case following:
                self._following = following

    def _write(self, exit_: MmioWrite) -> None:
        self._access.write(exit_.gpa, exit_.data, self._vcpu.registers[Register.RIP])

    def _read_port(self, exit_: PortRead) -> None:
        data = b"".join(self._ports.read(exit_.port, exit_.size) for _ in range(exit_.count))
        self._vcpu.finish_port_read(exit_, data)
