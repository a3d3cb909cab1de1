"""An instruction that could not be fetched: KVM says "emulation failed" and leaves the program counter.

Owns telling that from an instruction that KVM does not know, and from a memslot that was just being replaced;
must not know how instructions look.
"""

from __future__ import annotations

from typing import Final, Protocol

from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.outcomes import Access, Outcome

from .asking import Asker
from .exits import HostFault
from .guest_memory import GuestMemory
from .registers import Register
from .stop import Stop, StopReason, VcpuStopped

LONGEST_INSTRUCTION: Final = 15
"""Bytes, on x86: an instruction may lie on two pages."""


class FetchingVcpu(Protocol):
    @property
    def registers(self) -> tuple[int, ...]: ...

    def instruction_gpa(self, offset: int = 0, registers: tuple[int, ...] | None = None) -> int | None: ...


class FetchFault:
    """Of one vCPU. Each method returns when the guest should be run again, or raises `VcpuStopped`."""

    def __init__(self, vcpu: FetchingVcpu, memory: GuestMemory, asker: Asker) -> None:
        self._vcpu = vcpu
        self._memory = memory
        self._asker = asker
        self._tried: tuple[int, int] | None = None

    def fetch(self, otherwise: StopReason) -> None:
        """Have the pages of the instruction mapped for execution. `otherwise` is the reason to stop when they
        are, and were at the last try: it is not the fetch that failed."""
        rip = self._vcpu.registers[Register.RIP]
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
            raise VcpuStopped(Stop(otherwise, first))
        self._ask(last >> PAGE_SHIFT << PAGE_SHIFT, rip)

    def fault(self, exit_: HostFault) -> None:
        """What stands behind a memslot is gone, unannounced; the kind of access is not known."""
        gpa = exit_.gpa
        if gpa is None:
            self.fetch(StopReason.HOST_FAULT)
            return
        answer = self._asker.ask(gpa, Access.READ, self._vcpu.registers[Register.RIP])
        if answer.outcome is Outcome.FORWARD and self._memory.reaches(gpa >> PAGE_SHIFT, Access.READ):
            raise VcpuStopped(Stop(StopReason.HOST_FAULT, gpa, answer))

    def _ask(self, gpa: int, rip: int) -> None:
        answer = self._asker.ask(gpa, Access.EXECUTE, rip)
        if answer.outcome is Outcome.FORWARD:
            raise VcpuStopped(Stop(StopReason.NOT_EXECUTABLE, gpa, answer))

    def _is_executable(self, gpa: int) -> bool:
        return self._memory.reaches(gpa >> PAGE_SHIFT, Access.EXECUTE)
