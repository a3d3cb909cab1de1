"""Converts an observation to Prometheus' metrics: names, types, units and labels.

Owns the names, on which alerts and dashboards rely; `deploy/prometheus/METRICS.md` explains each. Label
values come from our enums and from the names of errors that we send, so no client can add a series; figures
of one partition are left to the operator's methods. Pure; must not know where the figures come from.
"""

from __future__ import annotations

import errno
import platform
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TypeVar

from msgspec.structs import asdict
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from intercept_protocol.messages import MemoryWatch, RestoreState
from intercept_protocol.outcomes import Answer
from interceptd import __version__
from interceptd.connections.refusals import METHODS, UNKNOWN
from interceptd.metrics.observing import Observation
from interceptd.partition.restored_guest import Ending
from interceptd.sessions.handshake import LEFT, REFUSAL_NUMBERS
from interceptd.telemetry.counters import Source
from interceptd.telemetry.histogram import BOUNDARIES_NS, LatencyHistogram

_NO_REFUSALS = {errno.errorcode[number]: 0 for number in REFUSAL_NUMBERS} | {LEFT: 0}
"""Every series exists from the start: Prometheus sees no increase in one that begins with its first count."""
_LIMITED = [(method, errno.errorcode[errno.ENOSPC]) for method in (*METHODS, UNKNOWN)]
"""For the same reason those that an alert asks for; the others are too many."""
_UNENDED = (RestoreState.WAITING, RestoreState.SERVING, RestoreState.COMPLETE)
Labels = TypeVar("Labels", bound=tuple[str, ...])
_BOUNDARIES = (*(repr(boundary / 1e9) for boundary in BOUNDARIES_NS), "+Inf")
"""`le` in seconds. A bucket counts durations below its bound, in whole microseconds."""


def families(seen: Observation) -> Iterator[Metric]:
    """Every metric except those of the process."""
    yield _labelled_gauge(
        "build_info", "Always 1.", {(__version__, platform.python_version()): 1}, "version", "python"
    )
    yield from _partitions(seen)
    yield from _intercepts(seen)
    yield from _invalidations(seen)
    yield from _hypervisor(seen)
    yield from _restores(seen)
    yield from _connections(seen)
    yield from _event_loop(seen)


def _partitions(seen: Observation) -> Iterator[Metric]:
    gauges = seen.gauges
    yield _gauge("partitions", "Current partitions.", seen.partitions)
    watches = {(watch.value,): gauges.watches[watch] for watch in MemoryWatch}
    yield _labelled_gauge(
        "watched_partitions", "Current partitions, by how their memory is watched.", watches, "watch"
    )
    yield _counter("partitions_created", "Partitions created.", seen.partitions_created)
    yield _counter(
        "partitions_lost",
        "Partitions that ended because a mapping could not be revoked.",
        seen.partitions_lost,
    )
    results = {(result,): count for result, count in seen.recoveries.items()}
    yield _labelled_counter(
        "recoveries", "Partitions that a predecessor left, by what became of them.", results, "result"
    )
    yield _gauge("virtual_processors", "Attached VPs.", gauges.vps)
    yield _gauge("regions", "Regions of all partitions.", gauges.regions)
    yield _gauge("vmas", "VMAs declared by VMMs.", gauges.vmas)
    yield _gauge("memory_budget_bytes", "Memory that the daemon may use.", seen.memory_budget)
    yield _gauge("memory_estimated_bytes", "Memory that it uses, estimated.", seen.memory_estimated)


def _intercepts(seen: Observation) -> Iterator[Metric]:
    answers = {(answer.outcome.value, answer.reason): seen.totals.answers[answer] for answer in Answer}
    yield _labelled_counter("intercepts", "Answered intercepts.", answers, "outcome", "reason")
    yield _histogram(
        "intercept_duration",
        "Time from an intercept's message to its answer.",
        {("no",): seen.totals.intercepts.at_once, ("yes",): seen.totals.intercepts.waited},
        "waited",
    )
    yield _histogram(
        "intercept_stage_duration",
        "Stages of the intercepts that the first look-up did not decide.",
        {(stage,): taken for stage, taken in asdict(seen.totals.stages).items()},
        "stage",
    )
    yield _counter(
        "stale_attempts",
        "Attempts made stale by an invalidation before their commit.",
        seen.totals.stale_attempts,
    )
    yield _gauge(
        "worker_threads_busy", "Threads querying the kernel about a VMM's memory.", seen.gauges.busy_workers
    )


def _invalidations(seen: Observation) -> Iterator[Metric]:
    by_source = {(source.value,): seen.totals.invalidations[source] for source in Source}
    yield _labelled_counter("invalidations", "Invalidations, by source.", by_source, "source")
    yield _histogram(
        "invalidation_pass_duration",
        "Time from the oldest invalidation of a pass until all of its memory is out of the guest's reach.",
        {(): seen.totals.passes},
    )
    yield _gauge("open_invalidations", "Invalidations between begin and end.", seen.gauges.open_invalidations)


