"""What a scraper or a probe does, and what it reads.

Owns a blocking HTTP client on a Unix or TCP socket, and the samples of a page. Must not import the daemon.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from fakes.eventually import PATIENCE


def free_port() -> int:
    """A port of the loopback that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


class Answer(NamedTuple):
    status: int
    content_type: str | None
    body: str


class _UnixHttp(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self._path))


def ask(where: Path | tuple[str, int], path: str, method: str = "GET") -> Answer:
    http = _UnixHttp(where) if isinstance(where, Path) else HTTPConnection(*where, timeout=PATIENCE)
    try:
        http.request(method, path)
        response = http.getresponse()
        return Answer(response.status, response.getheader("Content-Type"), response.read().decode())
    finally:
        http.close()


class Scrape:
    """One page of metrics."""

    def __init__(self, page: str) -> None:
        self.families: dict[str, Metric] = {each.name: each for each in text_string_to_metric_families(page)}

    def value(self, sample: str, **labels: str) -> float:
        """Of the one sample that has just these labels."""
        [value] = [
            each.value
            for family in self.families.values()
            for each in family.samples
            if (each.name, each.labels) == (sample, labels)
        ]
        return value

    def by(self, sample: str, label: str) -> dict[str, float]:
        """All values of a sample, by one of its labels; those that are 0 left out."""
        return {
            each.labels[label]: each.value
            for family in self.families.values()
            for each in family.samples
            if each.name == sample and each.value
        }

    @property
    def samples(self) -> Iterable[str]:
        return {each.name for family in self.families.values() for each in family.samples}


def scrape(where: Path | tuple[str, int]) -> Scrape:
    answer = ask(where, "/metrics")
    assert answer.status == 200, answer
    return Scrape(answer.body)
