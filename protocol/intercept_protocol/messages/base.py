"""The base of every request: a map of named fields, its method, and the type of a successful answer.

Owns these and the types of fields; must not know any single request. Integers are u64 on the wire, so only
their sign is checked here; the service checks values in context (overlap, limits).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

U64 = Annotated[int, Meta(ge=0)]
"""MessagePack has no integer above 2^64 - 1, so the upper bound needs no check."""
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Errno = Annotated[int, Meta(ge=1, le=4095)]
Token = Annotated[bytes, Meta(min_length=16, max_length=16)]
Name = Annotated[str, Meta(max_length=64, pattern="^[^\x00-\x1f\x7f-\x9f]*$")]
"""Without control characters: terminals show it."""
AfterRestart = Literal["logged", "repeatable"]
"""What a restarted daemon does with a request that was carried out, and perhaps not answered.

`logged`: it finds that in its log, and only answers. `repeatable`: it carries the request out again, because
that changes nothing more."""
Reply_co = TypeVar("Reply_co", covariant=True)


class Fields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """A map of named fields on the wire."""


class Call(Fields, Generic[Reply_co], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request; its type parameter is the type of a successful answer."""

    METHOD: ClassVar[str]
    REPLY: ClassVar[object]
    RESTART: ClassVar[AfterRestart]
