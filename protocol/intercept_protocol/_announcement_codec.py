"""A fast path for the requests that announce a change of memory, which a VMM's thread waits for.

Owns the one byte layout of each, with the fields in the order of the specification and numbers unsigned, as
every library writes them. Leaves all other input to the general decoder: it rejects nothing, and accepts
nothing that the general decoder would reject. Must not know how an announcement is carried out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from .messages import Invalidate, InvalidateBegin, InvalidateEnd

Announcement = InvalidateBegin | InvalidateEnd | Invalidate

_CALLS: Final[Mapping[bytes, type[Announcement]]] = {
    bytes([0xA0 | len(call.METHOD)]) + call.METHOD.encode(): call
    for call in (InvalidateBegin, InvalidateEnd, Invalidate)
}
"""By their methods, encoded."""
_UINT: Final = rb"[\x00-\x7f]|\xcc.|\xcd..|\xce.{4}"
"""Of up to 32 bits."""
_REQUEST: Final = re.compile(
    rb"\x94\x00(" + _UINT + rb")"
    rb"(" + b"|".join(map(re.escape, _CALLS)) + rb")"
    rb"\x91\x82\xabstart_uaddr(" + _UINT + rb"|\xcf.{8})"
    rb"\xa6length(" + _UINT + rb"|\xcf.{8})",
    re.DOTALL,
)
"""An array of four: 0 for a request, a msgid, the method, and an array of one map of two fields."""


class AnnouncementRequest(NamedTuple):
    """An `rpc.Request` whose call is decoded already."""

    msgid: int
    call: Announcement

    @property
    def method(self) -> str:
        return self.call.METHOD

    @property
    def params(self) -> list[object]:
        return [{"start_uaddr": self.call.start_uaddr, "length": self.call.length}]


def match(data: bytes) -> AnnouncementRequest | None:
    """The request, if `data` is one whole announcement and nothing else."""
    found = _REQUEST.fullmatch(data)
    if found is None:
        return None
    msgid, method, start_uaddr, length = found.groups()
    call = _CALLS[method](start_uaddr=_number(start_uaddr), length=_number(length))
    return AnnouncementRequest(_number(msgid), call)


def _number(encoded: bytes) -> int:
    """A positive fixint is its own byte; other forms begin with a type byte."""
    return encoded[0] if len(encoded) == 1 else int.from_bytes(encoded[1:], "big")
