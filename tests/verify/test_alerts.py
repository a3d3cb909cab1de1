"""Every alert fires by its real fault, and no alert by normal work; every panel shows something of it.

A real Prometheus scrapes real daemons. An hour of its rules is a minute here (`fakes.prometheus_process`).
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.alert_faults import FAULTS, Scene, again_and_again
from fakes.eventually import eventually
from fakes.kept_daemon import KeptDaemon
from fakes.prometheus_process import PROMETHEUS, PrometheusProcess, free_port
from fakes.surviving_vmm import Mode, SurvivingVmm
from fakes.witness import Witness

pytestmark = [
    pytest.mark.verify,
    pytest.mark.alone,
    pytest.mark.skipif(PROMETHEUS is None, reason="needs prometheus, of Debian's package"),
]

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = (DEPLOY / "prometheus" / "alerts.yml").read_text()
ALERTS = [rule["alert"] for group in yaml.safe_load(RULES)["groups"] for rule in group["rules"]]
PANELS = [
    panel
    for panel in json.loads((DEPLOY / "grafana" / "interceptd.json").read_text())["panels"]
    if "targets" in panel
]
PAIRS = [(alert, fault) for alert, faults in FAULTS.items() for fault in faults]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusProcess]:
    with PrometheusProcess(tmp_path_factory.mktemp("prometheus"), RULES) as process:
        yield process


@pytest.fixture
def scene(prometheus: PrometheusProcess, tmp_path: Path) -> Scene:
    port = free_port()
    return Scene(tmp_path, port, prometheus.watch(port), prometheus)


@pytest.mark.parametrize(
    ("alert", "fault"), PAIRS, ids=[f"{alert}-{fault.__name__}" for alert, fault in PAIRS]
)
def test_a_fault_fires_its_alert(scene: Scene, alert: str, fault: Callable[[Scene], Iterator[None]]) -> None:
    with closing(fault(scene)) as happening:  # type: ignore[type-var]
        next(happening)
        eventually(lambda: alert in scene.prometheus.firing(scene.instance), True)


def test_every_alert_has_a_fault() -> None:
    assert sorted(FAULTS) == sorted(ALERTS)
