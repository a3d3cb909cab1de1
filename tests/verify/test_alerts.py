"""Every alert fires by its real fault, and no alert by normal work; every panel shows something of it.

A real Prometheus scrapes real daemons. An hour of its rules is a minute here (`fakes.prometheus_process`).
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import yaml

from fakes.alert_faults import FAULTS, Scene, again_and_again
from fakes.doing import Doing
from fakes.eventually import PATIENCE, eventually
from fakes.kept_daemon import KeptDaemon
from fakes.prometheus_process import PROMETHEUS, PrometheusProcess
from fakes.raw_client import RawConnection
from fakes.restore_asker import PAGES, Asker
from fakes.restoring_vmm import RestoringVmm
from fakes.scraper import free_port
from fakes.surviving_vmm import Mode, SurvivingVmm

pytestmark = [
    pytest.mark.verify,
    pytest.mark.skipif(PROMETHEUS is None, reason="needs prometheus, of Debian's package"),
]

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = (DEPLOY / "prometheus" / "alerts.yml").read_text()
ALERTS = [rule["alert"] for group in yaml.safe_load(RULES)["groups"] for rule in group["rules"]]
HOUR_OF_SCRAPES = 240
LONG = 3 * PATIENCE
LIFE = 40
PAUSE = 0.05
"""Seconds."""
PACE = threading.Event()
"""Never set."""
PANELS = [
    panel
    for panel in json.loads((DEPLOY / "grafana" / "interceptd.json").read_text())["panels"]
    if "targets" in panel
]
TARGETS = {
    f"{panel['title']} {panel['id']} {target['refId']}": target["expr"]
    for panel in PANELS
    for target in panel["targets"]
}
WATCHDOG = "Draining, watchdog 34 B"
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
        eventually(lambda: alert in scene.prometheus.firing(scene.instance), True, patience=LONG)


@pytest.mark.alone
def test_an_hour_of_normal_work_fires_nothing_and_every_panel_shows_it(
    scene: Scene, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a planned restart. Beside it are an unused daemon, and a socket whose daemon has not started."""
    prometheus = scene.prometheus
    monkeypatch.setenv("WATCHDOG_USEC", "500000")  # 30 s
    never_started = prometheus.watch(free_port())
    idle_port = free_port()
    unused = Scene(tmp_path_factory.mktemp("idle"), idle_port, prometheus.watch(idle_port), prometheus)
    with unused.daemon(), KeptDaemon(scene.directory, config=scene.config) as kept:
        kept.wait_serving()
        with again_and_again(lambda: a_guests_life(kept.socket)):
            wait_scrapes(scene, HOUR_OF_SCRAPES // 2)
            with prometheus.between_scrapes():
                kept.signal_daemon(signal.SIGTERM)
                eventually(lambda: kept.count("metrics_served"), 2)
            with again_and_again(lambda: a_restored_guests_life(kept.socket, scene.directory)):
                wait_scrapes(scene, HOUR_OF_SCRAPES)
                eventually(lambda: shown(prometheus, scene.instance), dict.fromkeys(TARGETS, "numbers"))
            assert prometheus.value(filled(TARGETS[WATCHDOG], scene.instance)) == 1
            assert "no number" not in shown(prometheus, unused.instance).values()
        assert kept.count("partition_recovered") == 1
    assert [prometheus.fired(each.instance, "1h") for each in (scene, unused)] == [set(), set()]
    assert prometheus.value(f'max_over_time(up{{instance="{never_started}"}}[1h])') == 0
    assert prometheus.fired(never_started, "1h") == set()


def a_guests_life(path: Path) -> None:
    """From its VMM's start to its end, at a leisurely pace."""
    with SurvivingVmm(path, Mode.DECLARED_VMM) as vmm:
        region = vmm.add(vmm.new_region(20))
        for _ in range(LIFE):
            vmm.touch(region)
            with vmm.invalidation(region.uaddrs):
                waiting = Doing(partial(vmm.touch, region))
                PACE.wait(PAUSE)
            waiting.wait()


def a_restored_guests_life(path: Path, directory: Path) -> None:
    """From the request to its VMM's end, at a leisurely pace."""
    with RawConnection(path) as connection:
        asker = Asker(connection, directory)
        asker.restore()
        with RestoringVmm(asker.listener, [PAGES]) as vmm:
            for page in range(0, PAGES, PAGES // 8):
                assert vmm.ask("read", page, 1) == str(page)
                PACE.wait(PAUSE)


def wait_scrapes(scene: Scene, count: int) -> None:
    eventually(
        lambda: (
            (scene.prometheus.value(f'sum_over_time(up{{instance="{scene.instance}"}}[2h])') or 0) >= count
        ),
        True,
        patience=LONG,
    )


def filled(expression: str, instance: str) -> str:
    """With Grafana's variables."""
    return expression.replace("$__rate_interval", "5m").replace("$instance", instance)


def shown(prometheus: PrometheusProcess, instance: str) -> dict[str, str]:
    """What each target of a panel has for an instance."""
    found = {}
    for title, expression in TARGETS.items():
        values = [float(sample["value"][1]) for sample in prometheus.ask(filled(expression, instance))]
        found[title] = "no number" if any(map(math.isnan, values)) else "numbers" if values else "nothing"
    return found


def test_every_alert_has_a_fault() -> None:
    assert sorted(FAULTS) == sorted(ALERTS)
