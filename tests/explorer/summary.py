"""Output of an exploration: stories in two columns, and one line per scenario.

Owns the layout; must not know how anything was found.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .report import Counterexample, Explored


def summary(report: Explored) -> RenderableType:
    """All of it: the counterexamples, then the verdict."""
    stories = [story(example) for example in report.counterexamples]
    return Group(*stories, _by_scenario(report), verdict(report))


def verdict(report: Explored) -> str:
    scenarios = len(report.found)
    plural = "" if scenarios == 1 else "s"
    of = f"{report.variant}: {report.schedules:,} schedules of {scenarios} scenario{plural}"
    if not report.counterexamples:
        return f"{of}, and no rule was broken"
    rules = len(report.counterexamples)
    return f"{of}, and {rules} rule{'s were' if rules > 1 else ' was'} broken"


def story(example: Counterexample) -> RenderableType:
    """A counterexample: what was given, what happened, what is wrong with it, how to see it again."""
    names = "; ".join(part for part in (example.invariant, example.hazards) if part)
    head = Text(f"{example.rule} ({names}): {example.sentence}", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", justify="right", style="dim")
    table.add_column("the VMM and its guest", ratio=1)
    table.add_column(example.variant, ratio=1)
    for number, line in enumerate(example.story, start=1):
        left, right = (line.text, "") if line.side == "vmm" else ("", line.text)
        table.add_row(str(number), left, right)
    given = Text("given: " + "; ".join(example.given))
    end = Text(f"=> {example.end}", style="bold")
    again = Text(f"  again: {_for_a_terminal(example.again)}\n", style="dim")
    return Group(head, Padding(Group(given, table, end), (0, 0, 0, 2)), again)


def _for_a_terminal(command: str) -> str:
    """On two lines that 80 columns do not break again; nothing follows the backslash: it can be pasted."""
    return command.replace(" --scenario", " \\\n    --scenario")


def _by_scenario(report: Explored) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("scenario")
    table.add_column("broken, and by which schedule first")
    for scenario, rules in report.found.items():
        table.add_row(scenario, found_words(rules))
    return table


def found_words(rules: dict[str, int]) -> str:
    """Like `SLEPT 1, LEFT 9`; a dash for nothing."""
    return ", ".join(f"{rule} {tried}" for rule, tried in rules.items()) or "-"
