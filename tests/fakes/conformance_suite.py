"""The conformance suite, run as by hand: as a process, against a socket.

Owns the command line. Must not know what the cases are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from fakes.eventually import PATIENCE
from fakes.puppet import TESTS

SUITE: Final = TESTS / "conformance"
TOO_LONG: Final = 300.0
ALONE: Final = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "120"}
"""With pytest and msgpack and nothing else: its users have no more, and it starts in half the time."""


def run_suite(
    *options: str | Path, files: Iterable[Path] = (SUITE,), patience: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """The cases of these files; an answer that takes longer than `patience` seconds counts as missing."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *files, "--rootdir", SUITE, "-c", SUITE / "pytest.ini",
         *options, "--patience", str(patience), "-q", "-p", "no:cacheprovider"],
        env=os.environ | ALONE, capture_output=True, text=True, timeout=TOO_LONG, check=False,
    )  # fmt: skip
