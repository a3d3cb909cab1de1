"""The patch's two postings: each hazard of the review that applies is detected, and fixed ones are not."""

from __future__ import annotations

import pytest

from explorer.rules import Rule
from explorer.scenarios import SCENARIOS
from explorer.search import Explorer, exploring
from explorer.variants import PATCH_V0, PATCH_V3, Variant

FIXED = {Rule.SLEPT, Rule.TORN, Rule.FREED}
"""What the posting of May has fixed, along with the base frame (a) and the check of gva_gpa_valid (g)."""


def found(variant: Variant, scenario: str, schedules: int = 60) -> set[Rule]:
    async def search(explorer: Explorer) -> set[Rule]:
        return set(await explorer.first_of_each(SCENARIOS[scenario], 0, schedules))

    return exploring(variant.build, search)


@pytest.mark.parametrize(
    ("scenario", "rule"),
    [
        pytest.param("msix-hole", Rule.SLEPT, id="H1-d"),
        pytest.param("two-vps-and-an-unmap", Rule.LEFT, id="H3-H4-k"),
        pytest.param("trapped", Rule.REMAPPED, id="H5-m"),
        pytest.param("bar-move", Rule.TORN, id="H6"),
        pytest.param("trapped", Rule.WRONG_FRAME, id="a"),
        pytest.param("bar-move", Rule.FREED, id="c"),
        pytest.param("two-vps-and-an-unmap", Rule.LATE, id="e"),
        pytest.param("msix-hole", Rule.EXTRAPOLATED, id="f"),
        pytest.param("no-translation", Rule.FORWARDED, id="g"),
        pytest.param("read-only", Rule.EXCESS, id="h"),
        pytest.param("bar-move", Rule.LEFT_REGION, id="k"),
        pytest.param("trapped", Rule.SPUN, id="l"),
        pytest.param("bar-without-memory", Rule.UNDONE, id="m"),
        pytest.param("bar-without-memory", Rule.FORWARDED, id="o"),
        pytest.param("bar-move", Rule.LATE_REGION, id="s"),
    ],
)
def test_the_patch_as_posted_has_the_hazard(scenario: str, rule: Rule) -> None:
    assert rule in found(PATCH_V0, scenario)


@pytest.mark.parametrize(
    ("scenario", "rule"),
    [
        pytest.param("two-vps-and-an-unmap", Rule.LEFT, id="H3-H4-k"),
        pytest.param("two-vps-and-an-unmap", Rule.LATE, id="e"),
        pytest.param("msix-hole", Rule.EXTRAPOLATED, id="f"),
        pytest.param("read-only", Rule.EXCESS, id="h"),
        pytest.param("low-frames", Rule.WRAPPED, id="i"),
        pytest.param("bar-move", Rule.LEFT_REGION, id="k"),
        pytest.param("trapped", Rule.SPUN, id="l"),
        pytest.param("bar-without-memory", Rule.UNDONE, id="m"),
        pytest.param("bar-without-memory", Rule.FORWARDED, id="o"),
        pytest.param("another-process", Rule.WRONG_FRAME, id="j"),
        pytest.param("bar-move", Rule.LATE_REGION, id="s"),
    ],
)
def test_the_later_posting_still_has_the_hazard(scenario: str, rule: Rule) -> None:
    assert rule in found(PATCH_V3, scenario)


@pytest.mark.parametrize("scenario", ["bar-move", "remove-and-add-again", "two-vps-and-an-unmap"])
def test_the_later_posting_has_fixed_the_lock_the_walk_and_the_lifetime(scenario: str) -> None:
    assert not found(PATCH_V3, scenario) & FIXED


def test_a_the_later_posting_maps_the_region_from_its_own_start() -> None:
    assert Rule.WRONG_FRAME not in found(PATCH_V3, "bar-move")


def test_g_the_later_posting_does_not_ask_whether_the_gva_is_valid() -> None:
    assert found(PATCH_V3, "no-translation") == set()


def test_patches_are_put_through_no_scenario_with_memory_they_do_not_deal_with() -> None:
    assert not PATCH_V0.applies_to(SCENARIOS["pinned-add"])
