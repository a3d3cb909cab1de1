"""`make bench-start`: from exec to the first answered intercept, beside an interpreter that does nothing."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from report import CONSOLE
from running import Load, Place, daemon_command, server

ROUNDS = 9


def main() -> None:
    bare, whole = [], []
    with tempfile.TemporaryDirectory(prefix="interceptd-start-") as directory:
        load = Load(Path(directory))
        for round_number in range(ROUNDS):
            path = Path(directory) / f"{round_number}.sock"
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", "pass"], check=True)
            bare.append(time.perf_counter() - began)
            began = time.perf_counter()
            with server(daemon_command(path), path, Place.ANY_CPU):
                load.measure("no_region", path, Place.ANY_CPU, "-t", 0.001)
                whole.append(time.perf_counter() - began)
    CONSOLE.print(
        f"exec to first answer: {median(whole):.3f} s ({min(whole):.3f} to {max(whole):.3f}), "
        f"of which an interpreter that does nothing takes {median(bare):.3f} s"
    )


if __name__ == "__main__":
    main()
