"""A client in a child process, which can be killed.

Owns its start and its end by SIGKILL; what it does is its module's business.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).parents[1]


@contextmanager
def child_process(module: str, *arguments: object) -> Iterator[str]:
    """Run `python -m MODULE ARGUMENTS`; yields the first line that it says, and kills it afterwards."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            yield child.stdout.readline()
        finally:
            child.kill()
