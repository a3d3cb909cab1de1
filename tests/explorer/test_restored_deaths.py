"""A restored guest whose daemons die under drawn schedules: nothing is found, and what is forgotten is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from explorer.restored import Broken, Parts, explore
from explorer.restored_deaths import MortalPort, MortalSchedule
from interceptd.ledger.records import Gone
from interceptd.partition.fault_reader import FaultReader
from interceptd.recovery.fold import Fold

STEPS = 200
"""Of a schedule."""


def test_no_death_breaks_anything() -> None:
    verdicts = explore(range(60), STEPS, schedules=MortalSchedule)
    assert [verdict.found for verdict in verdicts] == [{}] * 60
    assert sum(verdict.seen["deaths"] for verdict in verdicts) > 100


@pytest.mark.verify
@pytest.mark.parametrize("part", range(4))
def test_no_death_of_many_breaks_anything(part: int) -> None:
    seeds = range(1000 + part * 1250, 1000 + (part + 1) * 1250)
    assert [verdict.found for verdict in explore(seeds, STEPS, schedules=MortalSchedule)] == [{}] * 1250


def without_wakes(patch: pytest.MonkeyPatch) -> None:
    """Who waits for a fault that the predecessor read waits on."""
    patch.setattr(FaultReader, "wake_all", lambda _: None)


def without_the_event(patch: pytest.MonkeyPatch) -> None:
    """A removal that was read and not recorded is forgotten."""
    patch.setattr(MortalPort, "read", _read_without_a_trace)


def without_what_was_removed(patch: pytest.MonkeyPatch) -> None:
    """The successor takes the image for the content of all pages."""
    gone = Fold._gone

    def forget(fold: Fold, record: Gone) -> None:
        restoring, fold.restoring = fold.restoring, None
        gone(fold, record)
        fold.restoring = restoring

    from interceptd.recovery import fold as module  # noqa: PLC0415

    patch.setitem(module._APPLY, Gone, forget)


def _read_without_a_trace(port: MortalPort) -> object:
    return port._kernel.read() if port._life.goes_on() else None


@pytest.mark.parametrize(
    ("left_out", "broken"),
    [
        (without_wakes, Broken.STUCK),
        (without_the_event, Broken.OLD_CONTENT),
        (without_what_was_removed, Broken.OLD_CONTENT),
    ],
)
def test_what_a_successor_forgets_is_found(
    left_out: Callable[[pytest.MonkeyPatch], None], broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out(monkeypatch)
    assert broken in explore(range(300), STEPS, Parts(), MortalSchedule)[-1].found
