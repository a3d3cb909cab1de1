"""A VMM made of raw connections: the one that the conformance suite has, for the other tests.

Owns nothing; `conformance.guests` does.
"""

from __future__ import annotations

from conformance.guests import (
    GFN,
    MODEL,
    PAGE,
    PAGES,
    PATIENT,
    PFN,
    UADDR,
    WHOLE_MEMORY,
    RawVmm,
    region,
    vma,
)

__all__ = [
    "GFN",
    "MODEL",
    "PAGE",
    "PAGES",
    "PATIENT",
    "PFN",
    "UADDR",
    "WHOLE_MEMORY",
    "RawVmm",
    "region",
    "vma",
]
