"""The small VMM in C, driven from here: a process that takes a command a line and answers each.

Owns the process, and how commands are spelled (clients/c/vmm/commands.c has them). Must not know how it was
built, nor what is right.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from intercept_client.kvm import Coverage, KvmUnavailable, PartitionSetting, Stop, StopReason
from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.messages import MmioGranularity, RequestedKind
from intercept_protocol.outcomes import Answer, AnyAnswer, LaterAnswer, Outcome

from .emulated import PATIENCE, REPORTS_KEPT
from .programs import Program
from .vmm import BAR_GFN, ENTRY, PROGRAM_BYTES, RAM_PAGES

NO_DAEMON: Final = 3
NO_KVM: Final = 4
"""Its exit codes for these."""
_LOOK_EVERY: Final = 0.001
_FIRST_COUNTERS: Final = ("completed", "forwarded", "replayed", "kvm_mmio_exits")
_ANSWERS: Final = {(answer.outcome, answer.reason): answer for answer in Answer}
_OUTCOMES: Final = frozenset(map(str, Outcome))
_REASONS: Final = {answer.reason: answer for answer in Answer}


class CVmmFailed(OSError):
    """The process refused a command, or ended; the text says why."""


@dataclass(frozen=True, slots=True)
class CTally:
    """As `Tally`."""

    exits: Counter[str]
    intercepts: Counter[AnyAnswer]
    completed: int
    forwarded: int
    replayed: int
    first_touches: list[float]
    memslot_times: list[float]
    """Seconds of each of `first_touches` that KVM spent on the memslot."""


@dataclass(frozen=True, slots=True)
class CMemory:
    """A BAR of the VMM, or its RAM."""

    vmm: CVmm
    index: int
    gfn: int

    @property
    def gpa(self) -> int:
        return self.gfn << PAGE_SHIFT

    def read(self, offset: int, size: int) -> bytes:
        return bytes.fromhex(self._ask("read", offset, size)[0])

    def write(self, offset: int, data: bytes) -> None:
        self._ask("write", offset, data.hex())

    def word(self, offset: int) -> int:
        return int.from_bytes(self.read(offset, 4), "little")

    def move(self, gfn: int) -> None:
        self.remove()
        self._ask("add", gfn)

    def unmap(self) -> None:
        with self.changing():
            self.unmap_unannounced()
        self.remove()

    def reuse(self) -> None:
        self._ask("stranger")

    def hand_over(self) -> None:
        with self.changing():
            self.reuse()
            self.remove()

    def take_back(self) -> None:
        self._ask("back")
        self._ask("add", self.gfn)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """The block is announced as a change of this memory."""
        self._ask("begin")
        yield
        self._ask("end")

    def unmap_unannounced(self) -> None:
        self._ask("unmap")

    def truncate(self) -> None:
        """Its file, to nothing: touching it faults from now on."""
        self._ask("cut")

    def remove(self) -> None:
        """Its region."""
        self._ask("remove")

    def is_reached(self) -> bool:
        """Whether the guest may read its first page right now."""
        return self._ask("reaches") == ["1"]

    def is_full_of(self, byte: int) -> bool:
        """Whether what is mapped at its address, a stranger's memory perhaps, has that byte only."""
        return self._ask("holds", byte) == ["1"]

    def _ask(self, verb: str, *arguments: object) -> list[str]:
        return self.vmm.ask(verb, self.index, *arguments)


@dataclass(frozen=True, slots=True)
class CReports:
    """As `Reports`."""

    vmm: CVmm

    @property
    def count(self) -> int:
        return int(self.vmm.ask("reports", 0)[0])

    @property
    def kept(self) -> list[int]:
        return self._latest(REPORTS_KEPT)[1]

    def take_values(self) -> set[int]:
        return {int(word) for word in self.vmm.ask("values")}

    def wait(self, more: int = 1) -> list[int]:
        wanted = self.count + more
        _wait(lambda: self.count >= wanted)
        return self._latest(more)[1]

    def wait_for(self, value: int) -> None:
        since = self.count

        def is_there() -> bool:
            count, kept = self._latest(REPORTS_KEPT)
            return count > since and value in kept[since - count :]

        _wait(is_there)

    def _latest(self, most: int) -> tuple[int, list[int]]:
        """How many were reported, and the last of them."""
        count, *values = map(int, self.vmm.ask("reports", most))
        return count, values


@dataclass(frozen=True, slots=True)
class CVcpu:
    """A vCPU, and its run."""

    vmm: CVmm
    index: int

    @property
    def tally(self) -> CTally:
        counted = self._counters()
        touches = [
            [float(part) / 1e6 for part in word.split("/")] for word in self.vmm.ask("touches", self.index)
        ]
        return CTally(
            exits=Counter(
                {key.removeprefix("exit."): n for key, n in counted.items() if key.startswith("exit.")}
            ),
            intercepts=Counter({_answer(key): n for key, n in counted.items() if _is_answer(key)}),
            completed=counted["completed"],
            forwarded=counted["forwarded"],
            replayed=counted["replayed"],
            first_touches=[total for total, _ in touches],
            memslot_times=[memslot for _, memslot in touches],
        )

    @property
    def mmio_exits(self) -> int | None:
        """By KVM's own count."""
        return self._counters().get("kvm_mmio_exits")

    def restart(self, **registers: int) -> None:
        """Reset it, stopped, to the beginning of its program."""
        self.vmm.ask("restart", self.index, self.entry, *_spelled(registers))

    @property
    def entry(self) -> int:
        return ENTRY + self.index * PROGRAM_BYTES

    def done(self) -> bool:
        return self._stop() is not None

    def result(self, timeout: float | None = None) -> Stop:
        """Block until it has stopped; returns why. Raises TimeoutError."""
        _wait(lambda: self._stop() is not None, PATIENCE if timeout is None else timeout)
        stop = self._stop()
        assert stop is not None
        return stop

    def _stop(self) -> Stop | None:
        reason, gpa, answer, *detail = self.vmm.ask("state", self.index)
        if reason == "NOT_STOPPED":
            return None
        return Stop(
            StopReason[reason],
            None if gpa == "-" else int(gpa, 16),
            _REASONS.get(answer),
            " ".join(detail),
        )

    def _counters(self) -> dict[str, int]:
        pairs = (word.split("=") for word in self.vmm.ask("tally", self.index))
        return {key: int(count) for key, count in pairs}


