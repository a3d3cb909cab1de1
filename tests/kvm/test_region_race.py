"""Regions that change under real guests that read them.

Each value is of what was there before the change or of what is there after it, never of neither. Without the
one step, the same race finds reads of nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fakes.guest_region_race import GuestRace
from fakes.region_toggles import MOVES, OTHERS, How, Kind
from fakes.small_vmms import StartVmm
from intercept_client.kvm import Coverage, PartitionSetting
from intercept_protocol.outcomes import Answer
from interceptctl.guest.small_vmm import SmallVmm


@pytest.mark.parametrize(
    ("kinds", "changes", "coverage"),
    [
        (MOVES, 1000, Coverage.ANNOUNCED),
        (OTHERS, 50, Coverage.WATCHED),
        pytest.param(MOVES, 10_000, Coverage.WATCHED, marks=pytest.mark.verify),
    ],
    ids=["ROM shadow and BAR", "other changes", "ROM shadow and BAR for long"],
)
def test_every_read_finds_the_old_memory_or_the_new(
    start_vmm: StartVmm, kinds: Sequence[Kind], changes: int, coverage: Coverage
) -> None:
    found = GuestRace(start_vmm(PartitionSetting(coverage=coverage)), kinds).run(changes, How.IN_ONE_STEP)
    assert (found.changes, found.gaps, found.wrong, found.examples) == (changes, 0, 0, [])
    assert found.answers[Answer.MAPPED] >= changes // 2
    """Of two changes, at least one meets what was mapped since the one before."""
    assert found.pages_reached > 0


def test_the_same_race_by_removing_and_adding_finds_gaps(vmm: SmallVmm) -> None:
    found = GuestRace(vmm, MOVES).run(25, How.IN_TWO_STEPS)
    assert found.gaps > 0
    assert found.wrong > 0
