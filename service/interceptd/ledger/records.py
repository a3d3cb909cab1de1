"""The records of a ledger's log: what a successor must know.

Owns their encoding: MessagePack arrays whose first element is the kind. A later version may add elements at
the end, which this version skips, and kinds, which need another `LEDGER_FORMAT`. Must not know who writes a
record or what follows from it. All page numbers are of 4 KiB pages.
"""

from __future__ import annotations

from typing import Any

import msgspec

Fields = dict[str, Any]
"""A request or a reply, as on the wire."""


class _Record(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One thing that happened."""


class Opened(_Record, frozen=True, tag="opened"):
    """The VMM said hello; its connection has the VMM's inbox."""

    cookie: int
    """SO_COOKIE of the connection, by which a successor finds its descriptor."""
    name: str
    msgid: int


class Created(_Record, frozen=True, tag="created"):
    """The VMM's `create_partition` was carried out."""

    serial: int
    partition_id: int
    token: bytes
    request: Fields


class Joined(_Record, frozen=True, tag="joined"):
    """A connection joined, and the keeper has its descriptor. The answer to its hello may be owed."""

    inbox: int
    cookie: int
    role: str
    msgid: int
    vp_index: int = 0
    lists: bool = False


class Left(_Record, frozen=True, tag="left"):
    """The connection of that inbox ended, and with it the invalidations that it had begun."""

    inbox: int


class Done(_Record, frozen=True, tag="done"):
    """A request that changes something was carried out. Its answer may be owed."""

    inbox: int
    serial: int
    """`Inbox.serial` of the request."""
    method: str
    request: Fields
    reply: Fields | None


class Changing(_Record, frozen=True, tag="changing"):
    """The VMM's hypervisor is being asked to change these gfns, each (start, end)."""

    gfns: list[tuple[int, int]]


class Settled(_Record, frozen=True, tag="settled"):
    """The outcome of the last `Changing` is in the log."""


class Mapped(_Record, frozen=True, tag="mapped"):
    """These gfns were mapped, and replace what was there. Without backing they are NO_ACCESS."""

    start: int
    end: int
    uaddr_page: int
    access: int
    backing: str | None = None
    page: int = 0
    cached: bool = True


class Unmapped(_Record, frozen=True, tag="unmapped"):
    """These gfns were unmapped."""

    start: int
    end: int


class Gone(_Record, frozen=True, tag="gone"):
    """Memory went, and no request says so: the guest must lose it."""

    number: int
    """Counted from 1."""
    start_page: int
    end_page: int


class Served(_Record, frozen=True, tag="served"):
    """The guest has lost the memory of every `Gone` up to this number."""

    number: int


class Dangling(_Record, frozen=True, tag="dangling"):
    """Memory of this pinned region went: the region is never mapped again."""

    start_gfn: int


class Policy(_Record, frozen=True, tag="policy"):
    """The granularity of faults on device memory was changed."""

    mmio_granularity: str


# ------------------------------------------------ a guest whose memory comes from an image


class Restoring(_Record, frozen=True, tag="restoring"):
    """`restore` was asked for: the first record of a ledger that belongs to no connection."""

    uid: int
    """Who asked."""
    partition_id: int
    name: str
    image_pages: int
    request: Fields
    asked_by: tuple[int, int] | None
    """SO_COOKIE of the connection that asked, if it is kept, and `Inbox.serial` of the request. Its answer
    may be owed."""


class HandedOff(_Record, frozen=True, tag="handed off"):
    """A VMM handed its memory over, and the keeper has it: each region's address and size in bytes, offset in
    the image, and page size."""

    cookie: int
    """SO_COOKIE of the connection over which it came."""
    regions: list[tuple[int, int, int, int]]


# ------------------------------------------------ what a compaction makes of older records


class KeptRegion(_Record, frozen=True, tag="region"):
    start_gfn: int
    end_gfn: int
    uaddr_page: int
    kind: str
    inferred: bool
    access: int
    dangling: bool = False


class KeptVma(_Record, frozen=True, tag="vma"):
    start_page: int
    end_page: int
    start_pfn: int
    access: int
    io: bool


class KeptBegin(_Record, frozen=True, tag="begin"):
    """A connection has begun to invalidate a range `depth` times more than it has ended it."""

    inbox: int
    start_page: int
    end_page: int
    depth: int


class Attached(_Record, frozen=True, tag="attached"):
    """The VMM's memory is attached."""

    promised: bool


class Removed(_Record, frozen=True, tag="removed"):
    """A restored guest has given these pages of its VMM back, at any time."""

    start_page: int
    end_page: int


Record = (
    Opened | Created | Joined | Left | Done | Changing | Settled | Mapped | Unmapped | Gone | Served
    | Dangling | Policy | Restoring | HandedOff | KeptRegion | KeptVma | KeptBegin | Attached | Removed
)  # fmt: skip
encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Record).decode
