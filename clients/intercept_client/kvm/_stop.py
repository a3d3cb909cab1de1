"""Why a vCPU's loop ended.

Owns the reasons; must not know the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from intercept_protocol.outcomes import AnyAnswer


class StopReason(Enum):
    """Why a vCPU stopped."""

    ASKED = "asked to stop"
    HALTED = "halted"
    TRIPLE_FAULT = "triple fault"
    FAILED = "the daemon said fail"
    NOT_EXECUTABLE = "an instruction fetch that nobody can emulate"
    NOT_EMULATED = "an instruction that KVM cannot emulate"
    HOST_FAULT = "the memory behind a memslot faults"
    DAEMON_LOST = "the daemon is gone, and only it could decide"
    BROKEN = "KVM gave up"


@dataclass(frozen=True, slots=True)
class Stop:
    """How a run of a vCPU ended; `answer` is the daemon's, if it gave one."""

    reason: StopReason
    gpa: int | None = None
    """Where the guest was stopped, for reasons that have a place."""
    answer: AnyAnswer | None = None
    detail: str = ""

    def __str__(self) -> str:
        where = "" if self.gpa is None else f" at gpa {self.gpa:#x}"
        said = "" if self.answer is None else f": {self.answer}"
        return f"{self.reason.value}{where}{said}{f': {self.detail}' if self.detail else ''}"


class VcpuStopped(Exception):
    """Raised while an exit is handled, for the loop."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(str(stop))
        self.stop = stop
