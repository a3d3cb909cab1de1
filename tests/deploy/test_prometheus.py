"""The Prometheus and Grafana files use exported metrics only, and every metric is documented."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser
import pytest
import yaml

from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.raw_client import RawConnection
from fakes.scraper import Scrape, ask
from fakes.witness import Witness

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = json.loads((DEPLOY / "grafana" / "interceptd.json").read_text())
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, of Debian's prometheus package")

OF_PROMETHEUS = {"up"}
"""Series that Prometheus makes itself."""
OF_THE_SCRAPE = {"job", "instance"}
"""Labels that Prometheus adds."""
SPELLED_OUT = {"stage", "source", "call", "access", "role", "watch", "state", "cause"}
"""Labels all of whose values the documentation names; those of the others are the protocol's."""
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| [^|]*\| ([^|]*)\| (.*) \|$", re.MULTILINE)


class Documented(NamedTuple):
    type: str
    labels: frozenset[str]


DOCUMENTATION = (PROMETHEUS / "METRICS.md").read_text()
MEANINGS = {name: meaning for name, _, _, meaning in ROW.findall(DOCUMENTATION)}
DOCUMENTED = {
    name: Documented(type_, frozenset(re.findall(r"`(\w+)`", labels)))
    for name, type_, labels, _ in ROW.findall(DOCUMENTATION)
}
EXPRESSIONS = {
    **{rule["alert"]: rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]},
    **{
        f"panel {panel['title']!r} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    },
}
each_expression = pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)


# ------------------------------------------------ what is exported


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A scrape of a daemon that served a VMM, refused a stranger and was scraped before."""
    directory = tmp_path_factory.mktemp("scraped")
    place = directory / "metrics.sock"
    with DaemonProcess(directory, config=f'metrics.listen = "unix:{place}"') as daemon:
        daemon.wait_serving()
        with Witness(daemon.socket) as witness, RawConnection(daemon.socket) as stranger:
            assert witness.serve() == Witness.SERVED
            stranger.send(b"GET / HTTP/1.1\r\n\r\n")
            stranger.farewell()
            RawConnection(daemon.socket).close()
            eventually(lambda: daemon.statistics()["connections_refused"], 2)
            eventually(lambda: ask(place, "/metrics").status, 200)
            yield ask(place, "/metrics").body
        assert daemon.stop() == 0


@pytest.fixture(scope="module")
def exported(page: str) -> dict[str, Documented]:
    """Every family as it would be documented."""
    labels: dict[str, set[str]] = {}
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", page, re.MULTILINE))
    for family in Scrape(page).families.values():
        name = family.name if family.name in types else f"{family.name}_total"
        labels[name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    return {name: Documented(type_, frozenset(labels[name])) for name, type_ in types.items()}


@pytest.fixture(scope="module")
def series(page: str) -> dict[str, dict[str, set[str]]]:
    """The values of every label of every sample's name."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in Scrape(page).families.values():
        for sample in family.samples:
            values = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                values.setdefault(label, set()).add(value)
    return found


def test_every_exported_metric_is_documented_and_nothing_else_is(exported: dict[str, Documented]) -> None:
    assert exported == DOCUMENTED


def test_every_value_of_our_own_labels_is_documented(series: dict[str, dict[str, set[str]]]) -> None:
    unnamed = [
        (name, value)
        for name, labels in series.items()
        for label in SPELLED_OUT & labels.keys()
        for value in labels[label]
        if f"`{value}`" not in MEANINGS[re.sub(r"_(bucket|sum|count)$", "", name)]
    ]
    assert unnamed == []


@needs_promtool
def test_promtool_finds_nothing_wrong_with_a_scrape(page: str) -> None:
    checked = promtool("check", "metrics", stdin=page)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


# ------------------------------------------------ what is asked


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """Every selector, with Grafana's variables filled in as Grafana does."""
    filled = expression.replace("$__rate_interval", "1m").replace("$instance", ".+")
    found: list[promql_parser.VectorSelector] = []

    def collect(node: object) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(filled), collect)
    return found


@each_expression
def test_every_metric_and_label_in_use_is_exported(
    expression: str, series: dict[str, dict[str, set[str]]]
) -> None:
    for selector in selectors(expression):
        if selector.name in OF_PROMETHEUS:
            continue
        assert selector.name in series
        for matcher in selector.matchers.matchers:
            if matcher.name in OF_THE_SCRAPE:
                continue
            values = series[selector.name][matcher.name]
            asked = matcher.value.split("|") if matcher.op == promql_parser.MatchOp.Re else [matcher.value]
            assert set(asked) <= values


@each_expression
def test_every_expression_uses_a_metric(expression: str) -> None:
    assert selectors(expression)


# ------------------------------------------------ alerts


def promtool(*arguments: str, stdin: str = "", directory: Path | None = None) -> Any:
    return subprocess.run(
        [str(PROMTOOL), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=directory,
    )


@needs_promtool
def test_promtool_takes_the_alerts_and_the_configuration_that_loads_them() -> None:
    checked = promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))
    assert (checked.returncode, checked.stderr) == (0, "")
    assert f"SUCCESS: {len(ALERTS['groups'][0]['rules'])} rules found" in checked.stdout


@needs_promtool
def test_alerts_fire_on_their_condition_and_not_in_normal_operation(tmp_path: Path) -> None:
    shutil.copy(PROMETHEUS / "alerts.yml", tmp_path)
    shutil.copy(Path(__file__).with_name("alerts_test.yml"), tmp_path)
    tested = promtool("test", "rules", "alerts_test.yml", directory=tmp_path)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_has_a_firing_test_a_severity_and_a_summary() -> None:
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    fired = re.findall(r'alertname="(\w+)"', Path(__file__).with_name("alerts_test.yml").read_text())
    assert sorted(fired) == sorted(rule["alert"] for rule in rules)
    assert {rule["labels"]["severity"] for rule in rules} == {"page", "ticket"}
    assert all(rule["annotations"].keys() == {"summary", "description"} for rule in rules)


# ------------------------------------------------ the dashboard


def test_every_panel_has_a_place_of_its_own() -> None:
    def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
        return (
            one["x"] < other["x"] + other["w"]
            and other["x"] < one["x"] + one["w"]
            and one["y"] < other["y"] + other["h"]
            and other["y"] < one["y"] + one["h"]
        )

    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    pairs = combinations([panel["gridPos"] for panel in panels], 2)
    assert [pair for pair in pairs if overlap(*pair)] == []
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_the_dashboard_uses_just_the_variables_that_it_has() -> None:
    text = json.dumps([DASHBOARD["panels"], DASHBOARD["templating"]])
    used = set(re.findall(r"\$\{?(\w+)\}?", text)) - {"__rate_interval"}
    assert used == {variable["name"] for variable in DASHBOARD["templating"]["list"]}
