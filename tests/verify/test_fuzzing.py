"""Each byte parser under a fuzzer that is guided by the coverage of our code, for a bounded time."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fuzz.targets import TARGETS

TESTS = Path(__file__).parents[1]
SECONDS = 15

pytestmark = [
    pytest.mark.verify,
    pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is missing: pip install '.[fuzz]'"),
]


def fuzzed(target: str, seconds: int, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TESTS / "fuzz" / "run.py"), target, str(seconds), str(directory)],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=seconds + 120,
        check=False,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_fuzzer_finds_no_input_that_breaks_the_target(tmp_path: Path, target: str) -> None:
    done = fuzzed(target, SECONDS, tmp_path)
    print("\n".join(line for line in done.stderr.splitlines() if "DONE" in line or "executed" in line))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
