"""The running code takes the steps of the transition table and no others; the kept model is that table."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import trio
from hypothesis import given, settings

from intercept_protocol.addresses import UaddrRange
from interceptd.memory.attempt import Attempt
from interceptd.memory.known_vmas import KnownVmas
from interceptd.memory.mapping_change import MappingChange
from interceptd.memory.region_manager import RegionManager
from interceptd.mmu_notifier import Batch, MmuNotifier, Window
from model.promela import KEPT, Scope, model
from model.running_code import Schedule, problems, schedules, trace_of, traces
from model.shadow import Step
from model.transitions.promises import PROMISES
from model.transitions.table import TABLE

TRACES = 60
"""In these every row is taken, as the test below says."""


def test_kept_model_is_what_the_table_generates() -> None:
    assert KEPT.read_text(encoding="utf-8") == model(Scope()) + "\n", "run tests/model/promela.py"


def test_every_promise_about_a_row_names_an_existing_row() -> None:
    assert {promise.at for promise in PROMISES} - {None} <= TABLE.keys()


@given(schedules())
@settings(max_examples=60)
def test_running_code_takes_only_allowed_steps_and_ends_in_the_same_state(schedule: Schedule) -> None:
    assert problems(trace_of(schedule)) == []


def test_running_code_takes_every_row_of_the_table() -> None:
    taken = {entry.row for trace in traces(TRACES) for entry in trace if isinstance(entry, Step)}
    assert taken == set(TABLE)


# ------------------------------------------------ what the validator can see


def first_problem() -> str:
    return next(found for trace in traces(TRACES // 2) for found in problems(trace))


def never_stale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Attempt, "stale", property(lambda _: False))


def windows_are_whole(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MmuNotifier, "cut_back", lambda _, uaddrs, __: uaddrs)


def nothing_is_unmapped(patch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()

    patch.setattr(RegionManager, "_invalidate", nothing)


def acknowledged_at_once(patch: pytest.MonkeyPatch) -> None:
    add = Batch.add

    def hasty(batch: Batch, uaddrs: UaddrRange) -> None:
        add(batch, uaddrs)
        batch.done.set()

    patch.setattr(Batch, "add", hasty)


def nobody_is_called_stale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MmuNotifier, "mark_stale", MmuNotifier._forget_learned)


def exchanged_unmarked(patch: pytest.MonkeyPatch) -> None:
    def forget_alone(notifier: MmuNotifier, ranges: Iterable[UaddrRange]) -> None:
        for uaddrs in ranges:
            notifier._forget_learned(uaddrs)

    patch.setattr(MmuNotifier, "mark_all_stale", forget_alone)


def known_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KnownVmas, "forget", lambda *_: None)


def learned_unseen(patch: pytest.MonkeyPatch) -> None:
    """No invalidation finds what is being looked up."""
    patch.setattr(RegionManager, "open_look", lambda _, region, __: Window(region.uaddrs))


def nothing_is_taken_away(patch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    patch.setattr(MappingChange, "take_away", nothing)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (never_stale, "not allowed, for reliance is fresh does not hold"),
        (windows_are_whole, "not allowed, for pages apart from every opened does not hold"),
        (nothing_is_unmapped, "not allowed, for record apart from serving does not hold"),
        (acknowledged_at_once, "not allowed, for batch is done does not hold"),
        (nobody_is_called_stale, "is Reliance.FRESH, and Reliance.STALE in the table"),
        (exchanged_unmarked, "is Reliance.FRESH, and Reliance.STALE in the table"),
        (known_for_ever, "known 0 is 7, and 0 in the table"),
        (learned_unseen, "learn 0 found=0b11111: not allowed, for found within seen does not hold"),
        (nothing_is_taken_away, "not allowed, for record apart from turning does not hold"),
    ],
)
def test_a_mutant_takes_a_step_that_the_table_forbids(
    monkeypatch: pytest.MonkeyPatch, mistake: Callable[[pytest.MonkeyPatch], None], said: str
) -> None:
    mistake(monkeypatch)
    assert said in first_problem()
