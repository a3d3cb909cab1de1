"""The events that the daemon sends to an operator who subscribed: facts, in the past tense.

Owns their names and fields, and the notification that carries one. An event that is also logged has the same
name in the log. Must not know who publishes a fact, or when.
"""

from __future__ import annotations

import errno
from enum import StrEnum
from typing import Final

import msgspec

from .errors import ProtocolViolation
from .text import shape_of

EVENT_METHOD: Final = "event"
"""The method of the notifications."""
ERROR_LENGTH: Final = 200
"""Characters of an error in a fact; the error may quote a peer, who may have sent 64 KiB."""


class EventName(StrEnum):
    """The events to subscribe to. `EVENTS_DROPPED` needs no subscription: every subscriber gets its own."""

    PARTITION_CREATED = "partition_created"
    PARTITION_ENDED = "partition_ended"
    PARTITION_LOST = "partition_lost"
    PARTITION_RECOVERED = "partition_recovered"
    VP_ATTACHED = "vp_attached"
    VP_DETACHED = "vp_detached"
    REGION_ADDED = "region_added"
    REGION_REMOVED = "region_removed"
    PINNED_REGION_DANGLING = "pinned_region_dangling"
    INVALIDATION_BEGUN = "invalidation_begun"
    INVALIDATION_ENDED = "invalidation_ended"
    RANGE_INVALIDATED = "range_invalidated"
    INTERCEPT_ANSWERED = "intercept_answered"
    POLICY_SET = "policy_set"
    RESTORE_BEGUN = "restore_begun"
    RESTORE_NOT_CLAIMED = "restore_not_claimed"
    RESTORE_COMPLETE = "restore_complete"
    HANDOFF_REFUSED = "handoff_refused"
    IMAGE_FAILED = "image_failed"
    GUEST_KILLED = "guest_killed"
    GUEST_LEFT_FROZEN = "guest_left_frozen"
    HELLO_REFUSED = "hello_refused"
    CONNECTION_REFUSED = "connection_refused"
    DRAIN_STARTED = "drain_started"
    DAEMON_RESTARTED = "daemon_restarted"


EVENTS_DROPPED: Final = "events_dropped"


class Reason(StrEnum):
    """The reasons of `outcomes.Answer`, as `subscribe` takes them."""

    MAPPED = "mapped"
    ALREADY_MAPPED = "already_mapped"
    NOT_MEMORY = "not_memory"
    NO_REGION = "no_region"
    PERMISSION = "permission"
    UNBACKED = "unbacked"
    INVALIDATING = "invalidating"
    CONTENDED = "contended"
    KICKED = "kicked"
    DRAINING = "draining"
    RESTARTED = "restarted"
    NO_PROGRESS = "no_progress"
    HYPERVISOR_ERROR = "hypervisor_error"


