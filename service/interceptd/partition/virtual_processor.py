"""One virtual processor: a task that consumes intercept messages from its socket.

Owns the order of one intercept, from the 256 bytes to the answer, and the ways to interrupt its waiting. Must
not know how regions are kept or mappings are made.
"""

from __future__ import annotations

import errno
from collections import Counter
from time import perf_counter_ns

import structlog
import trio

from intercept_protocol import messages, rpc
from intercept_protocol._intercept_codec import InterceptCodec, encode_answer
from intercept_protocol.errors import WireError
from intercept_protocol.events import InterceptAnswered
from intercept_protocol.hv_message import MESSAGE_SIZE, MemoryAccess, memory_access
from intercept_protocol.messages import Architecture
from intercept_protocol.outcomes import Answer
from interceptd.connections.connection import Connection
from interceptd.errors import PartitionLost
from interceptd.memory.fault_handler import Fault, FaultHandler
from interceptd.pages.mapping import Mapping
from interceptd.partition.progress_guard import ProgressGuard
from interceptd.scheduling.time_share import give_way
from interceptd.telemetry.event_bus import PartitionPublisher
from interceptd.telemetry.histogram import InterceptLatency
from interceptd.telemetry.trace import DECODE

log = structlog.get_logger()


class VirtualProcessor:
    """Lives as long as its connection. Every intercept gets exactly one answer (I4)."""

    def __init__(
        self,
        index: int,
        connection: Connection,
        *,
        architecture: Architecture,
        faults: FaultHandler,
        answers: Counter[Answer],
        event_bus: PartitionPublisher,
    ) -> None:
        self.index = index
        self.latency = InterceptLatency()
        """Of each intercept from its message to its answer, encoding and sending excluded."""
        self._connection = connection
        self._architecture = architecture
        self._codec = InterceptCodec(architecture)
        self._faults = faults
        self._answers = answers
        self._event_bus = event_bus
        self._guard = ProgressGuard()
        self._is_deciding = False
        """Whether an intercept is being decided that the look-up did not decide; from then on it `_owes`."""
        self._owes = False
        self._quiet: trio.Event | None = None
        """Created by the first task that waits for it."""
        self._waiting: trio.CancelScope | None = None
        self._interrupted_by: Answer | None = None
        self._kick_kept = False
        self._draining = False
        self._lost: PartitionLost | None = None

    @property
    def state(self) -> str:
        return "waiting" if self._is_deciding else "running"

    @property
    def intercepts(self) -> int:
        return self.latency.count

    async def run(self) -> None:
        """Answer intercepts until the VMM closes the connection."""
        recognise = self._codec.match
        try:
            while (request := await self._connection.receive_whole(recognise)) is not None:
                if isinstance(request, rpc.Request):
                    reply = await self._reply(request)
                else:
                    msgid, wanted = request
                    reply = encode_answer(msgid, await self._answer(wanted))
                await self._connection.answer(reply)
                if self._owes:
                    self._settle()
                if self._lost is not None:
                    raise self._lost
        finally:
            self._settle()

    def kick(self) -> None:
        """Answer the intercept that waits now with RETRY kicked; if none does, the next one that would."""
        if self._is_deciding:
            self._interrupt(Answer.KICKED)
        else:
            self._kick_kept = True

    def fail(self) -> None:
        """The partition is lost: what waits is answered FAIL hypervisor_error."""
        if self._is_deciding:
            self._interrupt(Answer.HYPERVISOR_ERROR)

    def drain(self) -> None:
        """From now on decide nothing: what waits and what comes is answered RETRY draining."""
        self._draining = True
        if self._is_deciding:
            self._interrupt(Answer.DRAINING)

    async def wait_quiet(self) -> None:
        """Block until no intercept is without its answer."""
        if self._owes:
            if self._quiet is None:
                self._quiet = trio.Event()
            await self._quiet.wait()

    def _settle(self) -> None:
        self._owes = False
        if self._quiet is not None:
            self._quiet.set()
            self._quiet = None

    async def _reply(self, request: rpc.Request) -> bytes:
        """The general form of a request: another encoding of an intercept, or none."""
        try:
            answer = await self._answer(memory_access(_intercept_message(request), self._architecture))
        except WireError as error:
            await self._connection.tenant.throttle()  # no intercept: it keeps the pace of other requests
            return rpc.encode_error(request.msgid, error)
        return rpc.encode_result(request.msgid, answer.value)

    async def _answer(self, wanted: MemoryAccess | None) -> Answer:
        began = perf_counter_ns()
        latency, fault = self.latency.at_once, None
        if wanted is None:
            answer = Answer.NOT_MEMORY
        elif self._draining:
            answer = Answer.DRAINING
        else:
            match self._faults.lookup(*wanted):
                case Mapping() as mapping:
                    answer = self._guard.answer(mapping, *wanted)
                case Answer() as answer:
                    pass
                case found:
                    fault = Fault(*wanted, found)
                    fault.spent[DECODE] = looked_up = perf_counter_ns() - began
                    self._faults.stages.decode.record(looked_up)
                    answer = await self._handle(fault)
                    if fault.waited:
                        latency = self.latency.waited
        if answer is not Answer.ALREADY_MAPPED:
            self._guard.reset()
        self._answers[answer] += 1
        now = perf_counter_ns()
        latency.record(now - began)
        if self._event_bus.intercepts_wanted:
            if (trace := self._event_bus.trace) is not None:
                trace.intercept(now, self.index, wanted, answer, now - began, fault)
            self._publish(wanted, answer)
        return answer

    def _publish(self, wanted: MemoryAccess | None, answer: Answer) -> None:
        if not self._event_bus.subscribers_want_intercepts:
            return
        gfn, access = wanted or (None, None)
        self._event_bus.publish(
            InterceptAnswered(
                vp_index=self.index, outcome=answer.outcome, reason=answer.reason, gfn=gfn, access=access
            )
        )

    async def _handle(self, fault: Fault) -> Answer:
        """Resolve, map and wait; a kick, a drain or the end of the connection interrupts it."""
        self._is_deciding = self._owes = True
        self._interrupted_by = None
        try:
            answer = await self._faults.handle_nowait(fault)
            if answer is None and self._interrupted_by is None:
                with trio.CancelScope() as self._waiting:
                    answer = await self._connection.answer_watched(self._decide(fault))
                    await give_way()  # many may have waited for the same
        except PartitionLost as error:  # raised once the VP has its answer
            self._lost = error
            return Answer.HYPERVISOR_ERROR
        finally:
            self._is_deciding, self._waiting = False, None
        if self._interrupted_by is Answer.HYPERVISOR_ERROR:  # what was decided meanwhile is void, too
            return Answer.HYPERVISOR_ERROR
        return answer or self._interrupted_by or Answer.CONTENDED

    async def _decide(self, fault: Fault) -> Answer:
        answer = await self._faults.handle(fault, self._take_kick)
        if self._event_bus.trace is not None:  # others may be answered before this VP is
            fault.decided_at = self._event_bus.trace.written
        return answer

    def _take_kick(self, _unless: Answer) -> Answer | None:
        """KICKED instead of the wait to come, if a kick was kept for it."""
        kept, self._kick_kept = self._kick_kept, False
        return Answer.KICKED if kept else None

    def _interrupt(self, answer: Answer) -> None:
        self._interrupted_by = answer
        if self._waiting is not None:
            self._waiting.cancel()


def _intercept_message(request: rpc.Request) -> bytes:
    """The 256 bytes of an `intercept`; ENOSYS for another method, EINVAL for other parameters."""
    if request.method != messages.INTERCEPT_METHOD:
        raise WireError(
            errno.ENOSYS,
            f"no method {request.method!r:.80} for this role",
            methods=[messages.INTERCEPT_METHOD],
        )
    match request.params:
        case [bytes(message)] if len(message) == MESSAGE_SIZE:
            return message
        case _:
            raise WireError(
                errno.EINVAL, f"intercept: params must be {MESSAGE_SIZE} raw bytes", field="params"
            )
