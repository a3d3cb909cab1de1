"""MessagePack-RPC, sans I/O: bytes in, messages out.

Owns the three message shapes, their encoding, and a bounded receive buffer. Must not know the methods, nor
which side it plays: `Receiver` is told which kinds of message its peer may send.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Container
from typing import Final, NamedTuple

import msgpack

from ._frames import MESSAGE_LIMIT, FrameScanner
from .errors import EncodedError, ProtocolViolation

REQUEST: Final = 0
RESPONSE: Final = 1
NOTIFICATION: Final = 2
_LENGTHS = {REQUEST: 4, RESPONSE: 4, NOTIFICATION: 3}
MSGID_LIMIT = 1 << 32
"""The MessagePack-RPC specification makes msgid a 32-bit unsigned number."""

_pack: Callable[[object], bytes] = msgpack.Packer().pack
_pack_any_text: Callable[[object], bytes] = msgpack.Packer(unicode_errors="backslashreplace").pack
"""For what must go out, whatever it quotes: a path may hold lone surrogates, which UTF-8 cannot encode. A
request with such text is its caller's mistake."""
_UNPACK_ERRORS = (ValueError, TypeError, msgpack.exceptions.UnpackException)
_SMALL_FRAME = 512
"""Bytes up to which a frame is tried whole: an intercept takes at most 282, most other requests a hundred."""
_SCALARS = (int, str, bool, bytes, float, type(None))


class Request(NamedTuple):
    msgid: int
    method: str
    params: list[object]


class Response(NamedTuple):
    msgid: int
    error: object
    result: object


class Notification(NamedTuple):
    method: str
    params: list[object]


Message = Request | Response | Notification


def encode_request(msgid: int, method: str, params: list[object]) -> bytes:
    return _pack((REQUEST, msgid, method, params))


def encode_result(msgid: int, result: object) -> bytes:
    return _pack_any_text((RESPONSE, msgid, None, result))


def encode_error(msgid: int, error: EncodedError) -> bytes:
    return _pack_any_text((RESPONSE, msgid, error.to_wire(), None))


def encode_notification(method: str, params: list[object]) -> bytes:
    return _pack_any_text((NOTIFICATION, method, params))


class Receiver:
    """Turns a peer's bytes into messages, each of at most `value_limit` values.

    Holds at most one message's worth of bytes beyond what one `receive_data` brought. After a
    `ProtocolViolation` the stream is lost for good: every later call raises it again.
    """

    __slots__ = ("_accepts", "_buffer", "_scanner", "_value_limit", "_violation")

    def __init__(self, accepts: Container[int], value_limit: int = MESSAGE_LIMIT) -> None:
        self._accepts = accepts
        self._value_limit = value_limit
        self._buffer = bytearray()
        self._scanner = FrameScanner(value_limit)
        self._violation: ProtocolViolation | None = None

    @property
    def has_bytes(self) -> bool:
        """Whether a message, or part of one, is waiting in the buffer."""
        return bool(self._buffer)

    def receive_data(self, data: bytes) -> None:
        """Take in what the peer sent; dropped when the stream is lost already."""
        if self._violation is None:
            self._buffer += data

    def next_message(self) -> Message | None:
        """The next whole message, or None until more bytes arrive. Raises `ProtocolViolation`."""
        if self._violation is not None:
            raise self._violation
        try:
            return self._next_message()
        except ProtocolViolation as violation:
            self._violation = violation
            self._buffer.clear()
            raise

    def _next_message(self) -> Message | None:
        if (request := self._small_request()) is not None:
            return request
        self._check_prefix()
        end = self._scanner.scan(self._buffer)
        if end is None:
            return None
        frame = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._scanner = FrameScanner(self._value_limit)
        return self._decode(frame)

    def _small_request(self) -> Request | None:
        """Exactly one request in the buffer, with one blob or one flat map, needs no boundary scan (6 us)."""
        if not 0 < len(self._buffer) <= _SMALL_FRAME or REQUEST not in self._accepts:
            return None
        try:
            value = msgpack.unpackb(self._buffer, strict_map_key=False, object_pairs_hook=_flat_map)
        except _UNPACK_ERRORS:
            return None  # incomplete, pipelined, nested or garbage: the scan below says which
        match value:
            case [kind, int(msgid), str(method), [param]] if (
                _is_request(kind) and _is_msgid(msgid) and self._is_small(param)
            ):
                self._buffer.clear()
                self._scanner = FrameScanner(self._value_limit)
                return Request(msgid, method, [param])
            case _:
                return None

    def _is_small(self, param: object) -> bool:
        """Whether the scan would let it pass. Each value takes a byte at least."""
        return type(param) is bytes or (type(param) is dict and len(self._buffer) <= self._value_limit)

    def _check_prefix(self) -> None:
        """Refuse what cannot become a message at its first bytes, without waiting for the rest."""
        if self._buffer and self._buffer[0] not in (0x93, 0x94, 0xDC, 0xDD):
            raise _no_message("an array of 3 or 4 elements must come first")
        if len(self._buffer) > 1 and self._buffer[0] in (0x93, 0x94):
            kind, elements = self._buffer[1], self._buffer[0] & 0x0F
            # An integer in more bytes than it needs is seen when the message is whole.
            spelled_out = 0xCC <= kind <= 0xD3
            if not spelled_out and not (kind in self._accepts and _LENGTHS[kind] == elements):
                raise _no_message(f"{kind:#04x} starts no message of {elements} elements that is expected")

    def _decode(self, frame: bytes) -> Message:
        try:
            value = _unpack(frame)
        except _UNPACK_ERRORS as error:
            raise _no_message(str(error) or type(error).__name__) from error
        return self._message(value)

    def _message(self, value: object) -> Message:
        match value:
            case [kind, *_] if type(kind) is not int or kind not in self._accepts:
                shown = kind if type(kind) is int else type(kind).__name__
                raise _no_message(f"a message of type {shown} is not expected here")
            case [0, int(msgid), str(method), list(params)] if _is_msgid(msgid):
                return Request(msgid, method, params)
            case [1, int(msgid), error, result] if _is_msgid(msgid):
                return Response(msgid, error, result)
            case [2, str(method), list(params)]:
                return Notification(method, params)
            case _:
                assert isinstance(value, list), "the first byte was an array's"
                form = ", ".join(type(element).__name__ for element in value[:4])
                raise _no_message(f"got {len(value)} elements, [{form}]")  # no values: one may be a token


def _flat_map(pairs: list[tuple[object, object]]) -> dict[object, object]:
    """A map of scalars; of pairs, because a key that comes twice hides what it held first. Keys that are
    no names are left to the scan, which lets no extension pass."""
    for key, value in pairs:
        if type(key) is not str or type(value) not in _SCALARS:
            raise ValueError("not flat")
    return dict(pairs)


def _unpack(frame: bytes | bytearray) -> object:
    """One whole value. Keys of any type are let through: a wrong one is the method's EINVAL, not garbage."""
    return msgpack.unpackb(frame, strict_map_key=False)


def _is_request(kind: object) -> bool:
    return type(kind) is int and kind == REQUEST  # False and 0.0 equal 0, too


def _is_msgid(value: int) -> bool:
    return not isinstance(value, bool) and 0 <= value < MSGID_LIMIT


def _no_message(why: str) -> ProtocolViolation:
    return ProtocolViolation(errno.EBADMSG, f"not a MessagePack-RPC message: {why}")
