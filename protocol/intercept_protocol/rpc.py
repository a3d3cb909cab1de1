"""MessagePack-RPC, sans I/O: bytes in, messages out.

Owns the three message types, their encoding, and a bounded receive buffer. Must not know the methods, nor
which side it is: the caller of `Receiver` says which message types the peer may send.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Container
from copy import copy
from typing import Final, NamedTuple

import msgpack

from ._frames import ANY_VALUES, FrameScanner, MessageLimits
from .errors import EncodedError, ProtocolViolation

REQUEST: Final = 0
RESPONSE: Final = 1
NOTIFICATION: Final = 2
_LENGTHS = {REQUEST: 4, RESPONSE: 4, NOTIFICATION: 3}
MSGID_LIMIT = 1 << 32
"""In the MessagePack-RPC specification a msgid is a 32-bit unsigned number."""

_pack: Callable[[object], bytes] = msgpack.Packer().pack
_pack_any_text: Callable[[object], bytes] = msgpack.Packer(unicode_errors="backslashreplace").pack
"""For answers and notifications, which may quote a path with lone surrogates, which UTF-8 cannot encode. In a
request such text is the caller's error."""
_UNPACK_ERRORS = (ValueError, TypeError, msgpack.exceptions.UnpackException)
_SMALL_FRAME = 512
"""Smaller frames are decoded at once: an intercept takes at most 282 bytes, other requests about 100."""
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
    """Turns a peer's bytes into messages, each with at most as many values as `limit` says.

    Buffers at most one message beyond the bytes of one `receive_data`. A `ProtocolViolation` is final: every
    later call of `next_message` raises it again.
    """

    __slots__ = ("_accepts", "_buffer", "_limit", "_scanner", "_violation")

    def __init__(self, accepts: Container[int], limit: MessageLimits = ANY_VALUES) -> None:
        self._accepts = accepts
        self._limit = limit
        self._buffer = bytearray()
        self._scanner = FrameScanner(limit)
        self._violation: ProtocolViolation | None = None

    @property
    def has_bytes(self) -> bool:
        """Whether the buffer holds a message, or part of one."""
        return bool(self._buffer)

    @property
    def missing_bytes(self) -> int:
        """How many more bytes the message under way has at least."""
        return self._scanner.missing_bytes

    def drop_rest(self) -> int:
        """Drop what is buffered behind the last message, unseen; returns how many bytes that was."""
        rest = len(self._buffer)
        self._buffer.clear()
        return rest

    def receive_data(self, data: bytes) -> None:
        """Buffer what the peer sent; drops it after a `ProtocolViolation`."""
        if self._violation is None:
            self._buffer += data

    def next_message(self) -> Message | None:
        """The next whole message, or None until more bytes arrive. Raises `ProtocolViolation`."""
        if self._violation is not None:
            raise copy(self._violation)
        try:
            return self._next_message()
        except ProtocolViolation as violation:
            self._violation = copy(violation)  # without the traceback, which leads back here: a cycle
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
        self._scanner = FrameScanner(self._limit)
        return self._decode(frame)

    def _small_request(self) -> Request | None:
        """If the buffer is exactly one request with one blob or one flat map, decode it without a scan."""
        if not 0 < len(self._buffer) <= _SMALL_FRAME or REQUEST not in self._accepts:
            return None
        try:
            value = msgpack.unpackb(self._buffer, strict_map_key=False, object_pairs_hook=_flat_map)
        except _UNPACK_ERRORS:
            return None  # incomplete, pipelined, nested or garbage: the boundary scan decides
        match value:
            case [kind, int(msgid), str(method), [param]] if (
                _is_request(kind) and _is_msgid(msgid) and self._is_small(param)
            ):
                self._buffer.clear()
                self._scanner = FrameScanner(self._limit)
                return Request(msgid, method, [param])
            case _:
                return None

    def _is_small(self, param: object) -> bool:
        """Whether the scan would accept it. Each value takes at least one byte."""
        return type(param) is bytes or (type(param) is dict and len(self._buffer) <= self._limit.values)

    def _check_prefix(self) -> None:
        """Reject at its first bytes what cannot become a message, without waiting for the rest."""
        if self._buffer and self._buffer[0] not in (0x93, 0x94, 0xDC, 0xDD):
            raise _malformed("must start with an array of 3 or 4 elements")
        if len(self._buffer) > 1 and self._buffer[0] in (0x93, 0x94):
            kind, elements = self._buffer[1], self._buffer[0] & 0x0F
            # An integer in more bytes than necessary is checked when the message is complete.
            widened = 0xCC <= kind <= 0xD3
            if not widened and not (kind in self._accepts and _LENGTHS[kind] == elements):
                raise _malformed(f"{kind:#04x} does not start an expected message of {elements} elements")

    def _decode(self, frame: bytes) -> Message:
        try:
            value = _unpack(frame)
        except _UNPACK_ERRORS as error:
            raise _malformed(str(error) or type(error).__name__) from error
        return self._message(value)

    def _message(self, value: object) -> Message:
        match value:
            case [kind, *_] if type(kind) is not int or kind not in self._accepts:
                shown = kind if type(kind) is int else type(kind).__name__
                raise _malformed(f"unexpected message type {shown}")
            case [0, int(msgid), str(method), list(params)] if _is_msgid(msgid):
                return Request(msgid, method, params)
            case [1, int(msgid), error, result] if _is_msgid(msgid):
                return Response(msgid, error, result)
            case [2, str(method), list(params)]:
                return Notification(method, params)
            case _:
                assert isinstance(value, list), "the first byte was an array's"
                types = ", ".join(type(element).__name__ for element in value[:4])
                raise _malformed(f"got {len(value)} elements, [{types}]")  # no values: one may be a token


def _flat_map(pairs: list[tuple[object, object]]) -> dict[object, object]:
    """A map of scalars. Takes pairs, because a duplicate key would hide an earlier value. Leaves keys that
    are not strings to the scan, which accepts no extension types."""
    for key, value in pairs:
        if type(key) is not str or type(value) not in _SCALARS:
            raise ValueError("not flat")
    return dict(pairs)


def _unpack(frame: bytes | bytearray) -> object:
    """Decode one whole value. Accepts keys of any type: a wrong one is the method's EINVAL."""
    return msgpack.unpackb(frame, strict_map_key=False)


def _is_request(kind: object) -> bool:
    return type(kind) is int and kind == REQUEST  # False and 0.0 equal 0, too


def _is_msgid(value: int) -> bool:
    return not isinstance(value, bool) and 0 <= value < MSGID_LIMIT


def _malformed(why: str) -> ProtocolViolation:
    return ProtocolViolation(errno.EBADMSG, f"not a MessagePack-RPC message: {why}")
