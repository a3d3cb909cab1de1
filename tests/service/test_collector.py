"""A pass of the cyclic garbage collector stops all partitions, so it does not track numerous objects."""

from __future__ import annotations

import gc

import pytest

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access
from interceptd.address_space.declared import Vma
from interceptd.memory.region import KindOrigin, Region
from interceptd.pages.mapping import HOST_BACKING, Extent, Frame, Mapping

UADDRS = UaddrRange(start=7, end=9)
FRAME = Frame(HOST_BACKING, 70)


@pytest.mark.parametrize(
    "kept",
    [
        GfnRange(start=1, end=3),
        UADDRS,
        FRAME,
        Extent(UADDRS, FRAME, Access.READ, io=False),
        Mapping(1, 3, FRAME, 7, Access.READ),
        Mapping(1, 3, FRAME, 7, Access.READ).slice(2, 3),
        Region(GfnRange(start=1, end=3), UADDRS, RegionKind.MMIO, KindOrigin.STATED, Access.READ),
        Vma(7, 9, 70, Access.READ, io=False),
    ],
    ids=lambda kept: type(kept).__name__,
)
def test_numerous_objects_of_a_partition_are_untracked_by_the_garbage_collector(kept: object) -> None:
    assert not gc.is_tracked(kept)
