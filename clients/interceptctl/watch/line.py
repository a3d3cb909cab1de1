"""One event as a human-readable line.

Owns the wording; must not know where the line goes. `--json` has every field of an event.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Final

from intercept_protocol import events
from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.events import AnyFact, Event
from intercept_protocol.outcomes import Access
from intercept_protocol.text import visible
from interceptctl import silence, units

RECONNECTED: Final = "reconnected"
_ACCESSES = {int(Access.READ): "r", int(Access.WRITE): "w", int(Access.EXECUTE): "x"}


def line(event: Event) -> str:
    """Time, partition, event name and details; 80 columns except with regions, names and errors."""
    where = "-" if event.partition_id is None else str(event.partition_id)
    return _line(event.time_ms, where, event.fact.event_name, visible(particulars(event.fact)))


def reconnected(time_ms: int, *, as_json: bool) -> str:
    """The line between the events of two connections. It has the form of an event, and none has its name."""
    if as_json:
        return json.dumps({"event": RECONNECTED, "time_ms": time_ms})
    return _line(time_ms, "-", RECONNECTED, "events before this may be missing")


def _line(time_ms: int, where: str, name: str, text: str) -> str:
    at = datetime.fromtimestamp(time_ms / 1000)
    return f"{at:%H:%M:%S}.{time_ms % 1000:03} {where:>3} {name:<18} {text}".rstrip()


def particulars(fact: AnyFact) -> str:  # noqa: PLR0912  # one case per event
    match fact:
        case events.PartitionCreated():
            return f"pid {silence.pid(fact.pid)} {fact.address_space} {fact.hypervisor} {fact.name}"
        case events.PartitionEnded():
            return units.of(fact.intercepts, "intercept")
        case (
            events.PartitionLost()
            | events.RestoreNotClaimed()
            | events.ImageFailed()
            | events.GuestKilled()
            | events.GuestLeftFrozen()
        ):
            return fact.error
        case events.PartitionRecovered():
            kept = (fact.regions, "region"), (fact.mappings, "mapping"), (fact.connections, "connection")
            return ", ".join(units.of(number, noun) for number, noun in kept)
        case events.VpAttached():
            return f"vp {fact.vp_index}"
        case events.VpDetached():
            return f"vp {fact.vp_index} {units.of(fact.intercepts, 'intercept')}"
        case events.RegionAdded():
            rights = f"r{'w' if fact.writable else '-'}{'x' if fact.executable else '-'}"
            return f"{_region(fact)} {fact.kind} {rights}"
        case events.RegionFact():
            return _region(fact)
        case events.InvalidationFact():
            return f"{units.span(fact.start_uaddr >> PAGE_SHIFT, fact.page_count)} {fact.source}"
        case events.InterceptAnswered():
            return f"vp {fact.vp_index} {_touched(fact)}{fact.outcome} {fact.reason}"
        case events.PolicySet():
            return f"mmio_granularity {fact.mmio_granularity}"
        case events.RestoreBegun():
            image = units.pages(fact.image_pages)
            return f"uid {fact.uid} {image} waits {units.duration(fact.timeout_ms)} {fact.name}"
        case events.RestoreComplete():
            return units.pages(fact.pages_in)
        case events.RefusalFact():
            return f"uid {fact.uid} pid {silence.pid(fact.pid)} {fact.error}"
        case events.DrainStarted():
            return f"{units.of(fact.partitions, 'partition')}, {fact.timeout_ms:,} ms"
        case events.DaemonRestarted():
            return f"{units.of(fact.partitions, 'partition')}, {units.of(fact.connections, 'connection')}"
        case events.EventsDropped():
            return f"{units.of(fact.count, 'event')} dropped"


def _region(fact: events.RegionFact) -> str:
    """Where the guest sees it, and where it starts in the VMM."""
    return f"{units.span(fact.start_gfn, fact.page_count)} at {fact.start_uaddr:#x}"


def _touched(fact: events.InterceptAnswered) -> str:
    if fact.gfn is None or fact.access is None:
        return ""
    return f"{_ACCESSES.get(fact.access, str(fact.access))} {units.address(fact.gfn)} "
