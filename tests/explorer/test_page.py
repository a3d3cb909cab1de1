"""README.md is up to date: every generated part of it is generated again and compared.

`python tests/explorer/page.py` writes them. The table of mutants also shows that the explorer finds each one.
"""

from __future__ import annotations

import pytest

from explorer.page import PARTS, part
from explorer.scenarios import SCENARIOS
from explorer.variants import CORES

SEARCHED = ("variants", "mutants")
"""The tables that thousands of schedules make."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.verify] if name in SEARCHED else []) for name in PARTS]
)
def test_the_readme_tables_are_up_to_date(name: str) -> None:
    assert part(name) == PARTS[name]()


def test_the_tables_show_no_failure_of_the_core() -> None:
    rows = [line.split("|") for line in part("variants").splitlines()[2:]]
    cells = [cell.strip() for row in rows for cell in row[4 : 4 + len(CORES)]]
    assert len(cells) == len(CORES) * len(SCENARIOS)
    assert set(cells) == {"none in 100"}


def test_each_mutant_is_detected() -> None:
    cells = [line.split("|")[3] for line in part("mutants").splitlines()[2:]]
    assert len(cells) >= 25
    assert [cell for cell in cells if "none in" in cell] == []
