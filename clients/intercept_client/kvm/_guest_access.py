"""One access that the guest could not make by itself, carried out for it.

Owns the order: the VMM's own devices first, then the memory that the guest reaches, then the daemon's answer;
must not know how an exit is completed. KVM_EXIT_MMIO does not run the instruction again, so after RESUME the
VMM completes the access, on what is mapped *then*: if that went away between the answer and the copy, it is a
new intercept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from intercept_protocol.addresses import PAGE_SHIFT, PAGE_SIZE
from intercept_protocol.outcomes import Access, Outcome

from ._copying import Copier, MemoryGone
from ._devices import Bus
from ._guest_memory import GuestMemory
from ._intercepts import InterceptLoop
from ._tally import VcpuTally

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Found:
    """What a read found; `on_memory` if all of it came from memory that the guest reaches."""

    data: bytes
    on_memory: bool


class GuestAccess:
    def __init__(
        self, memory: GuestMemory, copier: Copier, devices: Bus, intercepts: InterceptLoop, tally: VcpuTally
    ) -> None:
        self._memory = memory
        self._copier = copier
        self._devices = devices
        self._intercepts = intercepts
        self._tally = tally

    def read(self, gpa: int, size: int, instruction_pointer: int) -> Found:
        """Any bytes, across pages too. Raises `VcpuStopped`; what was read so far is then read again."""
        data, on_memory = b"", True
        for start, length in _within_pages(gpa, size):
            load = partial(self._copier.read, size=length)
            part = self._on_memory(start, Access.READ, instruction_pointer, load)
            on_memory = on_memory and part is not None
            data += self._devices.read(start, length) if part is None else part
        return Found(data, on_memory)

    def write(self, gpa: int, data: bytes, instruction_pointer: int) -> None:
        """As `read`."""
        for start, length in _within_pages(gpa, len(data)):
            part = data[start - gpa : start - gpa + length]
            store = partial(self._store, part)
            if not self._on_memory(start, Access.WRITE, instruction_pointer, store):
                self._devices.write(start, part)

    def _store(self, data: bytes, uaddr: int) -> bool:
        self._copier.write(uaddr, data)
        return True

    def _on_memory(
        self, gpa: int, access: Access, instruction_pointer: int, copy: Callable[[int], T]
    ) -> T | None:
        """What `copy` did on the memory behind `gpa`, which is within one page; None if it is a device's.

        Checks the memory before asking the daemon: another vCPU may have had it mapped, or KVM exited while
        one slot was replaced by others.
        """
        if self._devices.find(gpa) is None:
            ask = self._intercepts.ask
            while True:
                claim = self._memory.claim(gpa >> PAGE_SHIFT, access)
                if claim is not None:
                    try:
                        done = copy(claim.uaddr + gpa % PAGE_SIZE)
                    except MemoryGone as gone:
                        ask = partial(self._intercepts.ask_about_fault, fault=str(gone))
                    else:
                        self._tally.completed += 1
                        return done
                    finally:
                        self._memory.release(claim)
                if ask(gpa, access, instruction_pointer).outcome is Outcome.FORWARD:
                    break
        self._tally.forwarded += 1
        return None


def _within_pages(gpa: int, size: int) -> Iterator[tuple[int, int]]:
    """The access cut at page boundaries."""
    end = gpa + size
    while gpa < end:
        length = min(end, (gpa // PAGE_SIZE + 1) * PAGE_SIZE) - gpa
        yield gpa, length
        gpa += length
