"""The numbered statements of the specification: which of them cases check, and which no case can.

Owns the marker, reading the numbers out of the specification, and the reasons. Must not know the cases.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from conformance.exchange import PROFILES

HERE: Final = Path(__file__).resolve().parent
SPECIFICATION: Final = HERE.parents[1] / "protocol" / "README.md"
_NUMBER: Final = re.compile(r"^- \*\*([A-Z]-\d+)\*\* (.*(?:\n  .*)*)$", flags=re.MULTILINE)

NOT_CHECKED: Final[Mapping[str, str]] = {
    "T-13": "binds clients, in how they send",
    "H-19": "the server would have to run out of descriptors, which no method of the wire brings about",
    "T-14": "the server would have to run out of descriptors, which no method of the wire brings about",
    "T-15": "every run would wait five seconds, and the clock would decide",
    "H-9": "a peer of another uid is needed, and access to the server's configuration",
    "H-16": "binds clients, and no method of the wire ends a connection without an answer",
    "H-18": "the server would have to be restarted in the middle of the run",
    "P-28": "a kernel is needed whose userfaultfd lacks a feature",
    "K-1": "binds the VMM, which deadlocks itself if it breaks the rule",
    "K-2": "binds the VMM, which waits until its own timeout if it breaks the rule",
    "N-9": "a process is needed that holds its mmap lock for as long as the test wants",
    "L-3": "the server's configuration would have to change meanwhile, and the wire has no method for that",
    "L-4": "the other limits are reached before the default, and what the server holds is not on the wire",
    "E-4": "binds clients, in how they decide",
    "O-19": "access to the server's metrics, and to its configuration, is needed",
    "O-18": "a peer in another pid namespace is needed",
    "Y-9": "the server would have to be restarted in the middle of the run",
    "Y-12": "binds the VMM, which protects itself from the server",
}
"""Statements without a case, each with the reason."""


def statement(*numbers: str) -> pytest.MarkDecorator:
    """Marks a case with the statements that it checks."""
    return pytest.mark.statement(*numbers)


def needs(*profiles: str) -> pytest.MarkDecorator:
    """Marks a case, or a file of cases, with the parts of a server that it needs besides the core."""
    assert set(profiles) < set(PROFILES)
    return pytest.mark.needs(*profiles)


def numbered(specification: str) -> dict[str, str]:
    """The statements of a specification, in its order: number to text."""
    return {number: " ".join(text.split()) for number, text in _NUMBER.findall(specification)}


def first_sentence(text: str) -> str:
    """The requirement that a statement begins with, without the targets of its links."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    sentence, stop, _ = plain.partition(". ")
    return sentence + stop.strip()


def claimed() -> dict[str, list[str]]:
    """The numbers that this folder's cases name, each with its cases. The files are parsed, not imported."""
    cases: dict[str, list[str]] = {}
    for path in sorted(HERE.glob("test_*.py")):
        for number, case in _claims(ast.parse(path.read_text(encoding="utf-8"))):
            cases.setdefault(number, []).append(f"{path.name}::{case}")
    return cases


def _claims(module: ast.Module) -> Iterator[tuple[str, str]]:
    for function in ast.walk(module):
        if isinstance(function, ast.FunctionDef):
            for decorator in function.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "statement":
                    for number in decorator.args:
                        yield ast.literal_eval(number), function.name
