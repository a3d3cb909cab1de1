"""What a restored guest has, and what it waits for, in words.

Owns the sentences; must not know where they are shown.
"""

from __future__ import annotations

from collections.abc import Iterator

from intercept_protocol.messages import RestoreState, RestoreStatistics
from intercept_protocol.text import visible

from . import silence, units
from .quantiles import quantiles


def state(now: RestoreStatistics) -> str:
    error = visible(now.error)
    match now.state:
        case RestoreState.SERVING:
            return f"serving pid {silence.pid(now.pid)}{f': {error}' if error else ''}"
        case RestoreState.COMPLETE:
            return "all pages are in; the VMM needs the daemon no more"
        case RestoreState.ENDED:
            return f"ended: {error}" if error else "the VM ended"
        case later:
            return visible(later)


def figures(now: RestoreStatistics) -> Iterator[str]:
    """What was brought in until now, for what, and how fast."""
    brought = brought_in(now)
    rate = f", {units.pages(brought * 1000 // now.age_ms)}/s so far" if now.age_ms else ""
    image, zero = units.pages(now.image_pages), units.pages(now.zero_pages)
    yield f"{units.pages(brought)} brought in of an image of {image}, {zero} of it zero{rate}"
    yield (
        f"{units.pages(now.demand_pages)} on demand, {units.pages(now.around_pages)} around, "
        f"{units.pages(now.prefetched_pages)} prefetched"
    )
    if now.faults:
        took = quantiles((), now.latency)
        measured = (
            f", P50 {units.latency(took.p50_ns)}, P99 {units.latency(took.p99_ns)}" if now.latency else ""
        )
        yield f"{units.of(now.faults, 'fault')}{measured}{_moments(now)}"
    if now.oldest_fault_ms:
        yield f"a fault has waited for {units.latency(now.oldest_fault_ms * 1e6)}{_for_what(now)}"
    if now.retries:
        yield f"tried again {units.of(now.retries, 'time')}: the VMM's memory was changing"
    if now.image_errors:
        yield f"{units.of(now.image_errors, 'read')} of the image failed"


def brought_in(now: RestoreStatistics) -> int:
    """Pages, some of them more than once: what the VMM gave back is in no more."""
    return now.demand_pages + now.around_pages + now.prefetched_pages


def _for_what(now: RestoreStatistics) -> str:
    return "" if now.error else ": the image has not answered yet, or the VMM's memory is changing"


def _moments(now: RestoreStatistics) -> str:
    if now.first_fault_ms is None or now.quiet_ms is None:
        return ""
    return f"; the first after {now.first_fault_ms} ms, the last after {now.quiet_ms} ms"
