"""A VMM's vCPU loop, wired to interceptd. Run it as `python vcpu_loop.py /tmp/interceptd/vmm.sock`.

`clients/VCPU_LOOP.md` explains it. A real VMM needs `run_vcpu`, `decide` and `stop`; `FakeVcpu` stands for
its hypervisor: it plays a script of memory accesses, each of which exits.
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

from intercept_client import (
    Access,
    AddressSpaceKind,
    Answer,
    AnyAnswer,
    BlockingNotifier,
    BlockingVmm,
    BlockingVp,
    ConnectionLost,
    GfnRange,
    HypervisorKind,
    LaterAnswer,
    Outcome,
    ProtocolViolation,
    UaddrRange,
    WireError,
    build_memory_intercept,
)

RAM = GfnRange.of(0x100, 16)
BEHIND_RAM = UaddrRange.of_pages(0x7000_0000, 16)
UART_GPA = 0x3F000
"""A device that the VMM emulates: no region covers it."""
RETRY_SECONDS = 0.01
"""Before asking again where the daemon may answer at once: it is draining, or has a reason unknown here."""


@dataclass(frozen=True)
class MemoryExit:
    """The vCPU has stopped at an instruction that accesses memory, and writes `data` if it is a write."""

    gpa: int
    access: Access
    data: bytes = b""


@dataclass
class FakeVcpu:
    """Plays `script`, then halts. If it is stuck, no instruction ever completes."""

    index: int
    script: list[MemoryExit]
    is_stuck: bool = False
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> MemoryExit | None:
        """Run the guest until its next exit; None when it has halted."""
        return self.script[0] if self.script else None

    def resume(self) -> None:
        """Run the instruction again: now it reaches its memory."""
        if not self.is_stuck:
            self.skip()

    def skip(self) -> None:
        """Go on behind the instruction, which was emulated."""
        del self.script[0]

    def kick(self) -> None:
        """Make `run` return, from any thread. A script returns by itself; KVM needs a signal here."""


@dataclass
class Uart:
    """A device of the VMM. vCPUs share it, so a real one needs a lock."""

    received: bytes = b""

    def emulate(self, exit_: MemoryExit) -> None:
        """Carry out the access for the guest."""
        self.received += exit_.data


def run_vcpu(vcpu: FakeVcpu, vp: BlockingVp, uart: Uart) -> str:
    """Run one vCPU, in a thread of its own; returns why it stopped."""
    while not vcpu.stopping.is_set():
        exit_ = vcpu.run()
        if exit_ is None:
            return "halted"
        try:
            answer = decide(vp, exit_, vcpu.stopping)
        except (ConnectionLost, ProtocolViolation, TimeoutError, WireError) as error:
            return f"lost the daemon: {error}"
        match answer.outcome:
            case Outcome.RESUME:
                vcpu.resume()
            case Outcome.FORWARD:
                uart.emulate(exit_)
                vcpu.skip()
            case Outcome.FAIL:
                return f"failed at gpa {exit_.gpa:#x}: {answer}"
            case Outcome.RETRY:
                pass  # it shall stop, with the access undecided: after a restart it comes again
    return "asked to stop"


def decide(vp: BlockingVp, exit_: MemoryExit, stopping: threading.Event) -> AnyAnswer:
    """What to do about an exit. Asks again while nothing was decided, until the vCPU shall stop."""
    message = build_memory_intercept(gpa=exit_.gpa, access=exit_.access)
    while True:
        answer = vp.intercept(message)
        if answer.outcome is not Outcome.RETRY or stopping.is_set():
            return answer
        if answer is Answer.DRAINING or isinstance(answer, LaterAnswer):
            stopping.wait(RETRY_SECONDS)


def stop(vmm: BlockingVmm, vcpu: FakeVcpu) -> None:
    """Have `run_vcpu` return soon, wherever it is; from any thread. The flag has to come first."""
    vcpu.stopping.set()
    vcpu.kick()  # out of the guest
    vmm.kick(vcpu.index)  # out of an intercept that waits at the daemon


def read(gfn: int) -> MemoryExit:
    return MemoryExit(gfn << 12, Access.READ)


def main(path: str) -> None:
    """Three vCPUs: one runs to its end, one is stopped while it waits, one makes no progress."""
    uart = Uart()
    guest = FakeVcpu(0, [read(RAM.start), read(RAM.start + 1), MemoryExit(UART_GPA, Access.WRITE, b"hi")])
    waiting = FakeVcpu(1, [read(RAM.start + 8)])
    stuck = FakeVcpu(2, [read(RAM.start)], is_stuck=True)
    changing = UaddrRange.of_pages(BEHIND_RAM.start_uaddr + (8 << 12), 1)
    with ExitStack() as opened:
        vmm = opened.enter_context(BlockingVmm.open(path, name="vcpu loop"))
        partition = vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.SOFTWARE)
        vmm.map_vma(BEHIND_RAM, 0xE_0000, Access.READ | Access.WRITE)
        vmm.add_region(RAM, BEHIND_RAM, writable=True, executable=False)
        notifier = opened.enter_context(BlockingNotifier.open(path, partition))
        threads = opened.enter_context(ThreadPoolExecutor(max_workers=3))
        with notifier.invalidation(changing):  # so the second vCPU waits, until it is kicked
            ended = []
            for vcpu in (guest, waiting, stuck):
                vp = opened.enter_context(BlockingVp.open(path, partition, vp_index=vcpu.index))
                ended.append(threads.submit(run_vcpu, vcpu, vp, uart))
            stop(vmm, waiting)
            for vcpu, end in zip((guest, waiting, stuck), ended, strict=True):
                print(f"vCPU {vcpu.index}: {end.result()}")
    print(f"UART received {uart.received.decode()!r}")


if __name__ == "__main__":
    main(sys.argv[1])
