"""A fast path for one `intercept` request and its answer.

Owns the one byte layout of an intercept in MessagePack's shortest forms, which every library writes. Leaves
all other input to the general decoder: it rejects nothing, and accepts nothing that the general decoder would
reject. Must not know how an intercept is decided.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final

import msgpack

from .hv_message import FAULT_LAYOUTS, MESSAGE_SIZE, MemoryAccess, access_wanted
from .messages import INTERCEPT_METHOD, Architecture
from .outcomes import Answer

_HEAD: Final = b"\x94\x00"
"""An array of four whose first is 0: a request."""
_MIDDLE: Final = bytes([0xA0 | len(INTERCEPT_METHOD)]) + INTERCEPT_METHOD.encode() + b"\x91\xc5\x01\x00"
"""Between msgid and message: the method, an array of one, and a blob of 256 bytes."""
_MSGID_WIDTHS: Final = (*[1] * 0x80, *[0] * 0x4C, 2, 3, 5, *[0] * 0x31)
"""By its first byte, the size of a msgid in its shortest form: the number itself below 0x80, else the type
byte of a uint 8, 16 or 32 and the number. 0: not a msgid."""
_ANSWER_HEAD: Final = b"\x94\x01"
_ANSWER_TAILS: Final[dict[Answer, bytes]] = {
    answer: b"\xc0" + msgpack.packb(list(answer.value)) for answer in Answer
}
"""A nil error, and [outcome, reason]."""

InterceptCall = tuple[bytes, MemoryAccess | None]
"""The encoded msgid, which the answer repeats, and what the guest needs: None if it is not a memory fault. A
plain tuple, because creating a named one is slow."""


class InterceptCodec:
    """Recognises the intercepts of one architecture."""

    __slots__ = ("_layouts",)

    def __init__(self, architecture: Architecture) -> None:
        self._layouts: dict[int, Callable[[bytes], tuple[bytes, bytes, bytes, int, int, int]]] = {
            len(_HEAD) + width + len(_MIDDLE) + MESSAGE_SIZE: Struct(
                f"<{len(_HEAD)}s{width}s{len(_MIDDLE)}s{FAULT_LAYOUTS[architecture].removeprefix('<')}"
            ).unpack
            for width in set(_MSGID_WIDTHS) - {0}
        }

    def match(self, data: bytes) -> InterceptCall | None:
        """The call, if `data` is one whole `intercept` request and nothing else."""
        read = self._layouts.get(len(data))
        if read is None:
            return None
        head, msgid, middle, message_type, access_type, gpa = read(data)
        if middle != _MIDDLE or head != _HEAD or _MSGID_WIDTHS[msgid[0]] != len(msgid):
            return None
        return msgid, access_wanted(message_type, access_type, gpa)


def encode_answer(msgid: bytes, answer: Answer) -> bytes:
    """The response to a matched call."""
    return _ANSWER_HEAD + msgid + _ANSWER_TAILS[answer]
