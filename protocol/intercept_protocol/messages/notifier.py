"""A notifier's requests: they announce ranges whose frames are going or gone, and kick VPs.

Owns those requests; must not know how one is carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .base import U64, AfterRestart, Call
from .vmm import Kick


class InvalidateBegin(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "invalidate_begin"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "logged"

    start_uaddr: U64
    length: U64


class InvalidateEnd(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "invalidate_end"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "logged"

    start_uaddr: U64
    length: U64


class Invalidate(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "invalidate"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "repeatable"

    start_uaddr: U64
    length: U64


NotifierCall = InvalidateBegin | InvalidateEnd | Invalidate | Kick
NOTIFIER_METHODS: Mapping[str, type[NotifierCall]] = {
    call.METHOD: call for call in (InvalidateBegin, InvalidateEnd, Invalidate, Kick)
}
