"""The long exploration: the core through 100,000 schedules of all scenarios; fewer in its other modes."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest

from explorer.report import Explored, explored
from explorer.scenarios import SCENARIOS
from explorer.variants import CORE, CORE_LISTS, CORE_LIVE, CORE_MODEL, VARIANTS, Variant

pytestmark = [pytest.mark.verify, pytest.mark.alone]

RECOVERY_EVERY = 4
"""I11 is judged in one of so many schedules: bringing a successor back at each step takes two thirds of the
time. That leaves over 6,000 in each mode, and the mutants that only I11 finds take at most 227
(`tests/explorer/README.md`)."""


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [(CORE, 100_000), (CORE_LIVE, 25_000), (CORE_MODEL, 25_000), (CORE_LISTS, 25_000)],
    ids=lambda value: value.name if isinstance(value, Variant) else str(value),
)
def test_the_core_breaks_no_rule_in_many_schedules(
    capsys: pytest.CaptureFixture[str], variant: Variant, wanted: int
) -> None:
    each = -(-wanted // len(SCENARIOS))
    started = time.monotonic()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        reports = list(processes.map(partial(explore, variant.name, each), SCENARIOS))
    schedules = sum(report.schedules for report in reports)
    with capsys.disabled():
        print(f"\n{variant.name}: {schedules:,} schedules in {time.monotonic() - started:.0f} s")
    assert [example for report in reports for example in report.counterexamples] == []
    assert schedules >= wanted


def explore(name: str, schedules: int, scenario: str) -> Explored:
    return explored(
        VARIANTS[name],
        [SCENARIOS[scenario]],
        seed=0,
        schedules=schedules,
        watching=lambda _: None,
        recovery_every=RECOVERY_EVERY,
    )
