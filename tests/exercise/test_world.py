"""The protocol's promise page by page: the right answers in one state."""

from __future__ import annotations

import pytest

from exercise.worlds import EXECUTE, READ, READ_WRITE, WRITE, backing, region
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer
from interceptctl.exercise.world import RESUMED, Backing, Region, decide, sight

NO_REGION = frozenset({Answer.NO_REGION})
PERMISSION = frozenset({Answer.PERMISSION})
UNBACKED = frozenset({Answer.UNBACKED})


@pytest.mark.parametrize(
    ("covered_by", "backed_by", "access", "right"),
    [
        (None, None, READ, NO_REGION),
        (region(), None, READ, UNBACKED),
        (region(), backing(1), READ, RESUMED),
        (region(), backing(1), WRITE, RESUMED),
        (region(), backing(1, READ), WRITE, PERMISSION),
        (region(access=READ), backing(1), WRITE, PERMISSION),
        (region(access=READ), None, WRITE, PERMISSION),
        (region(), backing(1, Access.NONE), READ, PERMISSION),
        (region(), backing(1, READ | EXECUTE), EXECUTE, PERMISSION),
        (region(access=READ_WRITE | EXECUTE), backing(1), EXECUTE, RESUMED),
        (region(access=READ_WRITE | EXECUTE), backing(1, WRITE), EXECUTE, PERMISSION),
        (region(inferred=True), backing(1, io=False), READ, UNBACKED),
        (region(RegionKind.MOVABLE, inferred=True), backing(1, io=False), READ, RESUMED),
        (region(RegionKind.MOVABLE), backing(1, io=True), READ, RESUMED),
    ],
)
def test_decision_follows_region_then_backing_then_rights(
    covered_by: Region | None, backed_by: Backing | None, access: Access, right: frozenset[Answer]
) -> None:
    assert decide(covered_by, backed_by, access) == right


def test_a_guest_sees_nothing_where_it_has_no_right() -> None:
    assert sight(region(), backing(1, Access.NONE)) is None


def test_a_guest_sees_with_the_rights_of_region_and_vma_together() -> None:
    seen = sight(region(access=READ), backing(1))
    assert seen is not None
    assert seen.access == READ
