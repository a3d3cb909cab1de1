"""The VMM's side of a hypervisor connection, without any I/O: hello first, then the daemon asks.

Owns the order of that conversation, what each request says, and the rule that the VMM's regions must cover a
map (Y-12); must not know sockets, nor what mapping means. A shell sends `hello`, receives until `welcomed`,
and then serves: after each `receive_data` it carries out what `next_request` returns, gives the outcome to
`answer`, and sends `data_to_send`. After `ConnectionEnded` or a `ProtocolViolation` the conversation is over.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Final

from intercept_protocol import codec, messages, rpc
from intercept_protocol.addresses import GfnRange, RangeError, UaddrRange
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import (
    HelloHypervisor,
    MapGpa,
    MapGpas,
    PartitionCredentials,
    UnmapGpa,
    UnmapGpas,
)
from intercept_protocol.outcomes import Access

from ._errors import ConnectionEnded, ConnectionLost
from ._own_regions import OwnRegions

RECEIVE_BYTES: Final = 65536
CLOSED_HERE: Final = "closed by this client"
LOGGED_REFUSALS: Final = 16
"""Of one connection: a daemon that asks for more must not fill the VMM's disk."""
_HELLO_MSGID: Final = 1
_log: Final = logging.getLogger("intercept_client")


@dataclass(frozen=True, slots=True)
class MapRequest:
    """Let the guest reach `uaddrs` at `gfns` with these rights, and nothing else there."""

    gfns: GfnRange
    uaddrs: UaddrRange
    access: Access
    start_pfn: int | None


@dataclass(frozen=True, slots=True)
class UnmapRequest:
    """Let the guest reach nothing at `gfns`."""

    gfns: GfnRange


Request = Sequence[MapRequest] | Sequence[UnmapRequest]
"""What the daemon asks in one request, in order: often one piece."""


def refused_after(done: int, refusal: WireError) -> WireError:
    """The refusal of a request of which so many pieces, from the first, were done (Y-14)."""
    told = copy(refusal)
    told.details = {**refusal.details, "done": done}
    return told


class HypervisorSession:
    """One conversation; `welcomed` once the daemon has answered the hello.

    A map that `regions` do not cover is refused here, and logged as an error: only a daemon that is broken,
    or was taken over, asks for it.
    """

    def __init__(self, partition: PartitionCredentials, regions: OwnRegions) -> None:
        self._hello = HelloHypervisor(partition_id=partition.partition_id, token=partition.token, lists=True)
        self._receiver = rpc.Receiver({rpc.REQUEST, rpc.RESPONSE})
        self._answers = b""
        self._msgid = 0
        self._regions = regions
        self._refusals = 0
        self.welcomed = False

    def hello(self) -> bytes:
        """The first bytes to send."""
        return rpc.encode_request(_HELLO_MSGID, self._hello.METHOD, [codec.to_fields(self._hello)])

    def receive_data(self, data: bytes) -> None:
        """Take in what the daemon sent; empty is its end.

        Raises `WireError` if the daemon refuses the hello, `ConnectionEnded` with its last words,
        `ConnectionLost`, and `ProtocolViolation` for anything that is not a request.
        """
        if not data:
            raise ConnectionLost("the daemon closed the hypervisor connection")
        self._receiver.receive_data(data)
        while not self.welcomed and (message := self._receiver.next_message()) is not None:
            self._welcome(message)

    def next_request(self) -> Request | None:
        """What the daemon asks next; None until more data arrives.

        A malformed request is refused here, and so is one with a map that no region covers: all of it.

        Raises as `receive_data` does.
        """
        while self.welcomed and (message := self._receiver.next_message()) is not None:
            if isinstance(message, rpc.Response) and message.msgid == _HELLO_MSGID:
                continue  # it had its answer, which comes again after a restart (T-12)
            self._msgid = _request(message).msgid
            try:
                request = _decode(_request(message))
                for piece in request:
                    self._require_own(piece)
            except WireError as refusal:
                self.answer(refused_after(0, refusal))
            else:
                return request
        return None

    def answer(self, refusal: WireError | None) -> None:
        """The request that `next_request` returned last was carried out, or refused: see `refused_after`."""
        self._answers += (
            rpc.encode_result(self._msgid, None)
            if refusal is None
            else rpc.encode_error(self._msgid, refusal)
        )

    def data_to_send(self) -> bytes:
        """The answers that were not taken yet."""
        answers, self._answers = self._answers, b""
        return answers

    def _require_own(self, piece: MapRequest | UnmapRequest) -> None:
        """Raise `WireError` for a map of what is in no region. An unmap takes nothing from the VMM."""
        if not isinstance(piece, MapRequest):
            return
        try:
            self._regions.require(piece.gfns, piece.uaddrs, piece.access, piece.start_pfn)
        except WireError as refusal:
            self._refusals += 1
            if self._refusals <= LOGGED_REFUSALS:
                last = "; no more of these are logged" if self._refusals == LOGGED_REFUSALS else ""
                _log.error("refused what the daemon asked: %s%s", refusal.message, last)
            raise

    def _welcome(self, message: rpc.Message) -> None:
        match message:
            case rpc.Response(msgid=msgid, error=error) if msgid == _HELLO_MSGID:
                if error is not None:
                    raise WireError.from_wire(error)
                self.welcomed = True
            case _:
                _request(message)
                raise ProtocolViolation(errno.EPROTO, "a request came before the answer to the hello")


def _request(message: rpc.Message) -> rpc.Request:
    match message:
        case rpc.Request():
            return message
        case rpc.Response(msgid=0, error=error) if error is not None:
            raise ConnectionEnded(WireError.from_any(error))
        case _:
            kind = type(message).__name__.lower()
            raise ProtocolViolation(errno.EPROTO, f"not expected on a hypervisor connection: {kind}")


def _decode(request: rpc.Request) -> Request:
    """Raises `WireError` for a request of another form, or whose ranges are none."""
    call = codec.decode_call(messages.HYPERVISOR_METHODS, request.method, request.params)
    try:
        match call:
            case MapGpa():
                return [_map_request(call)]
            case UnmapGpa():
                return [_unmap_request(call)]
            case MapGpas(pieces=maps):
                return [_map_request(piece) for piece in maps]
            case UnmapGpas(pieces=unmaps):
                return [_unmap_request(piece) for piece in unmaps]
    except RangeError as error:
        raise WireError(errno.EINVAL, f"{call.METHOD}: {error}", field=error.field) from error


def _map_request(piece: MapGpa) -> MapRequest:
    gfns = GfnRange.of(piece.start_gfn, piece.page_count)
    uaddrs = UaddrRange.of_pages(piece.start_uaddr, piece.page_count)
    return MapRequest(gfns, uaddrs, Access(piece.access), piece.start_pfn)


def _unmap_request(piece: UnmapGpa) -> UnmapRequest:
    return UnmapRequest(GfnRange.of(piece.start_gfn, piece.page_count))
