"""A vCPU's requests to the daemon: one intercept, repeated until it is decided.

Owns the 256-byte message, the retries and the stop flag of one vCPU; must not know memory, devices or KVM.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Protocol

from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.hv_message import build_memory_intercept
from intercept_protocol.outcomes import Access, Answer, AnyAnswer, LaterAnswer, Outcome

from ._stop import Stop, StopReason, VcpuStopped
from ._tally import VcpuTally

RETRY_PAUSE: Final = 0.01
"""Seconds before the next question where the daemon may have answered at once: it is ending, and closes in
its own time, or it has a reason that is not known here."""


class Decider(Protocol):
    """Decides intercepts; see `BlockingVp`."""

    def intercept(self, message: bytes) -> AnyAnswer: ...


class InterceptLoop:
    """`on_lost` is called with the reason when the daemon is gone."""

    def __init__(
        self, vp_index: int, decider: Decider, tally: VcpuTally, on_lost: Callable[[str], None]
    ) -> None:
        self._vp_index = vp_index
        self._decider = decider
        self._on_lost = on_lost
        self._tally = tally
        self.stopping = threading.Event()

    def ask(self, gpa: int, access: Access, instruction_pointer: int) -> AnyAnswer:
        """Ask until the daemon answers RESUME or FORWARD; raises `VcpuStopped` for everything else."""
        message = build_memory_intercept(
            gpa=gpa, access=access, vp_index=self._vp_index, instruction_pointer=instruction_pointer
        )
        while True:
            if self.stopping.is_set():
                raise VcpuStopped(Stop(StopReason.ASKED, gpa))
            answer = self._ask_once(message, gpa)
            self._tally.intercepts[answer] += 1
            match answer.outcome:
                case Outcome.RETRY:
                    if answer is Answer.DRAINING or isinstance(answer, LaterAnswer):  # may come at once
                        self.stopping.wait(RETRY_PAUSE)
                case Outcome.FAIL:
                    raise VcpuStopped(Stop(StopReason.FAILED, gpa, answer))
                case _:
                    return answer

    def ask_about_fault(self, gpa: int, access: Access, instruction_pointer: int, fault: str) -> AnyAnswer:
        """As `ask`, after the memory that the guest reaches at `gpa` faulted.

        The daemon may know by now that the memory is gone. If it keeps answering that the memory is mapped,
        until it answers NO_PROGRESS, the run ends with HOST_FAULT.
        """
        try:
            return self.ask(gpa, access, instruction_pointer)
        except VcpuStopped as stopped:
            if stopped.stop.answer is not Answer.NO_PROGRESS:
                raise
            stop = Stop(StopReason.HOST_FAULT, gpa, Answer.NO_PROGRESS, fault)
            raise VcpuStopped(stop) from stopped

    def _ask_once(self, message: bytes, gpa: int) -> AnyAnswer:
        try:
            return self._decider.intercept(message)
        except (OSError, ProtocolViolation, WireError) as error:
            # The connection is lost, the answer late or malformed: do not ask again.
            self._on_lost(str(error))
            raise VcpuStopped(Stop(StopReason.DAEMON_LOST, gpa, detail=str(error))) from error