def _hypervisor(seen: Observation) -> Iterator[Metric]:
    totals, gauges = seen.totals, seen.gauges
    pages = {("some",): gauges.mapped_gfns, ("none",): gauges.no_access_gfns}
    yield _labelled_gauge("slat_pages", "Pages in the second-level tables.", pages, "access")
    yield _gauge("slat_extents", "Extents in the second-level tables.", gauges.slat_extents)
    calls = {("map",): totals.map_calls, ("unmap",): totals.unmap_calls}
    yield _labelled_counter(
        "hypercalls", "Hypercalls of the software hypervisor, and requests to VMMs.", calls, "call"
    )
    yield _histogram(
        "hypervisor_call_duration",
        "Duration of a call of the hypervisor port, which may take many hypercalls.",
        {(call,): taken for call, taken in asdict(totals.port_calls).items()},
        "call",
    )
    yield _counter(
        "split_large_pages",
        "Maps of a part of a 2 MiB page that could have been mapped whole.",
        totals.split_large_pages,
    )
    yield _counter("deposits", "Deposits of pages for second-level tables.", totals.deposits)


def _restores(seen: Observation) -> Iterator[Metric]:
    counts = seen.totals.restore
    states = {(state.value,): seen.restores[state] for state in _UNENDED}
    yield _labelled_gauge("restores", "Restores that go on, by state.", states, "state")
    results = {(ending.value,): seen.restore_endings[ending] for ending in Ending}
    yield _labelled_counter(
        "restores_ended", "Restores that have ended, by what became of them.", results, "result"
    )
    pages = {
        ("demand",): counts.demand_pages,
        ("around",): counts.around_pages,
        ("prefetch",): counts.prefetched_pages,
    }
    yield _labelled_counter(
        "restore_pages", "Pages of restored guests brought in, by what for.", pages, "cause"
    )
    yield _counter("restore_zero_pages", "Of those, pages that are zero.", counts.zero_pages)
    yield _histogram(
        "restore_fault_duration",
        "Time from the read of a restored guest's fault until its page is in.",
        {(): counts.faults},
    )
    yield _gauge(
        "restore_oldest_fault_seconds",
        "Time that a restored guest's fault has waited; the longest.",
        seen.gauges.oldest_fault_ms / 1000,
    )
    yield _counter(
        "restore_retries", "Refusals because a VMM's memory was changing (EAGAIN).", counts.retries
    )
    yield _counter("restore_image_errors", "Reads of images that failed.", counts.image_errors)
    yield _histogram(
        "restore_first_fault", "Time from a hand-over to the first fault.", {(): counts.first_fault}
    )
    yield _histogram(
        "restore_quiet",
        "Time from a hand-over to the last fault, of guests that have no more.",
        {(): counts.quiet},
    )


def _connections(seen: Observation) -> Iterator[Metric]:
    roles = {(role,): count for role, count in seen.connections.items()}
    yield _labelled_gauge("connections", "Connections, by role.", roles, "role")
    refusals = {(reason,): count for reason, count in (_NO_REFUSALS | dict(seen.refusals)).items()}
    yield _labelled_counter("connections_refused", "Rejected connections.", refusals, "reason")
    refused = dict.fromkeys(_LIMITED, 0) | dict(seen.refused_requests)
    yield _labelled_counter(
        "requests_refused", "Requests answered with an error.", refused, "method", "error"
    )
    ended = {(result,): count for result, count in seen.requests.items()}
    yield _labelled_counter(
        "metrics_requests", "Requests to this listener, without this one.", ended, "result"
    )


def _event_loop(seen: Observation) -> Iterator[Metric]:
    yield _histogram("event_loop_lag", "Delay between a task's due time and its run.", {(): seen.lag})
    yield _gauge("event_loop_lag_max_seconds", "Longest lag since the start.", seen.longest_lag_ns / 1e9)
    tasks = {(task,): count for task, count in seen.long_steps.items()}
    yield _labelled_counter(
        "long_steps", "Steps of the event loop that took more than 5 ms.", {("any",): 0} | tasks, "task"
    )
    yield _gauge("tasks", "Tasks of the event loop.", seen.tasks)
    yield _gauge("draining", "1 while the daemon drains, else 0.", int(seen.draining))
    yield _gauge(
        "watchdog_period_seconds", "WatchdogSec of the unit; 0 without a watchdog.", seen.watchdog_period
    )
    yield _counter(
        "watchdog_notifications",
        "Watchdog notifications sent to the service manager.",
        seen.watchdog_notifications,
    )


# ------------------------------------------------ one family each


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"interceptd_{name}", meaning, value)


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(f"interceptd_{name}", meaning, value)


def _labelled_gauge(name: str, meaning: str, values: Mapping[Labels, float], *labels: str) -> Metric:
    family = GaugeMetricFamily(f"interceptd_{name}", meaning, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _labelled_counter(name: str, meaning: str, values: Mapping[Labels, float], *labels: str) -> Metric:
    family = CounterMetricFamily(f"interceptd_{name}", meaning, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _histogram(name: str, meaning: str, values: Mapping[Labels, LatencyHistogram], *labels: str) -> Metric:
    """In seconds, with cumulative buckets."""
    family = HistogramMetricFamily(f"interceptd_{name}_seconds", meaning, labels=labels)
    for key, histogram in values.items():
        up_to = accumulate(histogram.buckets)
        family.add_metric(key, list(zip(_BOUNDARIES, up_to, strict=True)), histogram.total_ns / 1e9)
    return family
