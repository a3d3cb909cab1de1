"""A `SurvivingVmm` in a container of its own, beside the daemon's.

Owns both sides: the program, which serves one round for each line that it reads and writes one when that is
done, and its container. The program must import only what the image has, and what lies here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fakes.container_host import IMAGE, ContainerHost
from fakes.eventually import PATIENCE, eventually
from fakes.surviving_vmm import Mode, SurvivingVmm

TESTS: Final = Path(__file__).parents[1]
SOCKET: Final = Path("/run/interceptd/vmm/vmm.sock")


def serve_round(vmm: SurvivingVmm) -> str:
    """A new region whose pages the guest touches, then all that must be true; the restarts so far."""
    vmm.touch(vmm.add(vmm.new_region(3)))
    vmm.check()
    return f"served, restarts {vmm.vmm.statistics().restarts}"


class ContainedVmm:
    """Runs as `uid` and has the daemon's `volume` read-only; `with` ends it."""

    def __init__(self, host: ContainerHost, directory: Path, mode: Mode, *, volume: str, uid: int) -> None:
        self._output = directory / f"{mode.name.lower()}.out"
        command = [
            *(
                str(host.commands / "podman"),
                "run",
                "--rm",
                "--interactive",
                "--network=none",
                f"--user={uid}",
            ),
            *(
                f"--volume={volume}:{SOCKET.parent}:ro",
                f"--volume={TESTS}:/tests:ro",
                "--env=PYTHONPATH=/tests",
            ),
            *("--entrypoint=python", IMAGE, "-m", "fakes.contained_vmm", mode.name),
        ]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output)
        self._rounds = 0

    def serve_round(self) -> str:
        """One round; what it says of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        self._rounds += 1
        eventually(lambda: self._process.poll() is not None or len(self._said()) >= self._rounds, True)
        return self._said()[-1]

    def _said(self) -> list[str]:
        return self._output.read_text().splitlines()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)


if __name__ == "__main__":
    with SurvivingVmm(SOCKET, Mode[sys.argv[1]]) as surviving:
        for _ in sys.stdin:
            print(serve_round(surviving), flush=True)
