"""The threads that ask the kernel: how many, whose turn it is, and that none outlives its being needed."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fakes.closers import closer, unclosed
from fakes.eventually import PATIENCE, eventually
from interceptd.address_space import Undecided
from interceptd.address_space import workers as workers_module
from interceptd.address_space.workers import (
    WORKER_DESCRIPTORS,
    Abandoned,
    Workers,
    pause_if_due,
    wait_for_turn,
)
from interceptd.connections.closer import Closer

NAME = "workers of 7"


class Held:
    """A question that the kernel answers when the test lets it."""

    def __init__(self) -> None:
        self.begun = trio.Event()
        self.answered_by: threading.Thread | None = None
        self._let_go = threading.Event()
        self._token = trio.lowlevel.current_trio_token()

    def __call__(self) -> threading.Thread:
        self._token.run_sync_soon(self.begun.set)
        assert self._let_go.wait(PATIENCE)
        self.answered_by = threading.current_thread()
        return self.answered_by

    def let_go(self) -> None:
        self._let_go.set()


@pytest.fixture
def workers() -> Iterator[Workers]:
    """Two of them, and nothing is left of them after the test."""
    descriptors = open_descriptors()
    made = Workers(2, NAME, closer())
    yield made
    made.close()
    wait_ended()
    assert open_descriptors() == descriptors


def wait_ended() -> None:
    eventually(lambda: any(thread.name == NAME for thread in threading.enumerate()), False)


def open_descriptors() -> int:
    """Those that workers have: what other tests left behind may be collected at any time."""
    descriptors = Path("/proc/self/fd").iterdir()
    return sum(str(opened.resolve()).endswith("anon_inode:[eventfd]") for opened in descriptors)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE):
        while not condition():
            await trio.lowlevel.checkpoint()


async def asked_in(workers: Workers, nursery: trio.Nursery) -> tuple[Held, trio.CancelScope]:
    """A question that is out, and how to give it up."""
    held, scope = Held(), trio.CancelScope()

    async def ask() -> None:
        with scope:
            await workers.ask(held)

    nursery.start_soon(ask)
    with trio.fail_after(PATIENCE):
        await held.begun.wait()
    return held, scope


async def test_a_question_is_answered_in_another_thread_than_trios(workers: Workers) -> None:
    assert await workers.ask(threading.get_ident) != threading.get_ident()


async def test_an_exception_of_a_question_propagates_and_the_thread_continues(workers: Workers) -> None:
    error = LookupError("as it is")

    def refuse() -> None:
        raise error

    with pytest.raises(LookupError) as raised:
        await workers.ask(refuse)
    assert raised.value is error
    assert await workers.ask(lambda: "answered") == "answered"


async def test_sequential_questions_use_one_thread(workers: Workers) -> None:
    assert await workers.ask(threading.get_ident) == await workers.ask(threading.get_ident)


async def test_a_thread_has_its_name_in_python_and_in_the_kernel(workers: Workers) -> None:
    def names() -> tuple[str, str]:
        return threading.current_thread().name, Path("/proc/thread-self/comm").read_text().strip()

    assert await workers.ask(names) == (NAME, NAME)


async def test_a_thread_is_busy_while_its_question_is_not_answered(
    workers: Workers, nursery: trio.Nursery
) -> None:
    assert workers.busy == 0
    held, _ = await asked_in(workers, nursery)
    assert workers.busy == 1
    held.let_go()
    await until(lambda: workers.busy == 0)


async def test_a_question_beyond_the_most_waits_for_a_thread_and_the_first_has_the_first_turn(
    workers: Workers, nursery: trio.Nursery
) -> None:
    first, _ = await asked_in(workers, nursery)
    second, _ = await asked_in(workers, nursery)
    order: list[str] = []

    async def ask(name: str) -> None:
        await workers.ask(lambda: order.append(name))

    nursery.start_soon(ask, "third")
    await wait_all_tasks_blocked()
    nursery.start_soon(ask, "fourth")
    await wait_all_tasks_blocked()
    assert order == []
    second.let_go()
    await until(lambda: order == ["third", "fourth"])
    await until(lambda: workers.busy == 1)
    first.let_go()


async def test_an_abandoned_query_keeps_its_thread_until_it_returns(
    workers: Workers, nursery: trio.Nursery
) -> None:
    held, scope = await asked_in(workers, nursery)
    scope.cancel()
    await wait_all_tasks_blocked()
    assert scope.cancelled_caught
    assert workers.busy == 1
    held.let_go()
    await until(lambda: workers.busy == 0)
    assert held.answered_by is not None
    held.answered_by.join(PATIENCE)
    assert not held.answered_by.is_alive()


async def test_a_thread_that_is_stuck_takes_no_later_question_along(
    workers: Workers, nursery: trio.Nursery
) -> None:
    stuck, scope = await asked_in(workers, nursery)
    scope.cancel()
    for _ in range(3):
        with trio.fail_after(PATIENCE):
            assert await workers.ask(lambda: "answered") == "answered"
    assert stuck.answered_by is None
    stuck.let_go()


async def test_when_all_threads_are_stuck_the_first_that_is_answered_makes_room(
    workers: Workers, nursery: trio.Nursery
) -> None:
    stuck = []
    for _ in range(2):
        held, scope = await asked_in(workers, nursery)
        scope.cancel()
        stuck.append(held)
    answers: list[str] = []

    async def ask() -> None:
        answers.append(await workers.ask(lambda: "answered"))

    nursery.start_soon(ask)
    await wait_all_tasks_blocked()
    assert (answers, workers.busy) == ([], 2)
    stuck[0].let_go()
    await until(lambda: answers == ["answered"])
    stuck[1].let_go()
    await until(lambda: workers.busy == 0)


async def test_a_query_abandoned_before_its_turn_is_never_made(
    workers: Workers, nursery: trio.Nursery
) -> None:
    out = [await asked_in(workers, nursery) for _ in range(2)]
    asked: list[str] = []
    with trio.move_on_after(0) as gave_up:
        await workers.ask(lambda: asked.append("asked"))
    assert gave_up.cancelled_caught
    for held, _ in out:
        held.let_go()
    await until(lambda: workers.busy == 0)
    assert await workers.ask(lambda: "next") == "next"
    assert asked == []


async def test_a_query_abandoned_before_its_thread_wakes_ends_only_the_thread(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread finds nothing to do and ends just before it is asked to. The descriptor that wakes it must
    still be open, and no other."""
    schedule = LateToLook()
    monkeypatch.setattr(os, "eventfd_read", schedule.read)
    monkeypatch.setattr(os, "eventfd_write", schedule.write)
    with trio.CancelScope() as scope:
        scope.cancel()
        await workers.ask(lambda: None)
    assert scope.cancelled_caught
    assert not schedule.thread.is_alive()
    await until(lambda: workers.busy == 0)
    assert await workers.ask(lambda: "next") == "next"


