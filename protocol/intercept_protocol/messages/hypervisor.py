"""The daemon's requests to a VMM that is its own hypervisor, which the VMM answers.

Owns those requests; must not know how one is carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .base import U32, U64, Call


class MapGpa(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "map_gpa"
    REPLY: ClassVar[object] = None

    start_gfn: U64
    page_count: U64
    start_uaddr: U64
    start_pfn: U64 | None = None
    access: U32


class UnmapGpa(Call[None], frozen=True, kw_only=True, forbid_unknown_fields=True):
    METHOD: ClassVar[str] = "unmap_gpa"
    REPLY: ClassVar[object] = None

    start_gfn: U64
    page_count: U64


HypervisorCall = MapGpa | UnmapGpa
HYPERVISOR_METHODS: Mapping[str, type[HypervisorCall]] = {call.METHOD: call for call in (MapGpa, UnmapGpa)}