class Fact(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """The base of all facts; the tag is the name on the wire."""

    @property
    def event_name(self) -> str:
        return str(self.__struct_config__.tag)


class PartitionCreated(Fact, frozen=True, kw_only=True, tag="partition_created"):
    name: str
    uid: int
    pid: int
    address_space: str
    hypervisor: str


class PartitionEnded(Fact, frozen=True, kw_only=True, tag="partition_ended"):
    intercepts: int


class PartitionLost(Fact, frozen=True, kw_only=True, tag="partition_lost"):
    error: str


class PartitionRecovered(Fact, frozen=True, kw_only=True, tag="partition_recovered"):
    """It survived a restart of the daemon; with how much of it."""

    regions: int
    mappings: int
    connections: int


class VpAttached(Fact, frozen=True, kw_only=True, tag="vp_attached"):
    vp_index: int


class VpDetached(Fact, frozen=True, kw_only=True, tag="vp_detached"):
    vp_index: int
    intercepts: int


class RegionFact(Fact, frozen=True, kw_only=True):
    """A fact about one region."""

    start_gfn: int
    page_count: int
    start_uaddr: int


class RegionAdded(RegionFact, frozen=True, kw_only=True, tag="region_added"):
    kind: str
    writable: bool
    executable: bool


class RegionRemoved(RegionFact, frozen=True, kw_only=True, tag="region_removed"):
    """The guest cannot access it any more."""


class PinnedRegionDangling(RegionFact, frozen=True, kw_only=True, tag="pinned_region_dangling"):
    """An invalidation overlapped it, although its VMM had promised that it would not change."""


class InvalidationFact(Fact, frozen=True, kw_only=True):
    """The source of an invalidation, and its uaddrs."""

    source: str
    start_uaddr: int
    page_count: int


class InvalidationBegun(InvalidationFact, frozen=True, kw_only=True, tag="invalidation_begun"):
    """Requested; until the answer the guest may still access the range."""


class InvalidationEnded(InvalidationFact, frozen=True, kw_only=True, tag="invalidation_ended"):
    """Faults in the range no longer wait for it."""


class RangeInvalidated(InvalidationFact, frozen=True, kw_only=True, tag="range_invalidated"):
    """Begun and ended at once: the memory was already gone."""


class InterceptAnswered(Fact, frozen=True, kw_only=True, tag="intercept_answered"):
    """`access` is one of the bits 1, 2 and 4; it and `gfn` are None unless it was a memory intercept."""

    vp_index: int
    outcome: str
    reason: str
    gfn: int | None = None
    access: int | None = None


class PolicySet(Fact, frozen=True, kw_only=True, tag="policy_set"):
    mmio_granularity: str


class RestoreBegun(Fact, frozen=True, kw_only=True, tag="restore_begun"):
    """The daemon waits for a VMM. Once one has handed over, there is a `PartitionCreated`."""

    name: str
    uid: int
    image_pages: int
    timeout_ms: int


class RestoreNotClaimed(Fact, frozen=True, kw_only=True, tag="restore_not_claimed"):
    """No VMM has handed over in time, so there never was a partition."""

    error: str


class RestoreComplete(Fact, frozen=True, kw_only=True, tag="restore_complete"):
    """All pages are in, and the VMM needs the daemon no more."""

    pages_in: int


class ImageFailed(Fact, frozen=True, kw_only=True, tag="image_failed"):
    """A read of the image failed. The event is repeated at a pace for as long as reads fail."""

    error: str


class GuestKilled(Fact, frozen=True, kw_only=True, tag="guest_killed"):
    """The daemon has killed a VMM that it could not serve."""

    error: str


class GuestLeftFrozen(Fact, frozen=True, kw_only=True, tag="guest_left_frozen"):
    """The VMM lives and lacks pages, and nobody will bring them in."""

    error: str


class RefusalFact(Fact, frozen=True, kw_only=True):
    """The reason, and the peer's credentials from the kernel."""

    error: str
    uid: int
    pid: int


class HelloRefused(RefusalFact, frozen=True, kw_only=True, tag="hello_refused"):
    """The hello was answered with an error, and the connection closed."""


class ConnectionRefused(RefusalFact, frozen=True, kw_only=True, tag="connection_refused"):
    """The connection was closed with an error under msgid 0."""


class HandoffRefused(RefusalFact, frozen=True, kw_only=True, tag="handoff_refused"):
    """What a process handed over cannot be served. The restore waits for another."""


class DrainStarted(Fact, frozen=True, kw_only=True, tag="drain_started"):
    timeout_ms: int
    partitions: int


class DaemonRestarted(Fact, frozen=True, kw_only=True, tag="daemon_restarted"):
    """This daemon went on where another ended; with how many partitions, and connections of theirs."""

    partitions: int
    connections: int


class EventsDropped(Fact, frozen=True, kw_only=True, tag=EVENTS_DROPPED):
    """At this position, so many events did not fit into the subscriber's queue."""

    count: int


AnyFact = (
    PartitionCreated | PartitionEnded | PartitionLost | PartitionRecovered | VpAttached | VpDetached
    | RegionAdded | RegionRemoved | PinnedRegionDangling
    | InvalidationBegun | InvalidationEnded | RangeInvalidated | InterceptAnswered
    | PolicySet | RestoreBegun | RestoreNotClaimed | RestoreComplete | HandoffRefused | ImageFailed
    | GuestKilled | GuestLeftFrozen | HelloRefused | ConnectionRefused | DrainStarted | DaemonRestarted
    | EventsDropped
)  # fmt: skip
_NAMES: Final = frozenset(EventName) | {EVENTS_DROPPED}


class Event(msgspec.Struct, frozen=True):
    """A fact, its time by the daemon's clock, and its partition, if any."""

    time_ms: int
    fact: AnyFact
    partition_id: int | None = None

    def to_fields(self) -> dict[str, object]:
        """The map on the wire."""
        fields: dict[str, object] = msgspec.to_builtins(self.fact)
        where = {} if self.partition_id is None else {"partition_id": self.partition_id}
        known = {name: item for name, item in fields.items() if item is not None}
        return {"event": known.pop("event"), "time_ms": self.time_ms, **where, **known}


def decode_event(params: list[object]) -> Event | None:
    """The event in a notification's params; None for an event of a later version.

    Raises `ProtocolViolation` EPROTO for a malformed event.
    """
    match params:
        case [{"event": str(name), "time_ms": int(time_ms), **fields}]:
            if name not in _NAMES:
                return None
            partition_id = fields.pop("partition_id", None)
            try:
                fact: AnyFact = msgspec.convert({"event": name, **fields}, AnyFact)
            except msgspec.ValidationError as error:
                raise ProtocolViolation(errno.EPROTO, f"malformed event {name}: {error!s:.200}") from None
            if partition_id is None or isinstance(partition_id, int):
                return Event(time_ms, fact, partition_id)
    raise ProtocolViolation(errno.EPROTO, f"malformed event: {shape_of(params)}")
