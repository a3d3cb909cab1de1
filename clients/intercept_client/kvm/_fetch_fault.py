"""An instruction that could not be fetched: KVM says "emulation failed" and leaves the program counter.

Owns distinguishing that from an instruction that KVM does not know, from a memslot that was being replaced,
and from memory that faults; must not know instruction formats.
"""

from __future__ import annotations

from typing import Final, Protocol

from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.outcomes import Access, Outcome

from ._exits import HostFault
from ._guest_memory import GuestMemory
from ._intercepts import InterceptLoop
from ._locked import CodeReader
from ._registers import Register
from ._run_gate import Kickable
from ._stop import Stop, StopReason, VcpuStopped

LONGEST_INSTRUCTION: Final = 15
"""Bytes, on x86: an instruction may lie on two pages."""


class FetchingVcpu(Kickable, Protocol):
    @property
    def registers(self) -> tuple[int, ...]: ...

    def instruction_gpa(self, offset: int = 0, registers: tuple[int, ...] | None = None) -> int | None: ...


class FetchFault:
    """One vCPU's failed fetches. Each method returns to run the guest again, or raises `VcpuStopped`."""

    def __init__(
        self, vcpu: FetchingVcpu, memory: GuestMemory, intercepts: InterceptLoop, code: CodeReader
    ) -> None:
        self._vcpu = vcpu
        self._memory = memory
        self._intercepts = intercepts
        self._code = code
        self._tried: tuple[int, int] | None = None

    def fetch(self, otherwise: StopReason) -> None:
        """Have the pages of the instruction mapped for execution.

        `otherwise` is the reason to stop if they are mapped, and were at the last try: then it was not the
        fetch that failed.
        """
        registers = self._vcpu.registers
        rip = registers[Register.RIP]
        with self._memory.gate.inside(self._vcpu):
            first, last = (self._vcpu.instruction_gpa(offset) for offset in (0, LONGEST_INSTRUCTION - 1))
        if first is None:
            raise VcpuStopped(Stop(otherwise, detail=f"rip {rip:#x} is not mapped by the guest"))
        if not self._is_executable(first):
            self._ask(first, rip)
            return
        tried = rip, self._memory.generation
        if tried != self._tried:
            self._tried = tried
            return
        if last is None or self._is_executable(last):
            code = self._code(registers)
            faults = not code or (last is not None and len(code) < LONGEST_INSTRUCTION)
            raise VcpuStopped(Stop(StopReason.HOST_FAULT if faults else otherwise, first))
        self._ask(last >> PAGE_SHIFT << PAGE_SHIFT, rip)

    def fault(self, exit_: HostFault) -> None:
        """The memory behind a memslot faults; the kind of access is not known."""
        gpa = exit_.gpa
        if gpa is None:
            self.fetch(StopReason.HOST_FAULT)
            return
        rip = self._vcpu.registers[Register.RIP]
        answer = self._intercepts.ask_about_fault(gpa, Access.READ, rip, "KVM_RUN: EFAULT")
        if answer.outcome is Outcome.FORWARD and self._memory.reaches(gpa >> PAGE_SHIFT, Access.READ):
            raise VcpuStopped(Stop(StopReason.HOST_FAULT, gpa, answer))

    def _ask(self, gpa: int, rip: int) -> None:
        answer = self._intercepts.ask(gpa, Access.EXECUTE, rip)
        if answer.outcome is Outcome.FORWARD:
            raise VcpuStopped(Stop(StopReason.NOT_EXECUTABLE, gpa, answer))

    def _is_executable(self, gpa: int) -> bool:
        return self._memory.reaches(gpa >> PAGE_SHIFT, Access.EXECUTE)
