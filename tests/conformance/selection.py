"""Which cases run: those of some statements, or those that need only some parts of a server.

Owns what a case needs, and the order. Must not know what a case does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import pytest

from conformance.exchange import PROFILES
from conformance.report import STATEMENT
from conformance.statements import HERE, NOT_CHECKED, claimed

LAST: Final = "test_drain.py"
_NEEDED_BY_FIXTURE: Final[Mapping[str, str]] = {
    "hosted": "hypervisor",
    "operator": "operator",
    "listener": "operator",
    "live": "process",
}


def needs_of(item: pytest.Item) -> frozenset[str]:
    """The parts of a server that a case needs besides the core, by its marks and its fixtures."""
    fixtures: Iterable[str] = getattr(item, "fixturenames", ())
    marked = {str(profile) for mark in item.iter_markers("needs") for profile in mark.args}
    return frozenset(marked | {_NEEDED_BY_FIXTURE[name] for name in fixtures if name in _NEEDED_BY_FIXTURE})


def require_cases(numbers: Iterable[str]) -> None:
    """Raise `UsageError`, with the reason, for a statement without a case."""
    cases = claimed()
    for number in numbers:
        if number not in cases:
            why = NOT_CHECKED.get(number, "no such statement")
            raise pytest.UsageError(f"--statement {number}: {why}")


def select(config: pytest.Config, items: list[pytest.Item]) -> dict[str, list[str]]:
    """Keep the cases that the options select; the one that ends the server comes last.

    Returns the selected statements that have no case left, each with the profiles that it lacks.
    """
    ours = [item for item in items if item.path.parent == HERE]
    for item in ours:
        item.user_properties += [(STATEMENT, number) for number in sorted(_numbers_of(item))]
    items.sort(key=lambda item: item in ours and item.path.name == LAST)
    profiles = frozenset(config.getoption("profile", None) or PROFILES)
    statements = frozenset(config.getoption("statement", None) or ())
    deselected = [
        item
        for item in ours
        if not _profiles_of(item) <= profiles or (statements and not statements & _numbers_of(item))
    ]
    left_out: dict[str, list[str]] = {}
    for number in sorted(statements):
        lacking = [_profiles_of(item) - profiles for item in ours if number in _numbers_of(item)]
        if lacking and all(lacking):
            fewest = min(map(len, lacking))
            left_out[number] = sorted(next(few for few in lacking if len(few) == fewest), key=PROFILES.index)

    if deselected:
        items[:] = [item for item in items if item not in deselected]
        config.hook.pytest_deselected(items=deselected)
    return left_out


def _profiles_of(item: pytest.Item) -> frozenset[str]:
    return needs_of(item) or frozenset({"core"})


def _numbers_of(item: pytest.Item) -> frozenset[str]:
    return frozenset(str(number) for mark in item.iter_markers("statement") for number in mark.args)
