"""The requests of a program that starts a VMM from a snapshot: the daemon serves the guest's memory.

Owns those requests and their replies; must not know how the VMM hands its memory over.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from .base import U64, AfterRestart, Call
from .statistics import Buckets

AROUND_PAGES = 64
"""256 KiB: beyond it a sweep gains little, and a single fault waits longer."""
AROUND_LIMIT = 512


class OnImageError(StrEnum):
    """What becomes of a guest that touches a page which cannot be read from the image."""

    HOLD = "hold"
    """It waits, and the daemon tries again."""
    KILL = "kill"
    """The daemon kills the VMM."""


class RestoreState(StrEnum):
    """How far a restored guest is."""

    WAITING = "waiting"
    """No VMM has handed over its memory yet."""
    SERVING = "serving"
    """Pages of the image are still missing in the guest's memory."""
    COMPLETE = "complete"
    """All pages are in: the VMM needs the daemon no more."""
    ENDED = "ended"
    """The VMM has ended, or never came; `error` says why, if that was not its end."""


class RestoreReply(msgspec.Struct, frozen=True, kw_only=True):
    """`image_pages`, of 4 KiB, is the size of the image."""

    partition_id: int
    image_pages: int


class Restore(Call[RestoreReply], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first byte carries, by SCM_RIGHTS, the memory image, a listening stream socket, with `prefetch` the
    list of pages, and with `trace` the memfd of a trace ring."""

    METHOD: ClassVar[str] = "restore"
    REPLY: ClassVar[object] = RestoreReply
    RESTART: ClassVar[AfterRestart] = "logged"

    around_pages: Annotated[int, Meta(ge=1, le=AROUND_LIMIT)] = AROUND_PAGES
    on_image_error: OnImageError = OnImageError.HOLD
    connect_timeout_ms: Annotated[int, Meta(ge=1, le=3_600_000)] = 60_000
    prefetch: bool = False
    trace: bool = False


class RestoreStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Of one restored guest. Counts of pages are of 4 KiB and since the hand-over, unless the daemon was
    restarted."""

    state: RestoreState
    image_pages: int
    pages_in: int
    """Pages of the guest that have their content, of the image or zero."""
    demand_pages: int
    """Brought in because the guest touched them."""
    around_pages: int
    """Brought in with a neighbour that the guest touched."""
    prefetched_pages: int
    zero_pages: int
    """Of those brought in: zero, because the VMM had given the page back."""
    removed_pages: int
    """What the VMM has given back, at any time."""
    faults: int
    retries: int
    """Times that the kernel refused because the VMM's memory was changing (EAGAIN)."""
    image_errors: int
    """Reads of the image that failed."""
    age_ms: int = 0
    """Since the hand-over."""
    first_fault_ms: int | None = None
    """From the hand-over to the first fault."""
    quiet_ms: int | None = None
    """From the hand-over to the last fault so far."""
    pid: int = 0
    """Of the VMM; 0 before the hand-over, or if it has none in the daemon's pid namespace."""
    error: str = ""
    """Why it ended or waits; empty if nothing is wrong."""
    latency: Buckets = ()
    """Of its faults."""


class RestoreProgress(Call[RestoreStatistics], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "restore_progress"
    REPLY: ClassVar[object] = RestoreStatistics
    RESTART: ClassVar[AfterRestart] = "repeatable"

    partition_id: U64
