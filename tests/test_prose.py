"""A few words that made our prose read as translated stay out of every tracked text.

Only these are checked; everything else is for the reader of a change to judge.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BANNED = re.compile(r"\b(?:mend|(?:is|are)[\s#]+had\b|whoever)", re.IGNORECASE)
"""Say fix; say who has it, or acquired; name the person or the part. Line breaks may separate the words."""
NOT_PROSE = re.compile(r"tests/test_prose\.py|tests/fuzz/corpus/.*|protocol/vectors/.*")
"""This file, which names the words, and what machines wrote."""


def prose() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git work tree: only tracked files are checked")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and not NOT_PROSE.fullmatch(name)]


def found(text: str) -> list[str]:
    """Each banned word with the number of its line."""
    return [f"{text.count(chr(10), 0, word.start()) + 1}: {word[0]}" for word in BANNED.finditer(text)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("to mend it", ["1: mend"]),
        ("a lock that is\n# had at once", ["1: is\n# had"]),
        ("which are had\nWhoever", ["1: are had", "2: Whoever"]),
        ("amend, recommended, this handle, are hadrons", []),
    ],
)
def test_a_banned_word_is_found_with_its_line_and_its_likes_are_not(text: str, words: list[str]) -> None:
    assert found(text) == words


def test_no_tracked_text_has_a_banned_word() -> None:
    wrong: list[str] = []
    for name in prose():
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            wrong += [f"{name}:{word}" for word in found(content.decode(errors="replace"))]
    assert wrong == []
