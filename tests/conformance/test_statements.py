"""The specification's numbers and the cases agree: every statement has a case, or a reason why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.statements import NOT_CHECKED, SPECIFICATION, claimed, numbered


@pytest.fixture
def statements(request: pytest.FixtureRequest) -> dict[str, str]:
    given = request.config.getoption("specification", None)
    path = Path(given or SPECIFICATION)
    if not path.is_file():
        pytest.skip("the specification is not here: give --specification FILE")
    return numbered(path.read_text(encoding="utf-8"))


def test_every_statement_has_a_case_or_a_reason_why_it_has_none(statements: dict[str, str]) -> None:
    assert len(statements) > 80
    assert sorted(statements.keys() - claimed().keys() - NOT_CHECKED.keys()) == []


def test_no_case_and_no_reason_names_a_statement_that_is_not_there(statements: dict[str, str]) -> None:
    assert sorted((claimed().keys() | NOT_CHECKED.keys()) - statements.keys()) == []


def test_no_checked_statement_is_listed_as_unchecked() -> None:
    assert sorted(claimed().keys() & NOT_CHECKED.keys()) == []
    assert all(NOT_CHECKED.values())
