"""`interceptd serve` as a child process, seen from outside.

Owns starting it with a configuration, its signals and end, and what can be observed of it: its log, the
operator's statistics, its descriptors and memory in /proc. Must not import the daemon.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from fakes.eventually import PATIENCE, eventually
from fakes.raw_client import RawConnection


class Footprint(NamedTuple):
    """What a daemon holds, and what a client that is gone must not have added to."""

    tasks: int
    connections: int
    partitions: int
    vps: int
    descriptors: int


class DaemonProcess:
    """A daemon in `directory`, which its sockets, configuration and log are put in."""

    def __init__(
        self,
        directory: Path,
        *,
        config: str = "",
        environment: Mapping[str, str] | None = None,
        umask: int = -1,
        log: Path | None = None,
        launch: Sequence[str] = (sys.executable, "-m", "interceptd"),
    ) -> None:
        self.socket = directory / "vmm.sock"
        self.operator_socket = directory / "operator.sock"
        config_file = directory / "interceptd.toml"
        config_file.write_text(config)
        self._log = log or directory / "log"
        self._operator: RawConnection | None = None
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [*launch, "serve", "--socket", str(self.socket), "--config", str(config_file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | dict(environment or {}),
                umask=umask,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """No daemon outlives its test, in any state."""
        self._hang_up()
        self._process.kill()
        self._process.wait(PATIENCE)

    # ------------------------------------------------ its life

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, -n for a death by signal n; None while it runs."""
        return self._process.poll()

    def wait_serving(self) -> Self:
        """Block until it answers its operator: the VMMs' socket was bound before that one."""
        eventually(lambda: self.status is not None or self._answers(), True)
        assert self.status is None, f"the daemon ended with status {self.status}: {self.log_text()}"
        return self

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait_ended(self) -> int:
        """Block until the process is gone; returns its exit status."""
        return self._process.wait(PATIENCE)

    def stop(self) -> int:
        """End it as a service manager does."""
        self._hang_up()
        self.signal(signal.SIGTERM)
        return self.wait_ended()

    # ------------------------------------------------ what can be seen of it

    def operator(self) -> RawConnection:
        """The operator's connection that the observations below are made with."""
        if self._operator is None:
            self._operator = RawConnection(self.operator_socket)
            self._operator.say_hello("operator")
        return self._operator

    def statistics(self) -> Any:
        return self.operator().ask("statistics")

    def partition_ids(self) -> list[int]:
        partitions = self.operator().ask("list_partitions")["partitions"]
        return [partition["partition_id"] for partition in partitions]

    def vp_states(self, partition_id: int) -> list[str]:
        inspected = self.operator().ask("inspect_partition", {"partition_id": partition_id})
        return [vp["state"] for vp in inspected["virtual_processors"]]

    def footprint(self) -> Footprint:
        seen = self.statistics()
        descriptors = len(os.listdir(f"/proc/{self.pid}/fd"))
        return Footprint(seen["tasks"], seen["connections"], seen["partitions"], seen["vps"], descriptors)

    def intercepts(self) -> int:
        """Intercepts that were answered since the daemon began."""
        return sum(
            count for reasons in self.statistics()["intercepts"].values() for count in reasons.values()
        )

    def resident_kib(self) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

    def log_text(self) -> str:
        return self._log.read_text() if self._log.is_file() else ""

    def log_lines(self) -> list[dict[str, Any]]:
        """The log of a daemon that logs JSON, every whole line of it."""
        return [json.loads(line) for line in self.log_text().splitlines(keepends=True) if line.endswith("\n")]

    def events(self) -> list[str]:
        """Without `long_step`, which a busy machine causes: a step that starts a thread waits for it."""
        return [line["event"] for line in self.log_lines() if line["event"] != "long_step"]

    def wait_event(self, event: str) -> None:
        eventually(lambda: event in self.events(), True)

    # ------------------------------------------------ helpers

    def _answers(self) -> bool:
        try:
            self.operator()
        except OSError:
            return False
        return True

    def _hang_up(self) -> None:
        if self._operator is not None:
            self._operator.close()
            self._operator = None


StartDaemon = Callable[..., DaemonProcess]
"""Starts a daemon with the options of `DaemonProcess`, which the caller ends."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "interceptd", "serve", *arguments]


def run_to_end(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `interceptd serve` with what it is to refuse."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=os.environ | dict(environment or {}),
    )
