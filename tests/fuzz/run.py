"""Fuzz one target with atheris, guided by the coverage of our own code: `run.py TARGET SECONDS [DIRECTORY]`.

Owns the search. What reaches more than the kept corpus goes to DIRECTORY (fuzz-found/TARGET unless
given); so does an input that breaks the target, as crash-*, and the exit status tells.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

# The targets too: a parser that is one comprehension has no branch to be guided by, and its statement has.
with atheris.instrument_imports(include=["fuzz", "intercept_protocol", "interceptd", "tomllib"]):
    from fuzz.targets import KEPT, TARGETS

LONGEST = {"frames": 4096, "receiver": 1024, "events": 512, "handoff": 512}
"""Bytes of an input at most, where the default of the fuzzer would take long: these are read byte by byte."""


def main(target: str, seconds: int, directory: str | None = None) -> None:
    """Does not return: the fuzzer ends the process."""
    found = Path(directory) if directory else Path("fuzz-found") / target
    found.mkdir(parents=True, exist_ok=True)
    kept = KEPT / target
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={seconds}",
            f"-max_len={LONGEST.get(target, 2048)}",
            f"-artifact_prefix={found}/",
            "-timeout=20",
            "-rss_limit_mb=2048",
            "-print_final_stats=1",
            *([f"-dict={KEPT / 'wire.dict'}"] if (KEPT / "wire.dict").is_file() else []),
            str(found),
            *([str(kept)] if kept.is_dir() else []),
        ],
        TARGETS[target],
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:4])
