"""The specification is consistent: its index is right, its numbers ascend, its links resolve."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from conformance.exchange import METHODS
from intercept_protocol import messages as m
from wire_vectors.forms import DIRECTORY

TEXT = (DIRECTORY.parent / "README.md").read_text(encoding="utf-8")


def anchor(heading: str) -> str:
    """How GitHub names a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings() -> dict[str, list[str]]:
    """The numbers of the statements under each heading, by its anchor."""
    found: dict[str, list[str]] = {}
    under: list[str] = []
    for line in TEXT.splitlines():
        if heading := re.match(r"#{2,3} (.*)", line):
            under = found.setdefault(anchor(heading[1]), [])
        elif number := re.match(r"- \*\*([A-Z]-\d+)\*\*", line):
            under.append(number[1])
    return found


HEADINGS = headings()


@pytest.mark.parametrize("heading", [heading for heading, numbers in HEADINGS.items() if len(numbers) > 1])
def test_statements_ascend_under_each_heading(heading: str) -> None:
    numbers = [(number[0], int(number[2:])) for number in HEADINGS[heading]]
    steps = [(before, after) for before, after in pairwise(numbers) if before[0] == after[0]]
    assert [step for step in steps if step[0] >= step[1]] == []


def test_every_letter_is_in_the_section_that_the_introduction_names() -> None:
    introduction = TEXT.partition("Sections, and the letters")[2].partition("Under each")[0]
    groups = re.findall(r"\[(\d+) [^\]]*\]\([^)]*\)((?:\s`[A-Z]`)+)", introduction)
    said = {letter: section for section, letters in groups for letter in re.findall("[A-Z]", letters)}
    sections = re.findall(r"^## (\d+)\. (.*?)(?=^## |\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
    found = [
        (letter, section)
        for section, text in sections
        for letter in sorted(set(re.findall(r"^- \*\*([A-Z])-", text, flags=re.MULTILINE)))
    ]
    assert sorted(said.items()) == sorted(found)


def test_the_index_of_section_3_names_every_statement_of_every_method() -> None:
    indexed = {}
    for numbers, where in re.findall(r"^\| (P-[P\d, -]*) \| (.*) \|$", TEXT, flags=re.MULTILINE):
        link = re.search(r"\(#(.*)\)", where)
        indexed[link[1] if link else "3-the-vmm-connection"] = numbers.split(", ")
    assert indexed == {heading: numbers for heading, numbers in HEADINGS.items() if "P-" in " ".join(numbers)}


def test_every_link_within_the_specification_leads_to_a_heading() -> None:
    assert set(re.findall(r"\]\(#(.*?)\)", TEXT)) - HEADINGS.keys() == set()


def test_the_conformance_suite_knows_every_method_of_every_role() -> None:
    """Or it takes the ENOSYS of a server that does not have one yet for a broken statement."""
    tables = {
        "vmm": m.VMM_METHODS,
        "vp": {m.INTERCEPT_METHOD},
        "notifier": m.NOTIFIER_METHODS,
        "operator": m.OPERATOR_METHODS,
    }
    assert {role: set(table) for role, table in tables.items()} == METHODS
