"""`interceptd keep` around daemons that kill themselves where a test says (`fakes.killed_daemon`).

Owns the keeper's process, the plan, and what can be seen of both. Must not know what a daemon does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from fakes.eventually import PATIENCE, eventually
from fakes.keeper_process import children
from fakes.killed_daemon import MUTANT_VARIABLE, Plan
from fakes.puppet import ENVIRONMENT

LAUNCH: Final = """
import sys
from interceptd.keeper.keeper import Keeper
plan, patience, *arguments = sys.argv[1:]
daemon = [sys.executable, "-m", "fakes.killed_daemon", plan]
sys.exit(Keeper(daemon, arguments, float(patience)).run())
"""
"""What `interceptd keep` becomes, with another program to keep."""
TROUBLE: Final = frozenset({
    "connection_failed", "descriptors_let_go", "descriptors_not_stored", "descriptors_refused",
    "map_broke_down", "message_ignored", "nothing_kept", "partition_lost", "partition_not_kept",
    "partition_not_recovered", "passed_descriptor_not_used", "vital_task_failed",
})  # fmt: skip
"""What nobody logs whose daemons are only killed."""


class KeptDaemon:
    """A keeper in `directory`, which the sockets, the plan and the log are put in."""

    def __init__(
        self,
        directory: Path,
        *,
        patience: float = PATIENCE,
        config: str = "",
        mutant: str = "",
        launch: Sequence[str] = (sys.executable, "-c", LAUNCH),
    ) -> None:
        self._directory, self._patience = directory, patience
        self.socket = directory / "vmm.sock"
        self.operator_socket = directory / "operator.sock"
        self._log = directory / "log"
        self._plan = Plan(directory / "plan")
        self._orphans: list[int] = []
        self.config = config_file = directory / "interceptd.toml"
        config_file.write_text(config)
        serve = ["serve", "--socket", str(self.socket), "--config", str(config_file)]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [*launch, str(directory / "plan"), str(patience), *serve],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | ENVIRONMENT | {MUTANT_VARIABLE: mutant},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Neither keeper nor daemon outlives its test, in any state."""
        orphans = self._orphans
        if self._process.poll() is None:
            self.signal(signal.SIGSTOP)  # it starts no other
            orphans = children(self.keeper)
        for daemon in orphans:
            with suppress(ProcessLookupError):
                os.kill(daemon, signal.SIGKILL)
        self._process.kill()
        self._process.wait(PATIENCE)

    # ------------------------------------------------ their lives

    @property
    def keeper(self) -> int:
        """The keeper's pid."""
        return self._process.pid

    @property
    def daemon(self) -> int:
        """The pid of the daemon that runs."""
        eventually(lambda: len(self._living()), 1)
        return self._living()[0]

    def _living(self) -> list[int]:
        return [pid for pid in children(self.keeper) if " Z " not in Path(f"/proc/{pid}/stat").read_text()]

    def wait_serving(self) -> Self:
        """Block until one more daemon has started than have ended."""
        eventually(
            lambda: self.count("daemon_started") > self.deaths or self._process.poll() is not None, True
        )
        assert self._process.poll() is None, self.log_text()
        return self

    def plan(self, *steps: tuple[str, int]) -> None:
        """Let the daemon, and those that follow, die at these points, and no others, once it is idle."""
        if steps:
            self.wait_idle()
        self._plan.set(*steps)

    def wait_idle(self) -> Self:
        """Block until the daemon waits for something. Just after an answer it has not marked it yet: if it
        dies then, its successor sends it again."""
        daemon = self.daemon
        eventually(lambda: " S " in Path(f"/proc/{daemon}/stat").read_text(), True)
        return self

    @property
    def reached(self) -> bool:
        """Whether each point of the plan was reached."""
        return self._plan.is_over

    def kill(self) -> None:
        """Kill the daemon that runs, and block until it is dead."""
        daemon = os.pidfd_open(self.daemon)
        try:
            signal.pidfd_send_signal(daemon, signal.SIGKILL)
            assert select.select([daemon], [], [], PATIENCE)[0]
        finally:
            os.close(daemon)

    @contextmanager
    def down(self) -> Iterator[None]:
        """Kill the daemon, and let no other start within the block."""
        daemon = self.daemon
        self.signal(signal.SIGSTOP)
        os.kill(daemon, signal.SIGKILL)
        eventually(lambda: " Z " in Path(f"/proc/{daemon}/stat").read_text(), True)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    @property
    def deaths(self) -> int:
        """Of daemons, since the start."""
        return self.count("daemon_process_ended")

    def signal(self, number: int) -> None:
        """To the keeper."""
        self._process.send_signal(number)

    def signal_daemon(self, number: int) -> None:
        os.kill(self.daemon, number)

    def kill_keeper(self) -> int:
        """Returns the pid of its daemon, which lives on."""
        self._orphans = [daemon := self.daemon]
        self._process.kill()
        self._process.wait(PATIENCE)
        return daemon

    def wait_ended(self) -> int:
        """Block until the keeper is gone; returns its exit status."""
        return self._process.wait(PATIENCE)

    def another(self) -> KeptDaemon:
        """A second keeper with the same arguments."""
        return KeptDaemon(self._directory, patience=self._patience, config=self.config.read_text())

    def stop(self) -> int:
        """End it as a service manager does."""
        self.signal(signal.SIGTERM)
        return self.wait_ended()

    # ------------------------------------------------ what can be seen of them

    def log_text(self) -> str:
        return self._log.read_text()

    def log(self) -> list[dict[str, Any]]:
        """Every whole line; a killed process may have left half of one."""
        lines = []
        for line in self.log_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return lines

    def count(self, event: str) -> int:
        return sum(line["event"] == event for line in self.log())

    def troubles(self) -> set[str]:
        """What was logged of `TROUBLE`."""
        return {line["event"] for line in self.log()} & TROUBLE

    def wait_event(self, event: str, count: int = 1) -> None:
        eventually(lambda: self.count(event) >= count, True)
