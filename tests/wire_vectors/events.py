"""Examples of every event that a subscriber is sent."""

from __future__ import annotations

from intercept_protocol import rpc
from intercept_protocol.events import (
    EVENT_METHOD,
    AnyFact,
    ConnectionRefused,
    DaemonRestarted,
    DrainStarted,
    Event,
    EventsDropped,
    GuestKilled,
    GuestLeftFrozen,
    HandoffRefused,
    HelloRefused,
    ImageFailed,
    InterceptAnswered,
    InvalidationBegun,
    InvalidationEnded,
    PartitionCreated,
    PartitionEnded,
    PartitionLost,
    PartitionRecovered,
    PinnedRegionDangling,
    PolicySet,
    RangeInvalidated,
    RegionAdded,
    RegionRemoved,
    RestoreBegun,
    RestoreComplete,
    RestoreNotClaimed,
    VpAttached,
    VpDetached,
)
from wire_vectors.forms import EventVector

AT = 1_764_000_000_000
"""24 November 2025."""


def told() -> list[EventVector]:
    bar = {"start_gfn": 0xFEB00, "page_count": 16, "start_uaddr": 0x7F0000000000}
    range_ = {"start_uaddr": 0x7F0000000000, "page_count": 4}
    peer = {"uid": 1000, "pid": 4242}
    within: list[AnyFact] = [
        PartitionCreated(name="guest-a", address_space="declared", hypervisor="software", **peer),
        PartitionEnded(intercepts=3),
        PartitionLost(error="the hypervisor connection closed"),
        PartitionRecovered(regions=5, mappings=2, connections=4),
        VpAttached(vp_index=3),
        VpDetached(vp_index=3, intercepts=3),
        RegionAdded(**bar, kind="mmio", writable=True, executable=False),
        RegionRemoved(**bar),
        PinnedRegionDangling(**bar),
        InvalidationBegun(source="notifier", **range_),
        InvalidationEnded(source="notifier", **range_),
        InvalidationBegun(source="unmap_vma", **range_),
        RangeInvalidated(source="userfaultfd", **range_),
        RangeInvalidated(source="comparison", **range_),
        InterceptAnswered(vp_index=3, outcome="fail", reason="no_progress", gfn=0xFEB03, access=2),
        InterceptAnswered(vp_index=3, outcome="forward", reason="not_memory"),
        PolicySet(mmio_granularity="page"),
        RestoreBegun(name="guest-a", uid=1000, image_pages=1 << 15, timeout_ms=60_000),
        HandoffRefused(error="no descriptor came with it", **peer),
        RestoreNotClaimed(error="no VMM has handed over its memory within 60 s"),
        RestoreComplete(pages_in=1 << 15),
        ImageFailed(error="EIO: Input/output error"),
        GuestKilled(error="the image cannot be read: EIO: Input/output error"),
        GuestLeftFrozen(error="the daemon ended before all pages were in"),
    ]
    beside: list[AnyFact] = [
        HelloRefused(error="EACCES: no such partition, or it is not yours to join", **peer),
        ConnectionRefused(error="ETIMEDOUT: no hello within 5000 ms", **peer),
        DrainStarted(timeout_ms=5000, partitions=1),
        DaemonRestarted(partitions=2, connections=2**32),
        EventsDropped(count=2**32),
    ]
    events = [Event(AT, fact, 1) for fact in within] + [Event(AT, fact) for fact in beside]
    return [_vector(event) for event in events]


def _vector(event: Event) -> EventVector:
    fields = event.to_fields()
    return EventVector(event.fact.event_name, fields, rpc.encode_notification(EVENT_METHOD, [fields]).hex())
