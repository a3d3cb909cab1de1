"""KVM and the daemon as small tests want them: scripted, recorded, and refusing on order.

Owns no rule of either; must not know what is tested.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable

from intercept_client.kvm._exits import Exit, PortRead
from intercept_client.kvm._memslots import Memslot
from intercept_client.kvm._registers import REGISTER_COUNT
from intercept_protocol.outcomes import Answer, AnyAnswer, LaterAnswer

Hook = Callable[[], None]


class FakeSlots:
    """Memslots like KVM's: an id in use or an overlap is EEXIST. `refuse_at` names the call that fails."""

    def __init__(self, slot_limit: int = 64, *, has_read_only_slots: bool = True) -> None:
        self.slot_limit = slot_limit
        self.has_read_only_slots = has_read_only_slots
        self.held: dict[int, Memslot] = {}
        self.calls = 0
        self.refuse_at: set[int] = set()

    def set_memslot(self, slot: Memslot) -> None:
        self._call()
        if slot.slot_id in self.held or any(held.gfns.overlaps(slot.gfns) for held in self.held.values()):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        assert 0 <= slot.slot_id < self.slot_limit
        self.held[slot.slot_id] = slot

    def delete_memslot(self, slot: Memslot) -> None:
        self._call()
        assert self.held.pop(slot.slot_id) == slot

    def reached(self) -> dict[int, tuple[int, bool]]:
        """By gfn: the uaddr page and whether it may be written."""
        return {
            gfn: (slot.uaddr_page(gfn), slot.is_writable)
            for slot in self.held.values()
            for gfn in range(slot.gfns.start, slot.gfns.end)
        }

    def _call(self) -> None:
        self.calls += 1
        if self.calls in self.refuse_at:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


class ScriptedDecider:
    """Gives these answers in turn, or raises them; a hook runs before the answer it stands before."""

    def __init__(self, script: Iterable[AnyAnswer | Exception | Hook]) -> None:
        self._script = iter(script)
        self.asked: list[bytes] = []

    def intercept(self, message: bytes) -> AnyAnswer:
        self.asked.append(message)
        for step in self._script:
            match step:
                case Answer() | LaterAnswer():
                    return step
                case Exception():
                    raise step
                case hook:
                    hook()
        raise AssertionError("asked once too often")


class ScriptedVcpu:
    """Comes back with these exits in turn; `finish` takes from the same script."""

    def __init__(self, exits: Iterable[Exit], gpas: dict[int, int] | None = None) -> None:
        """`gpas`: by offset from the program counter, what the guest's own page tables have there."""
        self._exits = iter(exits)
        self._gpas = gpas or {}
        self.registers: tuple[int, ...] = (0,) * REGISTER_COUNT
        self.found: list[bytes] = []
        self.kicks = 0

    def run(self) -> Exit:
        return next(self._exits)

    def finish(self) -> Exit:
        return next(self._exits)

    def kick(self) -> None:
        self.kicks += 1

    def finish_read(self, data: bytes) -> None:
        self.found.append(data)

    def finish_port_read(self, request: PortRead, data: bytes) -> None:
        assert len(data) == request.size * request.count
        self.found.append(data)

    def instruction_gpa(self, offset: int = 0, registers: tuple[int, ...] | None = None) -> int | None:  # noqa: ARG002
        return self._gpas.get(offset)
