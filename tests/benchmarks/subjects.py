"""What is measured side by side: every server, what is asked of it, and by which client.

Owns the list. Must not know how often, or what comes of it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from running import HERE, Command, Load, Place, Sample, build, daemon_command, server

FLOOR = "C echo"
FLOOR_WITHOUT_GCC = "Python echo"
SERVERS = HERE / "servers"
PYTHON_ECHO: Command = (sys.executable, SERVERS / "python_echo.py")
GIB_PAGES = 1 << 18


@dataclass(frozen=True, slots=True)
class Subject:
    """One line of the table. `by_python`: the load comes from the client in Python, whose cost counts."""

    name: str
    scenario: str
    path: Path
    options: tuple[object, ...] = ()
    by_python: bool = False

    def measure(self, load: Load, place: Place, vps: int, seconds: float) -> Sample:
        options = ("-v", vps, "-t", seconds, *self.options)
        return load.measure(self.scenario, self.path, place, *options, by_python=self.by_python)


@contextmanager
def subjects(scratch: Path, load: Load, place: Place, *, alone: bool) -> Iterator[list[Subject]]:
    """All servers running; `alone` adds what is asked of one VP only."""
    daemon = scratch / "vmm.sock"
    with ExitStack() as running:
        found = []
        for name, scenario, command in _others(scratch, load):
            path = Path(command[-1])
            running.enter_context(server(command, path, place))
            found.append(Subject(name, scenario, path, by_python=scenario == "grpc"))
        running.enter_context(server(daemon_command(daemon), daemon, place))
        found += [Subject(name, name, daemon) for name in ("already_mapped", "no_region")]
        if load.in_c:
            found.append(Subject("already_mapped, Python client", "already_mapped", daemon, by_python=True))
        if load.in_c and alone:
            found += [Subject(name, name, daemon) for name in ("first_touch", "invalidate", "unmap_vma")]
            found.append(Subject("first_touch of 1 GiB", "first_touch", daemon, ("-g", GIB_PAGES)))
        yield found


def _others(scratch: Path, load: Load) -> Iterator[tuple[str, str, Command]]:
    """The servers other than interceptd: name, requests, and how they are started."""
    if load.in_c:
        yield FLOOR, "echo", [build(scratch, "servers/c_echo.c"), scratch / "c.sock"]
    yield FLOOR_WITHOUT_GCC, "echo", [*PYTHON_ECHO, scratch / "python.sock"]
    yield "trio echo", "echo", [sys.executable, SERVERS / "trio_echo.py", scratch / "trio.sock"]
    asyncio: list[str | Path] = [sys.executable, SERVERS / "asyncio_echo.py"]
    yield "asyncio echo", "echo", [*asyncio, scratch / "asyncio.sock"]
    if importlib.util.find_spec("uvloop"):
        yield "uvloop echo", "echo", [*asyncio, "--uvloop", scratch / "uvloop.sock"]
    if importlib.util.find_spec("grpc"):
        yield (
            "grpc.aio, Python client",
            "grpc",
            [sys.executable, SERVERS / "grpc_echo.py", scratch / "grpc.sock"],
        )
