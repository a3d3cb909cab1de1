"""`make bench-compare`: a changed ratio is reported, and one that got worse fails the run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from report import Rounds
    from running import Sample

HERE = Path(__file__).parent
ONE = "1 VP, one CPU"


@pytest.fixture
def comparing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmarks are scripts: their directory is on the path when they run, and only then."""
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("comparing")


def run(title: str = ONE, **medians: float) -> dict[str, Rounds]:
    """Medians by subject; one round."""
    from running import Sample  # noqa: PLC0415

    def sample(median: float) -> Sample:
        return Sample(rate=1e6 / median, p50=median, p99=median, max=median, fairness=1, setup_us=0)

    return {title: {name.replace("_echo", " echo"): [sample(each)] for name, each in medians.items()}}


def test_a_machine_twice_as_slow_in_everything_is_not_reported_slower(
    comparing: ModuleType,
) -> None:
    before, after = run(C_echo=10, already_mapped=20), run(C_echo=20, already_mapped=40)
    assert comparing.compared(after, before) == comparing.Comparison(["no slower than the baseline"], False)


def test_a_ratio_that_moved_for_the_worse_is_named_and_fails(comparing: ModuleType) -> None:
    found = comparing.compared(run(C_echo=10, already_mapped=26), run(C_echo=10, already_mapped=20))
    assert found.lines[0] == f"{ONE}: already_mapped: the median is 1.30 of what it was, beside the floor"
    assert found.slower


def test_a_ratio_that_was_not_pinned_is_named_and_does_not_fail(comparing: ModuleType) -> None:
    title = "1 VP, unpinned"
    before, after = run(title, C_echo=10, no_region=20), run(title, C_echo=10, no_region=30)
    assert comparing.compared(after, before) == comparing.Comparison(
        [
            f"{title}: no_region: the median is 1.50 of what it was, beside the floor",
            "no slower than the baseline",
        ],
        False,
    )


def test_a_ratio_that_moved_for_the_better_is_named_and_does_not_fail(comparing: ModuleType) -> None:
    found = comparing.compared(run(C_echo=10, already_mapped=15), run(C_echo=10, already_mapped=20))
    assert found.lines[0] == f"{ONE}: already_mapped: the median is 0.75 of what it was, beside the floor"
    assert not found.slower


def test_a_figure_missing_from_one_run_is_named(comparing: ModuleType) -> None:
    found = comparing.compared(run(C_echo=10, no_region=20), run(C_echo=10, no_region=20, uvloop_echo=12))
    assert found == comparing.Comparison(
        [f"{ONE}: uvloop echo: not in both runs", "no slower than the baseline"], False
    )


def test_runs_with_another_floor_are_not_held_against_each_other_and_that_fails(
    comparing: ModuleType,
) -> None:
    found = comparing.compared(
        run(Python_echo=13, no_region=20), run(C_echo=10, Python_echo=13, no_region=20)
    )
    assert found == comparing.Comparison(
        [
            f"{ONE}: the floor is Python echo, and was C echo: not held",
            "nothing could be held against the baseline",
        ],
        True,
    )


def test_the_stored_baseline_is_a_run_that_can_be_compared(comparing: ModuleType) -> None:
    from report import from_json  # noqa: PLC0415

    stored = from_json(json.loads((HERE / "results" / "baseline.json").read_text())["results"])
    assert comparing.compared(stored, stored).lines == ["no slower than the baseline"]
