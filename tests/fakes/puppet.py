"""The other side of a `LiveVmm`: a child process that obeys commands.

Owns starting and ending the process, and the messages. No wait is longer than `PATIENCE`.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Concatenate, Final, Generic, ParamSpec, Self, TypeVar, cast

from fakes.eventually import PATIENCE

if TYPE_CHECKING:
    from fakes.live_vmm import LiveVmm

MESSAGE_BYTES: Final = 1 << 17
TESTS: Final = Path(__file__).parent.parent
ENVIRONMENT: Final = {"PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))}
"""What lets a child run the modules that lie here."""
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Order:
    """What to do; `apart`: in a thread, while other orders are obeyed."""

    number: int
    verb: Callable[..., object]
    arguments: tuple[object, ...]
    options: Mapping[str, object]
    apart: bool


@dataclass(frozen=True, slots=True)
class Report:
    number: int
    result: object


@dataclass(frozen=True, slots=True)
class Failed:
    kind: str
    number: int | None
    text: str


class VmmFailed(Exception):
    """What a verb raised in the VMM's process."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(f"{failed.kind}: {failed.text}")
        self.kind = failed.kind
        self.number = failed.number
        self.text = failed.text


class Pending(Generic[T]):
    """An order that is being obeyed in a thread of the VMM."""

    def __init__(self, puppet: Puppet, number: int) -> None:
        self._puppet = puppet
        self.number = number

    def result(self, patience: float = PATIENCE) -> T:
        """Wait for it; TimeoutError when it does not end, `VmmFailed` for what it raised."""
        return cast("T", self._puppet.result_of(self.number, patience))


class Puppet:
    """A `LiveVmm` in a child process, run by the command `launch`."""

    def __init__(self, launch: Sequence[str] = ()) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(PATIENCE)
        self._results: dict[int, object] = {}
        self._orders = 0
        with theirs:
            self._process = subprocess.Popen(
                [*launch, sys.executable, "-m", "fakes.live_vmm_program", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | ENVIRONMENT,
            )
        self.own_pid = self._first_word()
        """As the VMM sees it."""

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def waits_in_the_kernel(self) -> str:
        """Where its threads wait, by the kernel's function names."""
        threads = Path(f"/proc/{self.pid}/task").iterdir()
        return " ".join((thread / "wchan").read_text() for thread in threads)

    def do(self, verb: Callable[Concatenate[LiveVmm, P], T], /, *arguments: P.args, **options: P.kwargs) -> T:
        """Send the command; return its result or raise its error."""
        return cast("T", self.result_of(self._order(verb, arguments, options, apart=False)))

    def start(
        self, verb: Callable[Concatenate[LiveVmm, P], T], /, *arguments: P.args, **options: P.kwargs
    ) -> Pending[T]:
        """Start it in a new thread."""
        return Pending(self, self._order(verb, arguments, options, apart=True))

    def result_of(self, number: int, patience: float = PATIENCE) -> object:
        self._control.settimeout(patience)
        while number not in self._results:
            self.receive()
        result = self._results.pop(number)
        if isinstance(result, Failed):
            raise VmmFailed(result)
        return result

    def fileno(self) -> int:
        """Readable when a report has come."""
        return self._control.fileno()

    def receive(self) -> int:
        """Wait for a report, of any order, and return the order's number."""
        data = self._control.recv(MESSAGE_BYTES)
        if not data:
            raise EOFError("the VMM's process is gone")
        report: Report = pickle.loads(data)
        self._results[report.number] = report.result
        return report.number

    def kill(self) -> None:
        self._process.kill()

    def wait_ended(self) -> int:
        return self._process.wait(PATIENCE)

    def leave(self) -> None:
        """Let it end by itself."""
        self._control.close()
        self.wait_ended()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._control.close()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(PATIENCE)

    def _first_word(self) -> int:
        try:
            pid: int = pickle.loads(self._control.recv(MESSAGE_BYTES))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return pid

    def _order(
        self,
        verb: Callable[..., object],
        arguments: tuple[object, ...],
        options: Mapping[str, object],
        *,
        apart: bool,
    ) -> int:
        self._orders += 1
        self._control.send(pickle.dumps(Order(self._orders, verb, arguments, dict(options), apart)))
        return self._orders


StartVmm = Callable[..., Puppet]
"""Starts a VMM's process with the options of `Puppet`, which the caller ends."""
