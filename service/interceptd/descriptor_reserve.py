"""The descriptors that VMMs cannot take: for operators, scrapes, a reload and the check of a successor.

Owns how many these are. The kernel gives out the lowest number that is free (open(2)): the number of a new
descriptor says how many are taken, and nothing is counted. Must not know who asks.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import Final

MOST: Final = 64
"""32 operators, 8 scrapes, and what these and a successor's check open for a moment."""
PART: Final = 4
"""At most one of so many is reserved."""


def kept_from_newcomers(descriptor: int) -> bool:
    """Whether a new VMM's descriptor with this number is one too many."""
    limit = _limit()
    return descriptor >= limit - _reserved(limit)


def kept_from_partitions(descriptor: int) -> bool:
    """The same for a partition that exists, which may take half of the reserve: its faults need threads."""
    limit = _limit()
    return descriptor >= limit - _reserved(limit) // 2


def is_used_up() -> bool:
    """Whether the next descriptor would be kept from newcomers."""
    try:
        probe = os.eventfd(0, os.EFD_CLOEXEC)
    except OSError:
        return True
    os.close(probe)
    return kept_from_newcomers(probe)


def _limit() -> int:
    """The soft limit, which may change at any time (prlimit(2))."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _reserved(limit: int) -> int:
    return min(MOST, limit // PART)
