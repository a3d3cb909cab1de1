"""The daemon's own core under drawn schedules: no rule is broken, and planted faults are detected.

The mutants are a table of README.md, which `test_page` runs.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import trio

from explorer import core
from explorer.core import Held
from explorer.model_partition import Parts
from explorer.rules import Rule
from explorer.scenarios import SCENARIOS
from explorer.search import Explorer, Failure, exploring
from explorer.system_under_test import Build
from explorer.variants import CORE, CORES, Variant
from intercept_protocol.outcomes import Answer
from interceptd.memory.fault_handler import Fault, FaultHandler
from interceptd.memory.guest_mappings import GuestMappings, Revocation
from interceptd.memory.region_manager import RegionManager
from interceptd.mmu_notifier import Batch

UNTABLED = 1000
"""Beyond the schedule numbers of the README's tables."""


def failures(build: Build, scenario: str, seed: int, schedules: int) -> dict[Rule, Failure]:
    async def search(explorer: Explorer) -> dict[Rule, Failure]:
        return await explorer.first_of_each(SCENARIOS[scenario], seed, schedules)

    return exploring(build, search)


@pytest.mark.parametrize("variant", CORES, ids=lambda variant: variant.name)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_core_breaks_no_rule(scenario: str, variant: Variant) -> None:
    assert failures(variant.build, scenario, UNTABLED, 15) == {}


class AnswersUnserved(RegionManager):
    async def wait_served(self, batch: Batch) -> None:
        """Where it should make the pass itself, it makes none."""
        if self.busy:
            await super().wait_served(batch)


@pytest.mark.parametrize("held", [Held.ADDRESS_SPACE, Held.NEITHER], ids=lambda held: held.name)
def test_i1_an_unblocked_pass_that_is_never_made_is_detected(held: Held) -> None:
    found = failures(core.of(Parts(regions=AnswersUnserved), held), "movable", 0, 60)
    assert Rule.LEFT in found


class _LeavesTheRest(Revocation):
    async def finish(self) -> None:
        """Only full lists are asked for."""


class LeavesTheRest(GuestMappings):
    def revocation(self) -> Revocation:
        return _LeavesTheRest(self)


def test_i1_a_list_that_is_not_full_and_is_never_asked_for_is_detected() -> None:
    found = failures(core.of(Parts(mappings=LeavesTheRest), Held.LISTS), "movable", 0, 60)
    assert Rule.LEFT in found


@pytest.mark.parametrize(
    ("held", "step_by_step"),
    [(Held.BOTH, True), (Held.LISTS, True), (Held.ADDRESS_SPACE, True), (Held.NEITHER, False)],
)
def test_a_first_touch_is_one_step_unless_a_port_is_held(held: Held, *, step_by_step: bool) -> None:
    asked: list[bool] = []

    class Watched(FaultHandler):
        async def handle_nowait(self, fault: Fault) -> Answer | None:
            answer = await super().handle_nowait(fault)
            asked.append(answer is None)
            return answer

    failures(core.of(Parts(faults=Watched), held), "msix-hole", 0, 3)
    assert set(asked) == {step_by_step}


def test_i10_an_unshielded_change_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The jump of the clock cancels a commit in the middle of its map."""

    def unshielded(*, shield: bool) -> trio.CancelScope:
        assert shield
        return trio.CancelScope()

    unshielding = SimpleNamespace(**{**vars(trio), "CancelScope": unshielded})
    monkeypatch.setattr("explorer.ports.trio", unshielding)
    found = failures(CORE.build, "two-vps-and-an-unmap", 0, 300)
    assert Rule.UNKNOWN in found


class WaitsForEver(FaultHandler):
    async def handle(self, *_: object) -> object:  # type: ignore[override]
        return await trio.sleep_forever()


def test_i4_actors_that_wait_for_each_other_for_ever_are_found() -> None:
    found = failures(core.of(Parts(faults=WaitsForEver)), "no-translation", 0, 1)
    assert found[Rule.STUCK].finding.how == "still waiting: VP 0"


class Overworked(FaultHandler):
    async def handle(self, *_: object) -> object:  # type: ignore[override]
        raise RuntimeError("out of order")


def test_i4_a_vp_that_is_left_without_an_answer_is_found() -> None:
    found = failures(core.of(Parts(faults=Overworked)), "no-translation", 0, 1)
    assert found[Rule.LATE_ANSWER].finding.how.endswith("never answered")


class Undecided(RegionManager):
    async def serve_pending(self) -> None:
        raise RuntimeError("out of order")


def test_an_error_during_a_shielded_call_does_not_hang_the_exploration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A commit in progress cannot be cancelled: it must be released instead."""

    async def gives_up(*_: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(core.Core, "unmap_vma", gives_up)
    found = failures(CORE.build, "two-vps-and-an-unmap", 0, 20)
    assert Rule.BROKE in found


def test_an_error_of_the_code_itself_is_a_finding() -> None:
    found = failures(core.of(Parts(regions=Undecided)), "invalidate-storm", 0, 1)
    assert found[Rule.BROKE].finding.how == "RuntimeError: out of order"
