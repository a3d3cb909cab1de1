"""The enumerations of the wire.

Owns their values; must not know the requests that use them.
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
    """An enum's own hash is slow Python code, on the hot path."""


class MmioGranularity(StrEnum):
    """How much of an MMIO region a first touch maps."""

    VMA = "vma"
    PAGE = "page"


class Remap(StrEnum):
    """What the software hypervisor does when an accessible gfn is mapped again."""

    REPLACE = "replace"
    ERROR = "error"
