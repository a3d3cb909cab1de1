"""Finds the end of a MessagePack value in a stream of bytes.

Owns the boundary scan and its limits; must not know what the values mean. The scan reads only type bytes and
lengths (https://github.com/msgpack/msgpack/blob/master/spec.md, "Formats"), resumes where it stopped, and
fails as early as possible: at the header that announces a length over the limit.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from .errors import ProtocolViolation

MESSAGE_LIMIT = 64 * 1024
"""Bytes in one message. An intercept takes 273; the largest control message a few hundred."""


class MessageLimits(NamedTuple):
    """How many values and bytes a message may have, and the limits of section 10 that say so."""

    values: int
    name: str
    bytes: int = MESSAGE_LIMIT
    bytes_name: str = "message_bytes"


REQUEST_VALUES = MessageLimits(256, "request_values")
"""Of a request to the daemon, or an answer to it. The largest have 30; decoding 64 KiB of one-byte values
would delay every VP."""
SHORT_REQUESTS = MessageLimits(256, "request_values", 1280, "request_bytes")
"""Of a VP's or a notifier's request: four intercepts. The daemon keeps room for one of each connection."""
REQUEST_VALUES_VMM = MessageLimits(2048, "request_values_vmm")
"""Of a VMM's request. The largest has 128 regions."""
ANY_VALUES = MessageLimits(MESSAGE_LIMIT, "message_bytes")
"""Each value takes a byte."""
DEPTH_LIMIT = 16
"""Nesting levels. Requests need 3, inspection replies 6."""

_BLOBS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
"""Bin and str 8/16/32: the width of the length in bytes."""
_CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
"""Array and map 16/32: the width of the count in bytes, and the values per element."""


def _tokens() -> list[tuple[int, int] | None]:
    """For each type byte without a length field: the size of the token in bytes and its children."""
    tokens: list[tuple[int, int] | None] = [None] * 256
    for kind in (*range(0x80), *range(0xE0, 0x100), 0xC0, 0xC2, 0xC3):
        tokens[kind] = 1, 0  # fixint, nil, false, true
    for low in range(16):
        tokens[0x80 + low] = 1, 2 * low  # fixmap
        tokens[0x90 + low] = 1, low  # fixarray
    for low in range(32):
        tokens[0xA0 + low] = 1 + low, 0  # fixstr
    for width in (1, 2, 4, 8):
        tokens[0xCC + width.bit_length() - 1] = 1 + width, 0  # uint
        tokens[0xD0 + width.bit_length() - 1] = 1 + width, 0  # int
    tokens[0xCA], tokens[0xCB] = (5, 0), (9, 0)  # float
    return tokens


_TOKENS = _tokens()
_SCALAR_SIZES = bytes(token[0] if token is not None and not token[1] else 0 for token in _TOKENS)
"""The size of each token without children; 0 for the others."""


class FrameScanner:
    """Finds the end of the value that starts at offset 0 of a growing buffer. Use one scanner per value.

    `limit` bounds its bytes and the number of values, counting itself, keys and all levels.
    """

    __slots__ = ("_left", "_limit", "_missing", "_open", "_position", "_room", "missing_bytes")

    def __init__(self, limit: MessageLimits = ANY_VALUES) -> None:
        self._limit = limit
        self._position = 0
        self._room = limit.values - 1
        self._left = 1  # values still missing of the innermost level
        self._open: list[int] = []  # the same, of each level around it
        self._missing = 1  # the sum of all: each takes at least one byte
        self.missing_bytes = 1
        """How many more bytes the value has at least, as of the last scan that returned None."""

    def scan(self, buffer: bytes | bytearray) -> int | None:
        """The offset after the value, or None while bytes are missing. Raises `ProtocolViolation`, after
        which the scanner is of no more use.

        The loop works on local variables: a VMM's request has up to 2,048 values, and each takes 0.1 us.
        """
        position, room, missing, left = self._position, self._room, self._missing, self._left
        open_, sizes, available, most = self._open, _SCALAR_SIZES, len(buffer), self._limit.bytes
        announced = 0  # bytes of an incomplete token and its children, beyond the one that counts already
        unquestioned = 0  # scalars that end here or before can break no limit
        while left and position < available:
            size = sizes[kind := buffer[position]]
            if size and position + size <= unquestioned:
                position += size
            else:
                token = _TOKENS[kind] or _announced(buffer, position, kind)
                if token is None:
                    break
                size, children = token
                if position + size + children + missing - 1 > most:
                    raise ProtocolViolation(
                        errno.EMSGSIZE,
                        f"a message on this connection may have at most {most} bytes",
                        limit=self._limit.bytes_name,
                    )
                if children > room:
                    raise ProtocolViolation(
                        errno.EMSGSIZE,
                        f"a message on this connection may hold {self._limit.values} values",
                        limit=self._limit.name,
                    )
                if position + size > available:
                    announced = size + children - 1
                    break
                position += size
                if children:
                    if len(open_) == DEPTH_LIMIT:
                        raise ProtocolViolation(
                            errno.EBADMSG, f"nested more than {DEPTH_LIMIT} levels deep", limit="nesting"
                        )
                    room -= children
                    missing += children
                    open_.append(left - 1)
                    left = children + 1
                unquestioned = available if available + missing <= most else 0
            left -= 1
            missing -= 1
            while not left and open_:
                left = open_.pop()
        self._position, self._room, self._missing, self._left = position, room, missing, left
        self.missing_bytes = max(1, position + missing + announced - available)
        return None if left else position


def _announced(buffer: bytes | bytearray, position: int, kind: int) -> tuple[int, int] | None:
    """A token whose length or count follows its type byte; None until that has arrived."""
    if kind in _BLOBS:
        width, values = _BLOBS[kind], 0
    elif kind in _CONTAINERS:
        width, values = _CONTAINERS[kind]
    else:
        raise ProtocolViolation(errno.EBADMSG, f"byte {kind:#04x} does not start a value of this protocol")
    if position + 1 + width > len(buffer):
        return None
    announced = int.from_bytes(buffer[position + 1 : position + 1 + width])
    return (1 + width, announced * values) if values else (1 + width + announced, 0)
