"""The metrics listener: /metrics for Prometheus, /healthz for probes.

Owns the pages, and what runs while there is a listener. Must not know what is observed, nor HTTP's bytes.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable

import structlog
import trio
from prometheus_client import Metric, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from interceptd.connections.listen_address import Place
from interceptd.metrics.families import families
from interceptd.metrics.http import Page, Responder
from interceptd.metrics.loop_lag import LoopLag
from interceptd.metrics.observing import Observer
from interceptd.partition.registry import PartitionRegistry
from interceptd.sessions.dispatcher import Dispatcher
from interceptd.systemd.notify import ServiceManager

log = structlog.get_logger()


class MetricsEndpoint:
    """Of one daemon, whose parts these are."""

    def __init__(
        self, partitions: PartitionRegistry, dispatcher: Dispatcher, manager: ServiceManager
    ) -> None:
        self._partitions = partitions
        self._lag = LoopLag()
        self._process = ProcessCollector(registry=None)
        self._responder = Responder({"/metrics": self._metrics, "/healthz": self._healthz})
        self._observer = Observer(partitions, dispatcher, manager, self._lag, self._responder.requests)

    async def run(self, listener: socket.socket, place: Place) -> None:
        """Serve, and measure the event loop, until cancelled. A scrape that fails harms nothing else."""
        log.info("metrics_served", listen=str(place), local=place.local)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._lag.run)
            listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
            await trio.serve_listeners(self._responder.serve, listeners)

    async def _metrics(self) -> Page:
        """Written family by family, other tasks in between: all at once it would hold them up for 10 ms."""
        seen = await self._observer.observe()
        process = await trio.to_thread.run_sync(_collected, self._process)
        text = []
        for family in (*families(seen), *process):
            text.append(generate_latest(_One(family)))
            await trio.lowlevel.checkpoint()
        return Page(200, b"".join(text), CONTENT_TYPE_PLAIN_0_0_4)

    async def _healthz(self) -> Page:
        """That it is answered is the health: this is the loop that answers intercepts."""
        return Page(503, b"draining\n") if self._partitions.closed else Page(200, b"serving\n")


class _One(Collector):
    """One family, in the form that the encoder takes."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return [self._family]


def _collected(collector: Collector) -> list[Metric]:
    """For a worker thread: a process with very many descriptors takes a while to count them."""
    return list(collector.collect())
