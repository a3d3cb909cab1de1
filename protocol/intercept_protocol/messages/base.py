"""What every request of the wire is: a map of named fields, its method, and what a successful answer holds.

Owns that and the types of fields; must not know any one request. Integers are u64 on the wire, so only their
sign is checked; what a value may be in context (overlap, limits) is the service's to say.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Generic, TypeVar

import msgspec
from msgspec import Meta

U64 = Annotated[int, Meta(ge=0)]
"""MessagePack has nothing above 2^64 - 1, so the upper bound needs no check."""
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Token = Annotated[bytes, Meta(min_length=16, max_length=16)]
Name = Annotated[str, Meta(max_length=64, pattern="^[^\x00-\x1f\x7f-\x9f]*$")]
"""No control characters: it is shown on terminals."""
Reply_co = TypeVar("Reply_co", covariant=True)


class Fields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """A map of named fields on the wire."""


class Call(Fields, Generic[Reply_co], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request; its type parameter is what a successful answer holds."""

    METHOD: ClassVar[str]
    REPLY: ClassVar[object]
