"""Whether the tests kill a mutant.

Owns the runs. The tests are collected once; each run is a forked child of that process, in which the changed
function has been given its changed code, and has no start-up to pay for. The first run has no mutant, and
coverage: it tells which tests pass through a line and how long they take. Must not know which mutants exist.
"""

from __future__ import annotations

import gc
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import CodeType, FunctionType

import coverage
import hypothesis
import pytest

from mutation.mutants import Mutant

PROFILE = "mutation"
"""Hypothesis draws the same, and less, each time: a mutant is killed in every run or in none."""
hypothesis.settings.register_profile(
    PROFILE, derandomize=True, database=None, deadline=None, max_examples=25, report_multiple_bugs=False
)
CPU_SECONDS, CPU_FACTOR = 10, 3
"""A run has so long, and so many times what its tests took, coverage included, without a mutant."""
WALL_FACTOR = 10
"""The machine may have other work; a run that only waits ends after so many times its CPU time."""
MEMORY_BYTES = 4 << 30


class Verdict(Enum):
    KILLED = "killed"
    OUT_OF_TIME = "killed: out of time or memory"
    SURVIVED = "survived"


class Laboratory:
    """A pytest plugin that holds what was collected and runs parts of it in children."""

    def __init__(self, work: Callable[[Laboratory], None], sources: Path) -> None:
        self._work = work
        self._sources = sources
        self._session: pytest.Session | None = None
        self._seconds: dict[str, float] = {}
        self._passing: dict[str, dict[int, list[str]]] = {}

    @property
    def test_count(self) -> int:
        return len(self._seconds)

    def trial(self, mutant: Mutant) -> Verdict:
        """Run the tests that may notice, the quickest first, until one does."""
        tests = self._tests_of(mutant)
        if not tests:
            return Verdict.SURVIVED

        def run() -> bool:
            _infect(mutant)
            return self._run(tests)

        seconds = CPU_SECONDS + CPU_FACTOR * sum(self._seconds[test] for test in tests)
        match _in_child(run, cpu_seconds=int(seconds)):
            case 0:
                return Verdict.SURVIVED
            case 1:
                return Verdict.KILLED
            case _:
                return Verdict.OUT_OF_TIME

    def _tests_of(self, mutant: Mutant) -> list[str]:
        """Those that pass through the changed lines; of what runs at import, through the module at all."""
        by_line = self._passing.get(str(mutant.path), {})
        lines = mutant.lines if mutant.scope else by_line
        found = {test for line in lines for test in by_line.get(line, ())}
        return sorted(found, key=lambda test: (self._seconds[test], test))

    def _measure(self) -> None:
        """The run without a mutant. Raises if a test fails: then nothing can be said of mutants."""
        with tempfile.TemporaryFile() as learnt:

            def run() -> bool:
                measured = coverage.Coverage(data_file=None, source=[str(self._sources)], config_file=False)
                recorder = _Recorder(measured)
                assert self._session is not None
                self._session.config.pluginmanager.register(recorder)
                measured.start()
                with suppress(pytest.Session.Failed):
                    self._run([item.nodeid for item in self._session.items])
                measured.stop()
                data = measured.get_data()
                passing = {file: data.contexts_by_lineno(file) for file in data.measured_files()}
                pickle.dump((recorder.failed, recorder.seconds, passing), learnt)
                learnt.flush()
                return True

            _in_child(run, cpu_seconds=3600)
            learnt.seek(0)
            failed, self._seconds, self._passing = pickle.load(learnt)
            if failed:
                pytest.exit(f"fails without any mutant: {failed[0]}")

    def _run(self, tests: Sequence[str]) -> bool:
        assert self._session is not None
        order = {test: number for number, test in enumerate(tests)}
        chosen = [item for item in self._session.items if item.nodeid in order]
        self._session.items = sorted(chosen, key=lambda item: order[item.nodeid])
        self._session.config.hook.pytest_runtestloop(session=self._session)
        return not self._session.testsfailed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if self._session is not None:
            return None  # in a child: pytest's own loop runs what was chosen
        self._session = session
        gc.freeze()  # a child then copies less
        self._measure()
        self._work(self)
        return True


class _Recorder:
    """A pytest plugin: which test is running, for coverage, and the CPU time that it took."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self._measured = measured
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._measured.switch_context(nodeid)
        self.seconds[nodeid] = -time.process_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] += time.process_time()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += [report.nodeid] * report.failed


def experiment(tests: Sequence[str], sources: Path, work: Callable[[Laboratory], None]) -> None:
    """Collect the tests, and call `work` with a laboratory that has them."""
    options = ("-q", "-s", "-x", "--no-header", "--no-summary", "-p", "no:cacheprovider")
    imported = ("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")
    drawn = f"--hypothesis-profile={PROFILE}"
    pytest.main([*options, *imported, drawn, *tests], plugins=[Laboratory(work, sources)])


def _infect(mutant: Mutant) -> None:
    """Replace the live function, or the constant in every module that imported it, by the mutant's."""
    changed = compile(mutant.tree(), str(mutant.path), "exec")
    if mutant.scope:
        (code,) = [code for code in _codes(changed) if code.co_qualname == mutant.scope]
        for function in _live_functions(mutant):
            function.__code__ = code
        return
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("interceptd")]
    (own,) = [module for module in modules if getattr(module, "__file__", None) == str(mutant.path)]
    values = {"__name__": own.__name__}
    exec(changed, values)
    for name in mutant.assigned:
        old = getattr(own, name)
        for module in modules:
            if getattr(module, name, None) is old:
                setattr(module, name, values[name])


def _live_functions(mutant: Mutant) -> list[FunctionType]:
    """However it is decorated: all functions that run the code of that name."""
    gc.unfreeze()
    found = [
        each
        for each in gc.get_objects()
        if isinstance(each, FunctionType)
        and each.__code__.co_filename == str(mutant.path)
        and each.__code__.co_qualname == mutant.scope
    ]
    assert found, f"{mutant.scope} is nowhere"
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _in_child(run: Callable[[], bool], *, cpu_seconds: int) -> int:
    """0 if `run` was content, 1 if not or if it raised; another number if a limit ended it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            signal.alarm(WALL_FACTOR * cpu_seconds)
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            code = int(not run())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