class CVmm:
    """As `Vmm`. Threads may share it."""

    def __init__(self, binary: Path, path: str, setting: PartitionSetting) -> None:
        """Raises `KvmUnavailable`, or `CVmmFailed` if it finds no daemon at `path`."""
        options = ["-w"] if setting.coverage is Coverage.WATCHED else []
        options += ["-p"] if setting.mmio_granularity is MmioGranularity.PAGE else []
        self._lock = threading.Lock()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - kill closes it
        process = subprocess.Popen(
            [binary, *options, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._commands, self._answers = process, process.stdin, process.stdout
        self.reports: Final = CReports(self)
        self.vcpus: Final[list[CVcpu]] = []
        try:
            self.ram: Final = self.add_bar(RAM_PAGES, at=0, kind=RequestedKind.MOVABLE, executable=True)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises `CVmmFailed` if it does not end well, and nothing was raised before."""
        try:
            self.close()
        except CVmmFailed:
            if error is None:
                raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """Let it stop its vCPUs and end its partition. Raises `CVmmFailed` if that fails."""
        self._commands.close()
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise CVmmFailed("the VMM in C does not end") from None
        else:
            if status:
                raise self._failure(status)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it at once. May be repeated."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._commands, self._answers, self._said):
            with suppress(BrokenPipeError):  # a command that it did not take
                pipe.close()

    def ask(self, verb: str, *arguments: object) -> list[str]:
        """Send a command; returns the words of its answer. Raises `CVmmFailed`."""
        line = " ".join((verb, *map(str, arguments)))
        with self._lock:
            try:
                self._commands.write(line + "\n")
                self._commands.flush()
                answer = self._answers.readline()
            except BrokenPipeError:
                answer = ""
        if not answer:
            raise self._failure(self._process.wait(PATIENCE))
        verdict, *words = answer.split()
        if verdict != "ok":
            raise CVmmFailed(f"the VMM in C refused {verb!r}: {' '.join(words)}")
        return words

    def add_bar(
        self,
        page_count: int,
        *,
        at: int = BAR_GFN,
        kind: RequestedKind = RequestedKind.MMIO,
        writable: bool = True,
        executable: bool = False,
    ) -> CMemory:
        """As `Vmm.add_bar`."""
        rights = "r" + "w" * writable + "x" * executable
        (index,) = self.ask("bar", at, page_count, kind, rights)
        return CMemory(self, int(index), at)

    def add_vcpu(self, program: Program, **registers: int) -> CVcpu:
        """As `Vmm.add_vcpu`."""
        vcpu = CVcpu(self, len(self.vcpus))
        self.ram.write(vcpu.entry, program.code)
        self.ask("vcpu", vcpu.entry, *_spelled(registers))
        self.vcpus.append(vcpu)
        return vcpu

    def start(self) -> Sequence[CVcpu]:
        """As `Vmm.start`."""
        self.ask("start")
        return self.vcpus

    def wait(self) -> None:
        """Block until no vCPU runs: without looking again and again, as `result` does."""
        self.ask("wait")

    def stop(self) -> list[Stop]:
        """As `Vmm.stop`."""
        self.ask("stop")
        return [vcpu.result() for vcpu in self.vcpus]

    @property
    def scratch_accesses(self) -> int:
        return int(self.ask("accesses")[0])

    @property
    def memslots(self) -> int:
        return int(self.ask("slots")[0])

    @property
    def lost_because(self) -> str | None:
        """Why the daemon is lost; None while it is there."""
        is_lost, *why = self.ask("lost")
        return " ".join(why) if is_lost == "1" else None

    def mmio_exits(self, index: int) -> int | None:
        """As `Vmm.mmio_exits`."""
        return self.vcpus[index].mmio_exits

    def survived(self) -> tuple[int, int]:
        """As `Vmm.survived`."""
        restarts, open_invalidations = map(int, self.ask("survived"))
        return restarts, open_invalidations

    def _failure(self, status: int) -> CVmmFailed | KvmUnavailable:
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip()
        if status == NO_KVM:
            return KvmUnavailable(said)
        return CVmmFailed(said if status == NO_DAEMON else f"the VMM in C ended with status {status}: {said}")


def _wait(is_there: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Look until it is there. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the guest did not do it within {seconds:g} s")
        time.sleep(_LOOK_EVERY)


def _spelled(registers: dict[str, int]) -> list[str]:
    return [f"{name}={value}" for name, value in registers.items()]


def _is_answer(key: str) -> bool:
    return key.partition(".")[0] in _OUTCOMES


def _answer(key: str) -> AnyAnswer:
    outcome, reason = key.split(".")
    return _ANSWERS.get((Outcome(outcome), reason)) or LaterAnswer(Outcome(outcome), reason)
