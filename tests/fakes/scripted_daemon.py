"""A daemon that follows a script: real bytes on a real socket, one thread a connection.

Owns hearing, answering and checking the wire's rule of one request in flight. Must not know what the
methods mean: a script says what is answered. No wait in it is longer than `PATIENCE`, so that a test fails
rather than hangs.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from fakes.eventually import PATIENCE
from intercept_protocol import codec, messages, rpc
from intercept_protocol.errors import WireError

MOST_DESCRIPTORS: Final = 8
HELLO_REPLY: Final = messages.HelloReply(
    protocol=1, server="scripted", version="0", limits={"message_bytes": 65536}, features={}
)


@dataclass(frozen=True, slots=True)
class Hear:
    """Wait for one request."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the request heard last."""

    result: object = None


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer the request heard last with an error."""

    error: WireError


@dataclass(frozen=True, slots=True)
class Say:
    """Write these bytes unchanged; with `until` again and again, as fast as the client takes them."""

    data: bytes
    until: threading.Event | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """Send a request, as on a hypervisor connection, in one piece with what comes before it, and wait for
    its answer."""

    method: str
    fields: Mapping[str, object]
    before: bytes = b""


@dataclass(frozen=True, slots=True)
class Signal:
    """Tell the test that the script came this far."""

    event: threading.Event


@dataclass(frozen=True, slots=True)
class Await:
    """Wait for the test."""

    event: threading.Event


@dataclass(frozen=True, slots=True)
class Look:
    """Run something of the test's between hearing and answering."""

    action: Callable[[], None]


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close the connection; only what needs none may follow."""


Step = Hear | Answer | Refuse | Say | Ask | Signal | Await | Look | HangUp


def replies(*results: object) -> list[Step]:
    """Hear and answer, once for each result."""
    return [step for result in results for step in (Hear(), Answer(result))]


def hello() -> list[Step]:
    """Answer hello."""
    return replies(HELLO_REPLY)


@dataclass(slots=True)
class ScriptedDaemon:
    """Listens at `path`; the first connection follows the first script, and so on.

    After its script a connection only listens until the client closes. With `answers_twice` each answer is
    repeated at once, and the one before it too, as after restarts (T-12). `heard` holds every request of
    every connection as (method, params), `descriptors` what came with them, open until the block ends, and
    `answered` the error of every answer to an `Ask`, None for none.
    Leaving the block waits for all clients to close, and raises what went wrong in a script.
    """

    path: Path
    scripts: tuple[Sequence[Step], ...]
    backlog: int = 16
    answers_twice: bool = False
    heard: list[tuple[str, list[object]]] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    answered: list[object] = field(default_factory=list)
    _failures: list[BaseException] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _listener: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_UNIX))

    @property
    def methods(self) -> list[str]:
        return [method for method, _ in self.heard]

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self._listener.listen(self.backlog)
        self._start(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:  # the first may still add others
            thread.join(PATIENCE)
        self._listener.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
        for failure in self._failures:
            if error is None:
                raise failure
            error.add_note(f"the script failed: {failure!r}")

    def _start(self, target: Callable[[], None]) -> None:
        def run() -> None:
            try:
                target()
            except BaseException as failure:
                self._failures.append(failure)

        thread = threading.Thread(target=run)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        for script in self.scripts:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # the test ended with scripts left over, and says in `heard` what it expected
            self._start(partial(self._serve, connection, script))

    def _serve(self, connection: socket.socket, script: Sequence[Step]) -> None:
        with connection:
            connection.settimeout(PATIENCE)
            conversation = _Conversation(
                connection, self.heard, self.descriptors, self.answered, repeats=self.answers_twice
            )
            conversation.follow(script)


class _Conversation:
    def __init__(
        self,
        connection: socket.socket,
        heard: list[tuple[str, list[object]]],
        descriptors: list[int],
        answered: list[object],
        *,
        repeats: bool,
    ) -> None:
        self._connection = connection
        self._heard = heard
        self._descriptors = descriptors
        self._answered = answered
        self._receiver = rpc.Receiver({rpc.REQUEST, rpc.RESPONSE})
        self._msgid = 0
        self._repeats = repeats
        self._last_answer = b""

    def follow(self, script: Sequence[Step]) -> None:
        for step in script:
            match step:
                case Hear():
                    assert self._hear(), "the client closed, but the script expects a request"
                case Answer(result):
                    self._answer(rpc.encode_result(self._msgid, _to_wire(result)))
                case Refuse(error):
                    self._answer(rpc.encode_error(self._msgid, error))
                case Say():
                    self._say(step)
                case Ask():
                    self._ask(step)
                case Signal(event):
                    event.set()
                case Await(event):
                    assert event.wait(PATIENCE), "the test never let the script go on"
                case Look(action):
                    action()
                case HangUp():
                    self._connection.close()
        while self._connection.fileno() >= 0 and self._hear():
            pass

    def _say(self, say: Say) -> None:
        self._connection.sendall(say.data)
        while say.until is not None and not say.until.is_set():
            self._connection.sendall(say.data)

    def _answer(self, answer: bytes) -> None:
        self._check_one_in_flight()
        if self._repeats:
            self._connection.sendall(self._last_answer + answer + answer)
        else:
            self._connection.sendall(answer)
        self._last_answer = answer

    def _ask(self, ask: Ask) -> None:
        self._msgid += 1
        request = rpc.encode_request(self._msgid, ask.method, [dict(ask.fields)])
        self._connection.sendall(ask.before + request)
        message = self._next_message()
        assert isinstance(message, rpc.Response), f"no answer to {ask.method}: {message!r}"
        assert message.msgid == self._msgid
        self._answered.append(message.error)

    def _hear(self) -> bool:
        """Wait for a request; False at the client's end."""
        message = self._next_message()
        if message is None:
            return False
        assert isinstance(message, rpc.Request)
        self._msgid = message.msgid
        self._heard.append((message.method, message.params))
        return True

    def _next_message(self) -> rpc.Message | None:
        """Wait for one; None at the client's end."""
        while (message := self._receiver.next_message()) is None:
            try:
                data, received, _, _ = socket.recv_fds(self._connection, 4096, MOST_DESCRIPTORS)
            except ConnectionResetError:
                return None  # the client closed without reading all that the script says
            self._descriptors += received
            if not data:
                return None
            self._receiver.receive_data(data)
        return message

    def _check_one_in_flight(self) -> None:
        readable, _, _ = select.select([self._connection], [], [], 0)
        assert not (readable and self._connection.recv(1, socket.MSG_PEEK)), (
            "the client sent a second request before the answer to the first"
        )
        assert not self._receiver.has_bytes, "the client sent more than one request at once"


def _to_wire(result: object) -> object:
    return codec.to_fields(result) if isinstance(result, msgspec.Struct) else result
