"""The enumerations of the wire.

Owns their values; must not know the requests that use them.
"""

from __future__ import annotations

from enum import StrEnum


class RegionKind(StrEnum):
    """How the frames of a region may change."""

    MMIO = "mmio"
    """Device memory: mapped at the first touch, a VMA or a page at a time."""
    MOVABLE = "movable"
    """RAM that the host may move: mapped in windows, at the first touch."""
    PINNED = "pinned"
    """RAM that stays where it is: mapped when the region is added."""


class RequestedKind(StrEnum):
    """What a VMM asks a region to be: a `RegionKind`, or `AUTO`: the daemon reads it off the VMA."""

    AUTO = "auto"
    MMIO = "mmio"
    MOVABLE = "movable"
    PINNED = "pinned"


class VpSelection(StrEnum):
    """What stands in place of a vp_index."""

    ALL = "all"
    """Every VP of the partition."""


class AddressSpaceKind(StrEnum):
    """Where the daemon learns what is mapped in the VMM."""

    DECLARED = "declared"
    """The VMM declares its VMAs."""
    PROCESS = "process"
    """The VMM hands over descriptors of its own memory."""
    IMAGE = "image"
    """A file holds the guest's memory, until the VMM gives a page back. Only `restore` makes one."""


class MemoryWatch(StrEnum):
    """How the daemon learns that a VMM's memory changes."""

    DECLARED = "declared"
    """The VMM declares its VMAs, and with them each change."""
    UNATTACHED = "unattached"
    """The VMM has not handed over its memory yet: nothing of it is mapped."""
    USERFAULTFD = "userfaultfd"
    """The kernel reports changes."""
    PROMISED = "promised"
    """The VMM has no userfaultfd, and promises to announce each change."""
    NONE = "none"
    """Neither: nothing of it is mapped."""


class HypervisorKind(StrEnum):
    """Who maps pages for the guest."""

    SOFTWARE = "software"
    """A second-level table in the daemon."""
    VMM = "vmm"
    """The VMM itself, over a hypervisor connection."""
    USERFAULTFD = "userfaultfd"
    """The kernel of the VMM's host, which fills missing pages. Only `restore` makes one."""


class Architecture(StrEnum):
    """Of the guest: decides the layout of its intercept messages."""

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
