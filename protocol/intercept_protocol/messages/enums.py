"""The words that a field may hold.

Owns them and what each means; must not know in which requests they stand.
"""

from __future__ import annotations

from enum import StrEnum


class RegionKind(StrEnum):
    """How the frames of a region may change."""

    MMIO = "mmio"
    MOVABLE = "movable"
    PINNED = "pinned"


class AddressSpaceKind(StrEnum):
    DECLARED = "declared"
    PROCESS = "process"


class HypervisorKind(StrEnum):
    SOFTWARE = "software"
    VMM = "vmm"


class Architecture(StrEnum):
    X86_64 = "x86_64"
    ARM64 = "arm64"

    __hash__ = str.__hash__
    """An enum's own hash runs in Python, once an intercept."""


class MmioGranularity(StrEnum):
    """How much of an MMIO region one first touch maps."""

    VMA = "vma"
    PAGE = "page"


class Remap(StrEnum):
    """What the software hypervisor does when an accessible gfn is mapped again."""

    REPLACE = "replace"
    ERROR = "error"
