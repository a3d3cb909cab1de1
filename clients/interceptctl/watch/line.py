"""One event as a human-readable line.

Owns the wording; must not know where the line goes. `--json` has every field of an event.
"""

from __future__ import annotations

from datetime import datetime

from intercept_protocol import events
from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.events import AnyFact, Event
from intercept_protocol.outcomes import Access
from intercept_protocol.text import visible
from interceptctl import units

_ACCESSES = {int(Access.READ): "r", int(Access.WRITE): "w", int(Access.EXECUTE): "x"}


def line(event: Event) -> str:
    """Time, partition, event name and details; 80 columns except for regions, names and errors."""
    at = datetime.fromtimestamp(event.time_ms / 1000)
    clock = f"{at:%H:%M:%S}.{event.time_ms % 1000:03}"
    where = "-" if event.partition_id is None else str(event.partition_id)
    return f"{clock} {where:>3} {event.fact.event_name:<18} {visible(particulars(event.fact))}".rstrip()


def particulars(fact: AnyFact) -> str:  # noqa: PLR0912  # one case per event
    match fact:
        case events.PartitionCreated():
            return f"pid {fact.pid} {fact.address_space} {fact.hypervisor} {fact.name}"
        case events.PartitionEnded():
            return units.of(fact.intercepts, "intercept")
        case events.PartitionLost():
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
        case events.RefusalFact():
            return f"uid {fact.uid} pid {fact.pid} {fact.error}"
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
