"""A vCPU's loop whose every neighbour is scripted: exits, answers and memslots.

Owns the wiring; must not know what is tested.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from fakes.kvm_ports import FakeSlots, Hook, ScriptedDecider, ScriptedVcpu
from intercept_client.kvm._copying import AnnouncedCopier, Copier
from intercept_client.kvm._devices import Bus, Window
from intercept_client.kvm._exits import (
    Exit,
    Halted,
)
from intercept_client.kvm._fetch_fault import LONGEST_INSTRUCTION, FetchFault
from intercept_client.kvm._guest_access import GuestAccess
from intercept_client.kvm._guest_memory import GuestMemory
from intercept_client.kvm._intercepts import InterceptLoop
from intercept_client.kvm._tally import VcpuTally
from intercept_client.kvm._vcpu_loop import VcpuLoop
from intercept_protocol.addresses import PAGE_SIZE, GfnRange, UaddrRange
from intercept_protocol.hv_message import memory_access
from intercept_protocol.messages import Architecture
from intercept_protocol.outcomes import Access, AnyAnswer
from interceptctl.guest.emulated import Reports, Scratch

RW = Access.READ | Access.WRITE
GFN, GPA = 0x200, 0x200_000
SCRATCH = 0xFEB0_0000
LOCKED_INCREMENT = b"\xf0\xff\x06"


class Rig:
    """A loop whose every neighbour is scripted; two pages of memory that may be mapped at `GFN`."""

    def __init__(self, uaddrs: UaddrRange) -> None:
        self.uaddrs = uaddrs
        self.slots = FakeSlots()
        self.memory = GuestMemory(self.slots)
        self.scratch, self.reports = Scratch(PAGE_SIZE), Reports()
        self.lost: list[str] = []
        self.copier: Copier = AnnouncedCopier()
        self.code = bytes(LONGEST_INSTRUCTION)

    def script(
        self,
        exits: Iterable[Exit],
        answers: Iterable[AnyAnswer | Exception | Hook] = (),
        gpas: dict[int, int] | None = None,
    ) -> VcpuLoop:
        self.vcpu = ScriptedVcpu([*exits, Halted()], gpas)
        self.decider = ScriptedDecider(answers)
        tally = VcpuTally()
        self.intercepts = intercepts = InterceptLoop(3, self.decider, tally, self.lost.append)
        devices = Bus(Window(SCRATCH, PAGE_SIZE, self.scratch))
        self.loop = VcpuLoop(
            self.vcpu,
            intercepts=intercepts,
            access=GuestAccess(self.memory, self.copier, devices, intercepts, tally),
            fetch_fault=FetchFault(self.vcpu, self.memory, intercepts, lambda _: self.code),
            gate=self.memory.gate,
            code=lambda _: self.code,
            ports=Bus(Window(0x10, 1, self.reports)),
            tally=tally,
        )
        return self.loop

    def map(self, access: Access = RW) -> None:
        self.memory.map(GfnRange(start=GFN, end=GFN + 2), self.uaddrs, access)

    def unmap(self) -> None:
        self.memory.unmap(GfnRange(start=GFN, end=GFN + 2))

    def put(self, offset: int, data: bytes) -> None:
        ctypes.memmove(self.uaddrs.start_uaddr + offset, data, len(data))

    def get(self, offset: int, size: int) -> bytes:
        return ctypes.string_at(self.uaddrs.start_uaddr + offset, size)

    def wanted(self) -> list[tuple[int, Access] | None]:
        return [memory_access(message, Architecture.X86_64) for message in self.decider.asked]
