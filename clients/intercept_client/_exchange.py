"""One request and its outcome.

Owns the states of a single request and how its answer is decoded; must not know connections, msgids or bytes
in flight: `ClientSession` moves an exchange from state to state.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Final, Generic, TypeVar

from intercept_protocol import codec, messages, rpc
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.outcomes import Answer, AnyAnswer, LaterAnswer, Outcome
from intercept_protocol.text import shape_of

from ._errors import ClientMisuse, ConnectionLost

Reply = TypeVar("Reply")
Part = TypeVar("Part")

RESPONSE_HEAD: Final = 3
"""Bytes of a response before its error: the array of four, the type, and a msgid below 128."""

END_TIMEOUT: Final = 10.0
"""Seconds that the end of an invalidation may take before the connection is closed, which ends it too. The
daemon bounds its own waits by 5 s."""


SCM_MAX_FD: Final = 253
"""Descriptors that one message can bring (unix(7))."""


class Progress(Enum):
    NEW = "not sent yet"
    IN_FLIGHT = "its answer is owed"
    ANSWERED = "answered"
    REFUSED = "refused"
    LOST = "its answer will never come"
    WITHDRAWN = "given up before its first byte was sent"


class Exchange(Generic[Reply]):
    """A request to run once.

    `descriptors` accompany its first byte; the caller keeps them open until then, and closes them. `known`
    maps whole answers, from their fourth byte on, to replies: an answer that is found there needs no
    decoding. `call` is what it was made of, if it was a typed request. `on_progress` is called in each step,
    before the first byte is sent and before the caller learns of the answer.
    """

    __slots__ = (
        "_error", "_reply", "call", "decode", "descriptors", "known", "method", "on_progress", "params",
        "progress",
    )  # fmt: skip

    _reply: Reply

    def __init__(
        self,
        method: str,
        params: list[object],
        decode: Callable[[object], Reply],
        known: Mapping[bytes, Reply] | None = None,
        descriptors: Sequence[int] = (),
        *,
        call: messages.Call[object] | None = None,
    ) -> None:
        self.call = call
        self.method = method
        self.params = params
        self.decode = decode
        self.known = known
        self.descriptors = descriptors
        self.progress = Progress.NEW
        self.on_progress: Callable[[Progress], None] | None = None
        self._error: WireError | ProtocolViolation | ConnectionLost | None = None

    @property
    def is_owed(self) -> bool:
        """Whether the daemon may be carrying it out, its answer still to come."""
        return self.progress is Progress.IN_FLIGHT

    @property
    def succeeded(self) -> bool:
        """Whether the daemon said that it was carried out."""
        return self.progress is Progress.ANSWERED

    def advance(self, progress: Progress) -> None:
        self.progress = progress
        if self.on_progress is not None:
            self.on_progress(progress)

    def answer(self, reply: Reply) -> None:
        self._reply = reply
        self.advance(Progress.ANSWERED)

    def fail(self, progress: Progress, error: WireError | ProtocolViolation | ConnectionLost) -> None:
        self._error = error
        self.advance(progress)

    def reply(self) -> Reply:
        """Return the typed reply, or raise the error that came instead."""
        if self.progress is Progress.ANSWERED:
            return self._reply
        if self._error is not None:
            raise self._error
        raise ClientMisuse(f"{self.method}: there is no answer: {self.progress.value}")


def call_exchange(call: messages.Call[Reply], descriptors: Sequence[int] = ()) -> Exchange[Reply]:
    """The exchange of a typed request.

    Raises `ClientMisuse` for descriptors that cannot be sent: the system call would refuse them when it is
    too late to tell that from a broken connection.
    """
    _require_sendable(call.METHOD, descriptors)
    return Exchange(
        call.METHOD,
        [codec.to_fields(call)],
        lambda result: codec.decode_reply(call, result),
        _NOTHING if call.REPLY is None else None,  # type: ignore[arg-type]  # REPLY is what Reply says
        tuple(descriptors),
        call=call,
    )


def field_exchange(call: messages.Call[Reply], take: Callable[[Reply], Part]) -> Exchange[Part]:
    """The exchange of a typed request of whose reply only a part is wanted."""
    return Exchange(
        call.METHOD,
        [codec.to_fields(call)],
        lambda result: take(codec.decode_reply(call, result)),
        call=call,
    )


def intercept_exchange(message: bytes) -> Exchange[AnyAnswer]:
    """The exchange of one intercept message."""
    return Exchange(messages.INTERCEPT_METHOD, [message], _decode_answer, _ANSWERS_BY_BYTES)


def _require_sendable(method: str, descriptors: Sequence[int]) -> None:
    if len(descriptors) > SCM_MAX_FD:
        raise ClientMisuse(f"{method}: {len(descriptors)} descriptors; a message brings {SCM_MAX_FD}")
    for descriptor in descriptors:
        try:
            fcntl.fcntl(descriptor, fcntl.F_GETFD)
        except (OSError, OverflowError, ValueError) as error:
            raise ClientMisuse(f"{method}: descriptor {descriptor} is not open") from error


def _decode_answer(result: object) -> AnyAnswer:
    match result:
        case [str(outcome), str(reason)] if outcome in _OUTCOMES:
            return _ANSWERS.get((outcome, reason)) or LaterAnswer(_OUTCOMES[outcome], reason)
        case _:
            raise ProtocolViolation(errno.EPROTO, f"intercept: malformed answer: {shape_of(result)}")


_NOTHING: Mapping[bytes, None] = {rpc.encode_result(1, None)[RESPONSE_HEAD:]: None}
"""The answer of most calls: done. To decode the two of an announced munmap takes 16 us of the caller's 65."""
_OUTCOMES: Mapping[str, Outcome] = {outcome.value: outcome for outcome in Outcome}
_ANSWERS: Mapping[tuple[str, str], Answer] = {(answer.outcome, answer.reason): answer for answer in Answer}
_ANSWERS_BY_BYTES: Mapping[bytes, Answer] = {
    rpc.encode_result(1, list(pair))[RESPONSE_HEAD:]: answer for pair, answer in _ANSWERS.items()
}
"""A full decode takes 9 us; a lookup 0.1 us. An answer that is packed differently is decoded in full."""
