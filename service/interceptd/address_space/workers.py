"""Worker threads for questions to the kernel, whose answers the VMM can delay.

Owns the threads: few, started on demand, each with one question at a time. A thread whose question was
abandoned takes no other, and ends once the kernel has answered. Must not know what is asked.

A long question calls `pause_if_due` between its system calls. The thread then stops until the trio thread,
which has the interpreter meanwhile, finds that it is this question's turn.

Cheaper than `trio.to_thread.run_sync` with a deadline: it does not look up a cached thread and rename it,
copy a context, or pass the answer through another trio task.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

import outcome
import trio

from intercept_protocol.text import sentence
from interceptd.address_space import Undecided
from interceptd.connections.closer import Closer
from interceptd.descriptor_reserve import kept_from_partitions

STEP_SECONDS = 0.001
"""How long a question goes on without giving way. The event loop may wait as long for the interpreter."""
T = TypeVar("T")
WORKER_DESCRIPTORS = 2
"""The eventfds of a worker."""
Turn = Callable[[], AbstractAsyncContextManager[None]]


class Abandoned(Exception):
    """Nobody waits for the answer any more."""


def pause_if_due() -> None:
    """In a worker, if the question has gone on for `STEP_SECONDS`: `wait_for_turn`."""
    if (worker := _Worker.of_this_thread()) is not None and time.monotonic() >= worker.step_ends:
        worker.wait_for_turn()


def wait_for_turn() -> None:
    """In a worker: block until it is this question's turn, which lasts `STEP_SECONDS`. Raises `Abandoned`.
    Elsewhere there are no turns."""
    if (worker := _Worker.of_this_thread()) is not None:
        worker.wait_for_turn()


class Workers:
    """At most `most` threads; further questions wait in FIFO order. In `turn` a question that has given way
    goes on. `closer` counts what an abandoned one keeps open until the kernel answers."""

    def __init__(self, most: int, name: str, closer: Closer, turn: Turn = nullcontext) -> None:
        self._most = most
        self._name = name
        self._closer = closer
        self._turn = turn
        self._slots = trio.Semaphore(most, max_value=most)
        self._idle: list[_Worker] = []
        """The last one is used next. Together with the busy ones they are never more than `most`."""
        self._unneeded = 0
        """How many of the first ones have been idle ever since `trim`."""
        self._closed = False

    @property
    def busy(self) -> int:
        """Threads with a question; an abandoned one stays busy until the kernel answers."""
        return self._most - self._slots.value

    async def ask(self, question: Callable[[], T]) -> T:
        """Run `question` in a thread; returns or raises what it does. Raises `Undecided` if the system
        refuses a thread.

        If cancelled, the question is abandoned and its result ignored."""
        try:
            self._slots.acquire_nowait()  # `acquire` would always yield: a round through epoll
        except trio.WouldBlock:
            await self._slots.acquire()
        try:
            worker = self._idle.pop() if self._idle else _Worker(self._name)
        except BaseException as error:
            self._slots.release()
            if not isinstance(
                error, OSError | RuntimeError
            ):  # too many descriptors; "can't start new thread"
                raise
            raise Undecided(f"no thread to ask with: {sentence(error)}") from error
        self._unneeded = min(self._unneeded, len(self._idle))
        try:
            answer = await worker.answer(question, self._turn)
        except BaseException:
            self._closer.hold(WORKER_DESCRIPTORS)
            worker.end(self._abandoned_ended)
            raise
        self._idle.append(worker)
        self._slots.release()
        if self._closed:
            self.end_idle()
        return answer.unwrap()

    def trim(self) -> None:
        """End the threads that have been idle ever since the last call."""
        self._end_first(self._unneeded)

    def end_idle(self) -> None:
        """End the threads without a question; the next question starts a new one."""
        self._end_first(len(self._idle))

    def close(self) -> None:
        """End all threads: the idle ones now, the busy ones when the kernel has answered."""
        self._closed = True
        self.end_idle()

    def _abandoned_ended(self) -> None:
        self._closer.free(WORKER_DESCRIPTORS)
        self._slots.release()

    def _end_first(self, count: int) -> None:
        for worker in self._idle[:count]:
            worker.end(lambda: None)
        del self._idle[:count]
        self._unneeded = len(self._idle)


class _Worker:
    """A thread, its question, and an eventfd for each direction.

    An eventfd is written without the GIL. A queue would wake the other thread with the GIL held, only for it
    to wait for the GIL: one more context switch.

    Both threads use the eventfds; the trio thread closes them, after the worker's last use. If the worker
    did, their numbers might belong to other descriptors by the time `end` writes to them.
    """

    _here = threading.local()

    def __init__(self, name: str) -> None:
        self.step_ends = 0.0
        """When the question should give way, by the monotonic clock."""
        self._token = trio.lowlevel.current_trio_token()
        self._question: Callable[[], object] | None = None
        self._ending = False
        self._ended: Callable[[], None] = lambda: None
        with ExitStack() as undo:
            self._asked = os.eventfd(0, os.EFD_CLOEXEC)
            undo.callback(os.close, self._asked)
            self._reported = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._reported)
            if kept_from_partitions(self._reported):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            threading.Thread(target=self._run, args=(name,), name=name, daemon=True).start()
            undo.pop_all()

    @classmethod
    def of_this_thread(cls) -> _Worker | None:
        return getattr(cls._here, "worker", None)

    async def answer(self, question: Callable[[], T], turn: Turn) -> outcome.Outcome[T]:
        """For one task at a time. After a cancelled call only `end` may follow."""
        answers: list[outcome.Outcome[T]] = []
        self._question = lambda: answers.append(outcome.capture(question))
        await self._go_on()
        while not answers:
            async with turn():
                await self._go_on()
        self._question = None
        return answers[0]

    async def _go_on(self) -> None:
        """Let the thread run until it has answered or gives way."""
        os.eventfd_write(self._asked, 1)
        await trio.lowlevel.wait_readable(self._reported)
        os.eventfd_read(self._reported)

    def end(self, ended: Callable[[], None]) -> None:
        """End the thread after its current question, then call `ended` in the trio thread."""
        self._ended = ended
        self._ending = True
        os.eventfd_write(self._asked, 1)

    def _finish(self) -> None:
        self._close()
        self._ended()

    def _close(self) -> None:
        """Call it once neither thread uses the eventfds any more."""
        os.close(self._asked)
        os.close(self._reported)

    # -------------------------------------------- in the thread

    def wait_for_turn(self) -> None:
        if not self._ending:
            os.eventfd_write(self._reported, 1)
            self._wait_asked()
        if self._ending:
            raise Abandoned

    def _wait_asked(self) -> None:
        os.eventfd_read(self._asked)
        self.step_ends = time.monotonic() + STEP_SECONDS

    def _run(self, name: str) -> None:
        self._here.worker = self
        with suppress(OSError):  # for `ps -T` and `top -H`: Python before 3.14 does not set the kernel's name
            Path("/proc/thread-self/comm").write_text(name)
        self._wait_asked()
        while not self._ending and (question := self._question) is not None:
            question()
            del question  # releases what it holds
            if self._ending:
                break
            os.eventfd_write(self._reported, 1)
            self._wait_asked()
        try:
            self._token.run_sync_soon(self._finish)
        except trio.RunFinishedError:  # then the trio thread does not use them any more either
            self._close()
