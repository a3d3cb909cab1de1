"""The requests of a program that starts a VMM from a snapshot: the daemon serves the guest's memory.

Owns those requests and their replies; must not know how the VMM hands its memory over.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from .base import U64, AfterRestart, Call
from .statistics import RestoreStatistics

AROUND_PAGES = 64
"""256 KiB: beyond it a sweep gains little, and a single fault waits longer."""
AROUND_LIMIT = 512


class OnImageError(StrEnum):
    """What becomes of a guest that touches a page which cannot be read from the image."""

    HOLD = "hold"
    """It waits, and the daemon tries again."""
    KILL = "kill"
    """The daemon kills the VMM."""


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


class RestoreProgress(Call[RestoreStatistics], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "restore_progress"
    REPLY: ClassVar[object] = RestoreStatistics
    RESTART: ClassVar[AfterRestart] = "repeatable"

    partition_id: U64