class LateToLook:
    """Holds the first thread at its first look at the question, until the second write; that is made once
    the thread has ended."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self._held, self._let_go = threading.Event(), threading.Event()
        self._written = 0
        self._read, self._write = os.eventfd_read, os.eventfd_write

    def read(self, descriptor: int) -> int:
        if not self._held.is_set():
            self.thread = threading.current_thread()
            self._held.set()
            assert self._let_go.wait(PATIENCE)
        return self._read(descriptor)

    def write(self, descriptor: int, value: int) -> None:
        self._written += 1
        if self._written == 2:
            assert self._held.wait(PATIENCE)
            self._let_go.set()
            self.thread.join(PATIENCE)
        self._write(descriptor, value)


# ------------------------------------------------ long questions


class Turns:
    """Whose turn it is when the test says so."""

    def __init__(self) -> None:
        self.waiting = self.begun = self.ended = 0
        self._tickets = trio.Semaphore(0)

    def give(self) -> None:
        self._tickets.release()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        self.waiting += 1
        await self._tickets.acquire()
        self.begun += 1
        yield
        self.ended += 1


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def taking_turns(turns: Turns) -> Iterator[Workers]:
    made = Workers(1, NAME, closer(), turns.turn)
    yield made
    made.close()
    wait_ended()


async def test_a_long_question_goes_on_in_its_turns_alone_and_in_one_thread(
    taking_turns: Workers, turns: Turns, nursery: trio.Nursery
) -> None:
    steps: list[threading.Thread] = []
    answers: list[str] = []

    def long() -> str:
        for _ in range(3):
            wait_for_turn()
            steps.append(threading.current_thread())
        return "answered"

    async def ask() -> None:
        answers.append(await taking_turns.ask(long))

    nursery.start_soon(ask)
    for step in range(3):
        await until(lambda step=step: turns.waiting == step + 1)  # type: ignore[misc]
        assert (len(steps), turns.ended, answers) == (step, step, [])
        turns.give()
    await until(lambda: answers == ["answered"])
    assert (turns.begun, turns.ended, len(set(steps))) == (3, 3, 1)


async def test_a_question_that_is_abandoned_before_its_turn_cleans_up_in_its_thread_which_ends(
    taking_turns: Workers, turns: Turns, nursery: trio.Nursery
) -> None:
    raised: list[tuple[type[BaseException], threading.Thread]] = []

    def long() -> None:
        try:
            wait_for_turn()
        except BaseException as error:
            raised.append((type(error), threading.current_thread()))
            raise

    scope = trio.CancelScope()

    async def ask() -> None:
        with scope:
            await taking_turns.ask(long)

    nursery.start_soon(ask)
    await until(lambda: turns.waiting == 1)
    scope.cancel()
    await until(lambda: taking_turns.busy == 0)
    ((error, thread),) = raised
    thread.join(PATIENCE)
    assert (error, thread.is_alive(), thread.name) == (Abandoned, False, NAME)


async def test_a_question_that_is_abandoned_in_a_call_has_no_further_turn(
    taking_turns: Workers, turns: Turns, nursery: trio.Nursery
) -> None:
    held = Held()
    went_on: list[str] = []

    def long() -> None:
        held()
        wait_for_turn()
        went_on.append("further")

    scope = trio.CancelScope()

    async def ask() -> None:
        with scope:
            await taking_turns.ask(long)

    nursery.start_soon(ask)
    await held.begun.wait()
    scope.cancel()
    await wait_all_tasks_blocked()
    held.let_go()
    await until(lambda: taking_turns.busy == 0)
    assert (went_on, turns.waiting) == ([], 0)


@pytest.mark.parametrize(("step_seconds", "waits"), [(0.0, 2), (1e9, 0)])
async def test_a_question_gives_way_once_its_step_is_over(
    taking_turns: Workers, turns: Turns, monkeypatch: pytest.MonkeyPatch, step_seconds: float, waits: int
) -> None:
    monkeypatch.setattr(workers_module, "STEP_SECONDS", step_seconds)
    for _ in range(waits):
        turns.give()

    def long() -> str:
        pause_if_due()
        pause_if_due()
        return "answered"

    assert await taking_turns.ask(long) == "answered"
    assert (turns.begun, turns.ended) == (waits, waits)


def test_outside_of_a_worker_nothing_waits_for_a_turn() -> None:
    pause_if_due()
    assert wait_for_turn() is None  # type: ignore[func-returns-value]


# ------------------------------------------------ their end


async def test_a_thread_idle_since_the_last_trim_ends(workers: Workers) -> None:
    thread = await workers.ask(threading.current_thread)
    workers.trim()
    assert await workers.ask(threading.current_thread) is thread
    workers.trim()
    assert thread.is_alive()
    workers.trim()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert await workers.ask(threading.current_thread) is not thread


async def test_a_trim_ends_those_alone_that_were_not_needed(workers: Workers, nursery: trio.Nursery) -> None:
    first, _ = await asked_in(workers, nursery)
    second, _ = await asked_in(workers, nursery)
    first.let_go()
    await until(lambda: workers.busy == 1)
    second.let_go()
    await until(lambda: workers.busy == 0)
    workers.trim()
    needed = await workers.ask(threading.current_thread)
    assert needed is second.answered_by
    workers.trim()
    assert first.answered_by is not None
    first.answered_by.join(PATIENCE)
    assert (first.answered_by.is_alive(), needed.is_alive()) == (False, True)


async def test_the_idle_threads_can_be_ended_and_the_next_question_starts_one(
    workers: Workers, nursery: trio.Nursery
) -> None:
    held, _ = await asked_in(workers, nursery)
    idle = await workers.ask(threading.current_thread)
    workers.end_idle()
    idle.join(PATIENCE)
    assert (idle.is_alive(), workers.busy) == (False, 1)
    assert await workers.ask(threading.current_thread) is not idle
    held.let_go()


async def test_a_close_ends_the_idle_threads_now_and_the_others_once_they_are_answered(
    workers: Workers, nursery: trio.Nursery
) -> None:
    held, _ = await asked_in(workers, nursery)
    idle = await workers.ask(threading.current_thread)
    workers.close()
    idle.join(PATIENCE)
    assert (idle.is_alive(), workers.busy) == (False, 1)
    held.let_go()
    await until(lambda: workers.busy == 0)
    assert held.answered_by is not None
    held.answered_by.join(PATIENCE)
    assert not held.answered_by.is_alive()


async def test_an_abandoned_thread_counts_until_the_kernel_answers(nursery: trio.Nursery) -> None:
    count = unclosed(8)
    workers = Workers(1, NAME, Closer(count))
    stuck, scope = await asked_in(workers, nursery)
    assert count.count == 0
    scope.cancel()
    await until(lambda: count.count == WORKER_DESCRIPTORS)
    workers.close()
    assert count.count == WORKER_DESCRIPTORS, "its partition may end meanwhile"
    stuck.let_go()
    await until(lambda: count.count == 0)
    assert workers.busy == 0


def test_a_thread_that_outlives_the_daemons_loop_ends_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    complaints: list[object] = []
    monkeypatch.setattr(threading, "excepthook", complaints.append)

    async def leave_one_stuck() -> Held:
        async with trio.open_nursery() as nursery:
            stuck, scope = await asked_in(Workers(1, NAME, closer()), nursery)
            scope.cancel()
        return stuck

    stuck = trio.run(leave_one_stuck)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == NAME)
    stuck.let_go()
    thread.join(PATIENCE)
    assert (thread.is_alive(), complaints) == (False, [])


# ------------------------------------------------ a system that refuses


def no_descriptor(*_: object) -> int:
    raise OSError("Too many open files")


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("owner", "name", "refuse"), [(os, "eventfd", no_descriptor), (threading.Thread, "start", no_thread)]
)
async def test_without_a_thread_the_query_is_undecided_and_leaves_nothing(
    workers: Workers, owner: object, name: str, refuse: Callable[..., object]
) -> None:
    descriptors = open_descriptors()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, refuse)
        with pytest.raises(Undecided, match="no thread to ask with"):
            await workers.ask(lambda: "answered")
    assert (workers.busy, open_descriptors()) == (0, descriptors)
    assert await workers.ask(lambda: "answered") == "answered"
