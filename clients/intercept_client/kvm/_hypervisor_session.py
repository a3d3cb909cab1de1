"""The VMM's side of the hypervisor connection, without any I/O: hello first, then the daemon asks.

Owns the order of that conversation; must not know sockets, nor what mapping means. After `ConnectionEnded`
or a `ProtocolViolation` it is over.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from intercept_client._errors import ConnectionEnded
from intercept_protocol import codec, messages, rpc
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import HelloHypervisor, HypervisorCall, PartitionCredentials

_HELLO_MSGID: Final = 1


class HypervisorSession:
    def __init__(self, partition: PartitionCredentials, carry_out: Callable[[HypervisorCall], None]) -> None:
        """`carry_out` does as the daemon asks, or refuses with a `WireError`."""
        self._hello = HelloHypervisor(partition_id=partition.partition_id, token=partition.token)
        self._carry_out = carry_out
        self._receiver = rpc.Receiver({rpc.REQUEST, rpc.RESPONSE})
        self.welcomed = False

    def hello(self) -> bytes:
        """The first bytes to send."""
        return rpc.encode_request(_HELLO_MSGID, self._hello.METHOD, [codec.to_fields(self._hello)])

    def receive_data(self, data: bytes) -> bytes:
        """Take in what the daemon sent, do what it asks, in order; returns what to answer.

        Raises `WireError` for a refused hello, `ConnectionEnded`, and `ProtocolViolation` for anything that
        is not a request.
        """
        self._receiver.receive_data(data)
        answers = b""
        while (message := self._receiver.next_message()) is not None:
            answers += self._handle(message)
        return answers

    def _handle(self, message: rpc.Message) -> bytes:
        match message:
            case rpc.Response(msgid=0, error=error) if error is not None:
                raise ConnectionEnded(WireError.in_words(error))
            case rpc.Response(msgid=msgid, error=error) if msgid == _HELLO_MSGID and not self.welcomed:
                if error is not None:
                    raise WireError.from_wire(error)
                self.welcomed = True
                return b""
            case rpc.Request() if self.welcomed:
                return self._answer(message)
            case _:
                raise ProtocolViolation(
                    errno.EPROTO, f"not expected on a hypervisor connection: {type(message).__name__.lower()}"
                )

    def _answer(self, request: rpc.Request) -> bytes:
        try:
            call = codec.decode_call(messages.HYPERVISOR_METHODS, request.method, request.params)
            self._carry_out(call)
        except WireError as error:
            return rpc.encode_error(request.msgid, error)
        return rpc.encode_result(request.msgid, None)
