"""The generated parts of tests/explorer/README.md, by the name in their comments.

Owns finding them in the page. `python tests/explorer/page.py` regenerates them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from explorer import tables
from explorer.report import explored
from explorer.scenarios import SCENARIOS
from explorer.summary import story
from explorer.variants import PATCH_V3

PAGE = Path(__file__).with_name("README.md")


def part(name: str) -> str:
    """What stands between the comments of that name."""
    found = re.search(_between(name), PAGE.read_text(), re.DOTALL)
    assert found is not None, f"{PAGE} has no part {name}"
    return found[1].strip()


def told_story() -> str:
    """The missing notifier, as the command tells it on a terminal of 100 columns."""
    scenario = SCENARIOS["two-vps-and-an-unmap"]
    report = explored(PATCH_V3, [scenario], seed=0, schedules=20, watching=lambda _: None)
    [left] = [each for each in report.counterexamples if each.rule == "LEFT"]
    console = Console(width=100, color_system=None, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(story(left))
    lines = (line.rstrip() for line in capture.get().rstrip().splitlines())
    return "\n".join(["```", *lines, "```"])


PARTS: dict[str, Callable[[], str]] = {
    "story": told_story,
    "rules": tables.rules_table,
    "scenarios": tables.scenarios_table,
    "variants": lambda: tables.variants_table(tables.SCHEDULES, lambda _: None),
    "mutants": lambda: tables.mutants_table(lambda _: None),
}


def _between(name: str) -> str:
    return f"<!-- {name} -->\n(.*?)<!-- /{name} -->"


def _put(text: str, name: str, made: str) -> str:
    part = f"<!-- {name} -->\n{made}\n<!-- /{name} -->"
    return re.sub(_between(name), lambda _: part, text, flags=re.DOTALL)


def main() -> None:
    text = PAGE.read_text()
    for name, make in PARTS.items():
        text = _put(text, name, make())
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
