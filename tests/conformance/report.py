"""The report by statements: one line each, and a failed case in a few lines.

Owns the counts, the words and the exit status. Must not know what a case does, nor how the wire is spoken.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import pytest

from conformance.exchange import RUNNING, NotImplementedYet, NotOffered
from conformance.statements import NOT_CHECKED, first_sentence

STATEMENT: Final = "statement"
"""The key of a case's property that holds a number."""
MISSING: Final = "not implemented"
_LINE: Final = 200
"""Characters of a line about a case that failed."""
_WIDTH: Final = 120
"""Columns where there is no terminal to ask."""


class Outcome(IntEnum):
    """How a case ended; the worst of its phases counts."""

    HELD = 0
    SKIPPED = 1
    MISSING = 2
    BROKEN = 3


@dataclass
class Tally:
    """The cases of one statement."""

    cases: dict[str, Outcome] = field(default_factory=dict)

    def add(self, case: str, outcome: Outcome) -> None:
        self.cases[case] = max(outcome, self.cases.get(case, Outcome.HELD))

    @property
    def held(self) -> int:
        return sum(outcome is Outcome.HELD for outcome in self.cases.values())

    @property
    def verdict(self) -> str:
        """A statement holds if no case says otherwise, and at least one could be run."""
        worst = max(self.cases.values(), default=None)
        if worst is None:
            return "no case"
        if worst is Outcome.BROKEN:
            return "BROKEN"
        if worst is Outcome.MISSING:
            return MISSING
        return "holds" if self.held else "skipped"


class StatementReport:
    """A plugin. `texts` are the statements of the specification, in its order; empty without it.
    `wanted` are those to report; empty for all."""

    def __init__(self, texts: Mapping[str, str], wanted: Container[str]) -> None:
        self.left_out: Mapping[str, Sequence[str]] = {}
        """The statements without a case because of --profile, each with the profiles that are lacking."""
        self._texts = texts
        self._wanted = wanted
        self._tallies: dict[str, Tally] = {}
        self._deselected: Counter[str] = Counter()
        self._not_run: Counter[str] = Counter()
        self._missing = False

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            self._deselected.update(_numbers(item.user_properties))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = report.user_properties
        missing = any(name == MISSING for name, _ in properties)
        outcome = {"passed": Outcome.HELD, "failed": Outcome.BROKEN}.get(report.outcome, Outcome.SKIPPED)
        if missing and outcome is Outcome.SKIPPED:
            outcome, self._missing = Outcome.MISSING, True
        if outcome in {Outcome.SKIPPED, Outcome.MISSING} and isinstance(report.longrepr, tuple):
            self._not_run[report.longrepr[2].removeprefix("Skipped: ")] += 1
        for number in _numbers(properties):
            if not self._wanted or number in self._wanted:
                self._tallies.setdefault(number, Tally()).add(report.nodeid, outcome)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """A server that lacks a method does not pass, even if all it has is right."""
        if exitstatus == pytest.ExitCode.OK and self._missing:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._tallies or self.left_out:
            terminalreporter.section("statements of the specification")
        for number, profiles in self.left_out.items():
            options = " ".join(f"--profile {profile}" for profile in profiles)
            terminalreporter.line(f"left out: {number}: needs {options}, too")
        if not self._tallies:
            return
        width = shutil.get_terminal_size((_WIDTH, 0)).columns
        verdicts: list[str] = []
        for number in self._in_order():
            tally = self._tallies.get(number, Tally())
            verdicts.append(tally.verdict)
            cases = len(tally.cases) + self._deselected[number]
            counted = f"{tally.held} of {cases} case{'' if cases == 1 else 's'}"
            sentence = first_sentence(self._texts.get(number, ""))
            terminalreporter.line(f"{number:<5}{counted:<18}{tally.verdict:<16}{sentence}"[:width].rstrip())
        words = ("holds", "BROKEN", MISSING, "skipped", "no case")
        terminalreporter.line(", ".join(f"{verdicts.count(word)} {word}" for word in words))
        if "BROKEN" in verdicts:
            terminalreporter.line("other clients of the server may break cases that count: run it alone")
        for reason, count in self._not_run.most_common():
            terminalreporter.line(f"not run: {count} case{'' if count == 1 else 's'}: {reason}")
        if not self._texts:
            terminalreporter.line("to see what each statement says, give --specification FILE")

    def _in_order(self) -> list[str]:
        """In the specification's order; statements without a case only if all cases were selected."""
        known = [number for number in self._texts if number in self._tallies]
        if not self._deselected and not self._wanted:
            known = [number for number in self._texts if number in self._tallies or number in NOT_CHECKED]
        return known + sorted(self._tallies.keys() - self._texts.keys())


def _numbers(properties: Iterable[tuple[str, object]]) -> list[str]:
    return [str(value) for name, value in properties if name == STATEMENT]


def in_few_lines(item: pytest.Item, call: pytest.CallInfo[None], texts: Mapping[str, str]) -> str:
    """Why a case failed: what was sent, what came, what the statements want, and where the case is."""
    assert call.excinfo is not None
    entries = call.excinfo.traceback
    here = next((entry for entry in reversed(entries) if entry.path == item.path), entries[-1])
    why = re.split(r"\n", call.excinfo.exconly(), maxsplit=1)[0]
    numbers = [number for mark in item.iter_markers("statement") for number in mark.args]
    wants = [f"wants {number} {first_sentence(texts.get(number, ''))}".rstrip() for number in numbers]
    case = f"case  {Path(here.path).name}:{here.lineno + 1}: {why}"
    return "\n".join(line[:_LINE] for line in (*RUNNING.lines(), *wants, case))


def reason_not_run(error: BaseException) -> str | None:
    """What the report says of a case that needs something which the server does not have."""
    match error:
        case NotImplementedYet():
            return f"{MISSING}: {error}"
        case NotOffered():
            return str(error)
        case _:
            return None
