"""A real Prometheus, for which time passes faster: its rules have their durations divided by `FASTER`.

Owns the process, its configuration and its data, in a directory of its own, and what can be asked of it. Must
not know what the rules say.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlencode

from fakes.eventually import PATIENCE, eventually
from fakes.scraper import free_port

PROMETHEUS: Final = shutil.which("prometheus")
FASTER: Final = 60
"""An hour of the rules is a minute of the clock."""
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION: Final = re.compile(r"\b(\d+)([smhd])\b")
CONFIGURATION: Final = """
global: {{scrape_interval: {interval}, scrape_timeout: {interval}, evaluation_interval: {interval}}}
rule_files: [rules.yml]
scrape_configs:
  - job_name: interceptd
    file_sd_configs: [{{files: [targets.json]}}]
"""


def faster(text: str) -> str:
    """A rule or an expression, with each duration divided."""
    return _DURATION.sub(lambda found: f"{int(found[1]) * _SECONDS[found[2]] * 1000 // FASTER}ms", text)


class PrometheusProcess:
    """Scrapes `watch`ed targets every 15 s of its own time."""

    def __init__(self, directory: Path, rules: str) -> None:
        self._directory = directory
        self._targets: list[str] = []
        (directory / "rules.yml").write_text(faster(rules))
        (directory / "prometheus.yml").write_text(CONFIGURATION.format(interval=faster("15s")))
        self._write_targets()
        self._port = free_port()
        with (directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    str(PROMETHEUS),
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                    f"--query.lookback-delta={faster('5m')}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Self:
        eventually(lambda: self._process.poll() is not None or self._is_ready(), True)
        assert self._process.poll() is None, (self._directory / "log").read_text()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)

    def watch(self, port: int) -> str:
        """Scrape it from now on; returns the instance's name."""
        self._targets.append(f"127.0.0.1:{port}")
        self._write_targets()
        return self._targets[-1]

    @contextmanager
    def between_scrapes(self) -> Iterator[None]:
        """What is done within the block takes no longer than from one scrape to the next."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def ask(self, expression: str) -> list[Any]:
        """The samples that an expression has now. Durations are those of the rules."""
        return self._result("query", query=faster(expression))

    def value(self, expression: str) -> float | None:
        """Of the one sample; None without one."""
        samples = self.ask(expression)
        assert len(samples) < 2, samples
        return float(samples[0]["value"][1]) if samples else None

    def firing(self, instance: str) -> set[str]:
        """The alerts that fire for it now."""
        return {
            sample["metric"]["alertname"]
            for sample in self.ask(f'ALERTS{{alertstate="firing", instance="{instance}"}}')
        }

    def fired(self, instance: str, during: str) -> set[str]:
        """The alerts that have fired for it within a duration."""
        expression = f'last_over_time(ALERTS{{alertstate="firing", instance="{instance}"}}[{during}])'
        return {sample["metric"]["alertname"] for sample in self.ask(expression)}

    # ------------------------------------------------ helpers

    def _is_ready(self) -> bool:
        try:
            return self._get("/-/ready")[0] == 200
        except OSError:
            return False

    def _write_targets(self) -> None:
        new = self._directory / "targets.new"
        new.write_text(json.dumps([{"targets": self._targets}]))
        new.rename(self._directory / "targets.json")

    def _result(self, question: str, **fields: str) -> list[Any]:
        status, body = self._get(f"/api/v1/{question}?{urlencode(fields)}")
        assert status == 200, body
        result: list[Any] = json.loads(body)["data"]["result"]
        return result

    def _get(self, path: str) -> tuple[int, str]:
        http = HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            http.request("GET", path)
            response = http.getresponse()
            return response.status, response.read().decode()
        finally:
            http.close()
