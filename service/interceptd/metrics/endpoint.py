"""The metrics listener: /metrics for Prometheus, /healthz for probes.

Owns the pages, and the tasks of the listener. Must not know what is observed, nor HTTP's syntax.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from itertools import chain

import structlog
import trio
from prometheus_client import Metric, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from interceptd.connections.accept import Shortage, accept_forever
from interceptd.connections.listen_address import ListenAddress
from interceptd.log_share import LogShare, charge_lines_to
from interceptd.metrics.families import families
from interceptd.metrics.http import Page, Responder
from interceptd.metrics.loop_lag import LoopLag
from interceptd.metrics.observing import Observer
from interceptd.partition.registry import PartitionRegistry
from interceptd.scheduling.step_monitor import StepMonitor
from interceptd.sessions.dispatcher import Dispatcher
from interceptd.systemd.notify import ServiceManager

log = structlog.get_logger()


class MetricsEndpoint:
    """The metrics of one daemon, which passes in its parts."""

    def __init__(
        self,
        partitions: PartitionRegistry,
        dispatcher: Dispatcher,
        manager: ServiceManager,
        monitor: StepMonitor,
        shortage: Shortage,
    ) -> None:
        self._shortage = shortage
        self._partitions = partitions
        self.scrapes = 0
        """How often the metrics were fetched; /healthz does not count."""
        self._lag = LoopLag()
        self._process = ProcessCollector(registry=None)
        self._responder = Responder({"/metrics": self._metrics, "/healthz": self._healthz})
        self._observer = Observer(
            partitions, dispatcher, manager, monitor, self._lag, self._responder.requests
        )

    async def run(self, listener: socket.socket, address: ListenAddress) -> None:
        """Serve, and measure the event loop's lag, until cancelled. A failing scrape harms nothing else."""
        log.info("metrics_served", listen=str(address), local=address.local)
        charge_lines_to(LogShare())  # a scraper has no uid that we know
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._lag.run)
            await accept_forever(listener, self._serve, nursery, self._shortage)

    async def _serve(self, accepted: socket.socket) -> None:
        """Answer one scraper or probe."""
        async with trio.SocketStream(trio.socket.from_stdlib_socket(accepted)) as stream:
            await self._responder.serve(stream)

    async def _metrics(self) -> Page:
        """Encoded family by family with other tasks in between, so that a scrape does not delay VPs."""
        self.scrapes += 1
        seen = await self._observer.observe()
        try:
            process = await trio.to_thread.run_sync(_collected, self._process)
        except RuntimeError:  # the system refuses a thread
            process = []
        text = []
        for family in chain(families(seen), process):
            text.append(generate_latest(_SingleFamily(family)))
            await trio.lowlevel.checkpoint()
        return Page(200, b"".join(text), CONTENT_TYPE_PLAIN_0_0_4)

    async def _healthz(self) -> Page:
        """An answer shows health: it comes from the event loop that answers intercepts."""
        return Page(503, b"draining\n") if self._partitions.closed else Page(200, b"serving\n")


class _SingleFamily(Collector):
    """One family as a collector, which is what the encoder takes."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return [self._family]


def _collected(collector: Collector) -> list[Metric]:
    """Runs in a worker thread: counting the descriptors of the process may take long."""
    return list(collector.collect())
