"""Threads that put questions to the kernel, which answers when the VMM lets it.

Owns the threads: few, started when they are needed, each with one question at a time. One whose question was
given up takes no other, and ends once the kernel has answered it. Must not know what is asked.

The way to a thread and back took 55 us of CPU by `trio.to_thread.run_sync` with a deadline, and takes 13
here: no idle thread is looked up in a cache and named anew, no context is copied, and the answer does not go
by way of another task of trio's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import outcome
import trio

from intercept_protocol.text import sentence
from interceptd.address_space import Undecided

T = TypeVar("T")


class Workers:
    """At most `most` threads. What they are asked beyond that waits, first come, first served."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._slots = trio.Semaphore(most, max_value=most)
        self._idle: list[_Worker] = []
        """The last one is asked next. With those that have a slot they are never more than `most`."""
        self._unneeded = 0
        """How many of the first ones were idle all the time since `trim`."""
        self._closed = False

    @property
    def busy(self) -> int:
        """Threads with a question; one that was given up is busy until the kernel answers it."""
        return self._most - self._slots.value

    async def ask(self, question: Callable[[], T]) -> T:
        """The answer, or what `question` raises; `Undecided` where the system refuses a thread.

        Cancelled, the question is given up: what becomes of it then, nobody is told."""
        try:
            self._slots.acquire_nowait()  # `acquire` would let others run: a round through epoll
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
            answer = await worker.answer(question)
        except BaseException:
            worker.end(self._slots.release)
            raise
        self._idle.append(worker)
        self._slots.release()
        if self._closed:
            self.end_idle()
        return answer.unwrap()

    def trim(self) -> None:
        """End the threads that were idle ever since the last call."""
        self._end_first(self._unneeded)

    def end_idle(self) -> None:
        """End the threads that have no question; the next question starts one anew."""
        self._end_first(len(self._idle))

    def close(self) -> None:
        """End all threads: the idle ones now, the others when the kernel has answered."""
        self._closed = True
        self.end_idle()

    def _end_first(self, count: int) -> None:
        for worker in self._idle[:count]:
            worker.end(lambda: None)
        del self._idle[:count]
        self._unneeded = len(self._idle)


class _Worker:
    """A thread, what it is asked, and an eventfd for each direction.

    An eventfd is written without the GIL. What wakes the other side with the GIL held, as a queue does, wakes
    it only to wait for that: two switches to the thread instead of one, and 8 us.

    Both threads use the eventfds, and the trio thread closes them, after the worker's last use: closed by the
    worker, their numbers might be another descriptor's by the time that `end` writes to them.
    """

    def __init__(self, name: str) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._question: Callable[[], object] | None = None
        self._ended: Callable[[], None] = lambda: None
        with ExitStack() as undo:
            self._asked = os.eventfd(0, os.EFD_CLOEXEC)
            undo.callback(os.close, self._asked)
            self._answered = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._answered)
            threading.Thread(target=self._run, args=(name,), name=name, daemon=True).start()
            undo.pop_all()

    async def answer(self, question: Callable[[], T]) -> outcome.Outcome[T]:
        """For one task at a time; once it was cancelled, only `end` is left."""
        answers: list[outcome.Outcome[T]] = []
        self._question = lambda: answers.append(outcome.capture(question))
        os.eventfd_write(self._asked, 1)
        await trio.lowlevel.wait_readable(self._answered)
        os.eventfd_read(self._answered)
        self._question = None
        return answers[0]

    def end(self, ended: Callable[[], None]) -> None:
        """Have the thread end, after what it has begun; `ended` is called in the trio thread when it does."""
        self._ended = ended
        self._question = None
        os.eventfd_write(self._asked, 1)

    def _finish(self) -> None:
        self._close()
        self._ended()

    def _close(self) -> None:
        """Once neither thread uses the eventfds any more."""
        os.close(self._asked)
        os.close(self._answered)

    def _run(self, name: str) -> None:
        with suppress(OSError):  # for `ps -T` and `top -H`: Python before 3.14 tells the kernel no names
            Path("/proc/thread-self/comm").write_text(name)
        while os.eventfd_read(self._asked) and (question := self._question) is not None:
            question()
            del question  # and with it what it holds
            os.eventfd_write(self._answered, 1)
        try:
            self._token.run_sync_soon(self._finish)
        except trio.RunFinishedError:  # then nobody writes to them any more either
            self._close()
