"""Fuzz one target with atheris, guided by the coverage of our own code: `run.py TARGET SECONDS [CORPUS]`.

Owns the search. What it finds new is written to CORPUS, a directory beside the kept one unless given; input that
breaks a target is written as crash-* in the working directory, and the exit status tells.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["intercept_protocol", "interceptd", "tomllib"]):
    from fuzz.targets import TARGETS

KEPT = Path(__file__).with_name("corpus")
LONGEST = {"frames": 4096, "receiver": 1024, "events": 512}
"""Bytes of an input at most, where the default of the fuzzer would take long: these are read byte by byte."""


def main(target: str, seconds: int, corpus: str | None = None) -> None:
    """Does not return: the fuzzer ends the process."""
    found = Path(corpus) if corpus else Path("found") / target
    found.mkdir(parents=True, exist_ok=True)
    kept = KEPT / target
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={seconds}",
            f"-max_len={LONGEST.get(target, 2048)}",
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
