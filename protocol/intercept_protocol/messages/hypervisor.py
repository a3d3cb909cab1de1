"""The daemon's requests to a VMM that is its own hypervisor, which the VMM answers.

Owns those requests; must not know how one is carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from msgspec import Meta

from .base import U32, U64, AfterRestart, Call

PIECES_LIMIT = 64
"""The most pieces in a list (Y-13)."""


class MapGpa(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    METHOD: ClassVar[str] = "map_gpa"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "repeatable"

    start_gfn: U64
    page_count: U64
    start_uaddr: U64
    start_pfn: U64 | None = None
    access: U32


class UnmapGpa(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "unmap_gpa"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "repeatable"

    start_gfn: U64
    page_count: U64


class MapGpas(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Several maps, in order."""

    METHOD: ClassVar[str] = "map_gpas"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "repeatable"

    pieces: Annotated[list[MapGpa], Meta(min_length=1, max_length=PIECES_LIMIT)]


class UnmapGpas(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Several unmaps, in order."""

    METHOD: ClassVar[str] = "unmap_gpas"
    REPLY: ClassVar[object] = None
    RESTART: ClassVar[AfterRestart] = "repeatable"

    pieces: Annotated[list[UnmapGpa], Meta(min_length=1, max_length=PIECES_LIMIT)]


HypervisorCall = MapGpa | UnmapGpa | MapGpas | UnmapGpas
HYPERVISOR_METHODS: Mapping[str, type[HypervisorCall]] = {
    call.METHOD: call for call in (MapGpa, UnmapGpa, MapGpas, UnmapGpas)
}
