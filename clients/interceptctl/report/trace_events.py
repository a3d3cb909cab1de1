"""A history as a trace for ui.perfetto.dev.

Owns which tracks there are, and what is on them; must not know files. Slices of one track must not cross: one
that would goes to a further track of the same name, which the viewer shows with the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heappush, heapreplace
from itertools import count
from typing import BinaryIO, Final, NamedTuple

import numpy as np
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent
from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder

from intercept_protocol.outcomes import Access, spelled
from intercept_protocol.text import visible

from .history import STAGES, History

_SEQUENCE: Final = 1
"""One writer wrote all packets."""


class _Slice(NamedTuple):
    """From `since` to `until`, in ns; at one moment if they are the same."""

    since: int
    until: int
    name: str
    facts: dict[str, int | str]


def write_trace(history: History, out: BinaryIO) -> None:
    """Times are those of CLOCK_MONOTONIC."""
    writer = _Writer(history, out)
    found = history.intercepts
    for vp in np.unique(found.vp).tolist():
        writer.add(f"VP {vp}", _intercepts(history, np.nonzero(found.vp == vp)[0]))
    writer.add("region lock", _changes(history))
    writer.add("region lock: taking away", _passes(history))
    writer.add("invalidations", _invalidations(history))


def _intercepts(history: History, chosen: np.ndarray[tuple[int], np.dtype[np.intp]]) -> Iterator[_Slice]:
    found = history.intercepts
    columns = (found.number, found.time, found.answer, found.access, found.memory, found.gfn)
    stages = (found.stages[stage][chosen].tolist() for stage in STAGES)
    for (number, time, answer, access, memory, gfn), took in zip(
        zip(*(column[chosen].tolist() for column in columns), strict=True),
        zip(*stages, strict=True),
        strict=True,
    ):
        facts: dict[str, int | str] = {"record": number}
        if memory:
            facts |= {"gfn": f"{gfn:#x}", "access": spelled(Access(access))}
        facts |= {f"{stage} ns": ns for stage, ns in zip(STAGES[1:], took[1:], strict=True) if ns}
        yield _Slice(time - took[0], time, history.answer(answer), facts)


def _changes(history: History) -> Iterator[_Slice]:
    for number, time, start, page_count, access in history.changes:
        facts: dict[str, int | str] = {"record": number, "gfn": f"{start:#x}", "pages": page_count}
        if access:
            facts["access"] = spelled(access)
        yield _Slice(time, time, "map" if access else "unmap", facts)


def _passes(history: History) -> Iterator[_Slice]:
    for since, until, served in history.passes:
        yield _Slice(since, until, "invalidated until no longer reached", {"invalidations": served})


def _invalidations(history: History) -> Iterator[_Slice]:
    for number, since, until, source, start, page_count, gfns in history.invalidations:
        spans = ", ".join(f"{first:#x}-{end:#x}" for first, end in gfns)
        facts: dict[str, int | str] = {"record": number, "page": f"{start:#x}", "pages": page_count}
        yield _Slice(since, until, source, facts | {"gfns": spans or "of no region"})


class _Writer:
    def __init__(self, history: History, out: BinaryIO) -> None:
        header = history.header
        self._builder = StreamingTraceProtoBuilder(out)
        self._origin = max(0, header.monotonic_ns)
        self._numbers = count(1)
        self._root = self._track(None, f"partition {header.partition_id} {visible(header.name[:200])}")

    def add(self, name: str, slices: Iterable[_Slice]) -> None:
        """A track with these on it, or several."""
        tracks = [(-(2**63), self._track(self._root, name))]
        """With the time until which each is taken: the one that is free first comes first."""
        for each in sorted(slices, key=lambda each: each.since):
            taken_until, track = tracks[0]
            if taken_until <= each.since:
                heapreplace(tracks, (each.until, track))
            else:
                track = self._track(self._root, name)
                heappush(tracks, (each.until, track))
            self._slice(track, each)

    def _track(self, parent: int | None, name: str) -> int:
        packet = self._builder.create_packet()
        packet.track_descriptor.uuid = number = next(self._numbers)
        packet.track_descriptor.name = name
        if parent is not None:
            packet.track_descriptor.parent_uuid = parent
        self._builder.write_packet(packet)
        return number

    def _slice(self, track: int, each: _Slice) -> None:
        moment = each.since == each.until
        self._event(
            track, each.since, TrackEvent.TYPE_INSTANT if moment else TrackEvent.TYPE_SLICE_BEGIN, each
        )
        if not moment:
            self._event(track, each.until, TrackEvent.TYPE_SLICE_END, None)

    def _event(self, track: int, time: int, kind: int, each: _Slice | None) -> None:
        packet = self._builder.create_packet()
        packet.timestamp = min(max(0, self._origin + time), 2**64 - 1)
        packet.trusted_packet_sequence_id = _SEQUENCE
        event = packet.track_event
        event.track_uuid = track
        event.type = kind
        if each is not None:
            event.name = visible(each.name[:200])
            for name, fact in each.facts.items():
                annotation = event.debug_annotations.add()
                annotation.name = name
                if isinstance(fact, int):
                    annotation.uint_value = fact
                else:
                    annotation.string_value = fact
        self._builder.write_packet(packet)
