"""A vCPU of a partition: KVM's vCPU and the daemon's VP, put together.

Owns the wiring of one vCPU's parts, its thread, and stopping it wherever it waits. Must not know what the
parts do.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from intercept_protocol.addresses import PAGE_SHIFT, PAGE_SIZE
from intercept_protocol.outcomes import Access

from ._copying import Copier, MemoryGone
from ._devices import Bus
from ._fetch_fault import LONGEST_INSTRUCTION, FetchFault
from ._guest_access import GuestAccess
from ._guest_memory import GuestMemory
from ._intercepts import Decider, InterceptLoop
from ._stop import Stop
from ._tally import VcpuTally
from ._vcpu import Vcpu
from ._vcpu_loop import VcpuLoop


class GuestVcpu:
    """One vCPU of a `GuestPartition`. Call `run` in a thread of its own, or `start`, which creates one."""

    def __init__(
        self,
        vcpu: Vcpu,
        decider: Decider,
        *,
        memory: GuestMemory,
        copier: Copier,
        devices: Bus,
        ports: Bus,
        on_lost: Callable[[str], None],
        kick: Callable[[int], None],
    ) -> None:
        """Use `GuestPartition.add_vcpu`. `kick` has the daemon answer what waits in the VP of that index."""
        self.vcpu = vcpu
        self.tally = VcpuTally()
        self._memory = memory
        self._copier = copier
        self._kick = kick
        intercepts = InterceptLoop(vcpu.index, decider, self.tally, on_lost)
        self._loop = VcpuLoop(
            vcpu,
            intercepts=intercepts,
            access=GuestAccess(memory, copier, devices, intercepts, self.tally),
            fetch_fault=FetchFault(vcpu, memory, intercepts, self._code),
            gate=memory.gate,
            code=self._code,
            ports=ports,
            tally=self.tally,
        )

    def run(self) -> Stop:
        """Run until the guest halts or cannot go on, or until `stop`; returns why.

        May be called again, and goes on where it was.
        """
        with self.vcpu.on_this_thread():
            return self._loop.run()

    def start(self) -> Future[Stop]:
        """Call `run` in a new thread, which ends with it."""
        thread = ThreadPoolExecutor(1, thread_name_prefix=f"vCPU {self.vcpu.index}")
        running = thread.submit(self.run)
        thread.shutdown(wait=False)
        return running

    def stop(self) -> None:
        """Make `run` return soon, from the guest or from an intercept that waits. Does not wait for it."""
        self._loop.stop()
        self._kick(self.vcpu.index)

    def _code(self, registers: tuple[int, ...]) -> bytes:
        """The bytes at the program counter, as far as the guest's memory has them."""
        code = b""
        while len(code) < LONGEST_INSTRUCTION:
            with self._memory.gate.inside(self.vcpu):
                gpa = self.vcpu.instruction_gpa(len(code), registers)
            claim = None if gpa is None else self._memory.claim(gpa >> PAGE_SHIFT, Access.READ)
            if gpa is None or claim is None:
                break
            try:
                code += self._copier.read(claim.uaddr + gpa % PAGE_SIZE, 1)
            except MemoryGone:
                break
            finally:
                self._memory.release(claim)
        return code
