"""No decision of the daemon depends on the wall clock, which may jump: it only dates log lines and events."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import interceptd

WALL_CLOCK: Final = {
    "time.time", "time.time_ns", "time.gmtime", "time.localtime", "time.ctime", "time.clock_gettime",
    "datetime.now", "datetime.utcnow", "datetime.today", "datetime.datetime.now", "date.today",
}  # fmt: skip

DATING: Final = {"event_bus.py", "log.py"}
"""An event, and a line of the keeper, say when it happened, for people."""


def names_read(source: str) -> set[str]:
    """Every dotted name in the source."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}


def test_no_part_of_the_daemon_reads_the_wall_clock() -> None:
    files = [*Path(interceptd.__file__).parent.rglob("*.py")]
    assert len(files) > 40
    readers = {file.name for file in files if names_read(file.read_text()) & WALL_CLOCK}
    assert readers == DATING


def test_a_reader_of_the_wall_clock_would_be_seen() -> None:
    assert names_read("import time\nstarted = time.time()") & WALL_CLOCK == {"time.time"}
