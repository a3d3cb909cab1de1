"""A VP of a model partition, over a real socket pair."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from fakes.model_partition import ModelPartition
from fakes.raw_peer import RawPeer
from intercept_protocol.messages import Architecture
from interceptd.config.schema import Limits
from interceptd.connections.connection import Connection
from interceptd.connections.hangup_watch import HangupWatch
from interceptd.connections.request_loop import report_and_close
from interceptd.connections.tenants import Tenants
from interceptd.partition.virtual_processor import VirtualProcessor


@dataclass
class ModelVp:
    """`processor` is the daemon's end, `peer` the VMM's; `ended` once the processor's task is over."""

    processor: VirtualProcessor
    peer: RawPeer
    ended: trio.Event = field(default_factory=trio.Event)


@asynccontextmanager
async def attached_vp(
    model: ModelPartition, architecture: Architecture = Architecture.X86_64
) -> AsyncIterator[ModelVp]:
    """The VP runs until the end of the context."""
    ours, theirs = socket.socketpair()
    watch = HangupWatch()
    connection = Connection(ours, Tenants(Limits), watch)
    connection.forbid_pipelining()
    processor = VirtualProcessor(
        0,
        connection,
        architecture=architecture,
        faults=model.faults,
        answers=model.partition.answers,
        event_bus=model.partition.event_bus,
    )
    vp = ModelVp(processor, RawPeer.of(theirs))

    async def live() -> None:
        try:
            with report_and_close(connection, model.partition.event_bus):
                await processor.run()
        finally:
            vp.ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        nursery.start_soon(live)
        try:
            yield vp
        finally:
            nursery.cancel_scope.cancel()
            vp.peer.close()  # no checkpoint here: it would lose the test's own exception
