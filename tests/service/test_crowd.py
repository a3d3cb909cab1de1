"""The connections of a uid that has many: few of those that are readable wake up in one round."""

from __future__ import annotations

import errno
import gc
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from interceptd.connections.crowd import AT_ONCE, Crowd
from interceptd.scheduling.step_monitor import StepMonitor

MANY = 5 * AT_ONCE


def epolls() -> int:
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link == "anon_inode:[eventpoll]" for link in links)


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    with ExitStack() as opened:
        made = [socket.socketpair() for _ in range(MANY)]
        for pair in made:
            for end in pair:
                opened.enter_context(end)
        yield made


Pairs = list[tuple[socket.socket, socket.socket]]


class Watcher:
    """Waits for each of many connections, and remembers in which round it woke up."""

    def __init__(self, pairs: Pairs) -> None:
        self.crowd = Crowd()
        self.woken: dict[int, int] = {}
        self._pairs = pairs
        self.monitor = StepMonitor()

    async def wait(self, number: int, nursery: trio.Nursery) -> None:
        await self.crowd.wait_readable(self._pairs[number][0], nursery)
        self.woken[number] = self.monitor.round

    async def wait_for_all(self, nursery: trio.Nursery, waiting: trio.Nursery) -> None:
        for number in range(MANY):
            waiting.start_soon(self.wait, number, nursery)
        await wait_all_tasks_blocked()

    @property
    def most_in_a_round(self) -> int:
        rounds = list(self.woken.values())
        return max(map(rounds.count, rounds))


async def test_of_many_that_are_readable_few_wake_up_in_a_round(pairs: Pairs, nursery: trio.Nursery) -> None:
    watcher = Watcher(pairs)
    with watcher.monitor.installed():
        async with trio.open_nursery() as waiting:
            await watcher.wait_for_all(nursery, waiting)
            for _, theirs in pairs:
                theirs.send(b"x")
    assert set(watcher.woken) == set(range(MANY))
    assert watcher.most_in_a_round <= AT_ONCE


async def test_those_whose_peers_leave_wake_up_too(pairs: Pairs, nursery: trio.Nursery) -> None:
    watcher = Watcher(pairs)
    async with trio.open_nursery() as waiting:
        await watcher.wait_for_all(nursery, waiting)
        for _, theirs in pairs:
            theirs.close()
    assert set(watcher.woken) == set(range(MANY))


async def test_one_that_is_cancelled_holds_up_no_other(pairs: Pairs, nursery: trio.Nursery) -> None:
    watcher = Watcher(pairs)
    async with trio.open_nursery() as waiting:
        async with trio.open_nursery() as cancelled:
            cancelled.start_soon(watcher.wait, 0, nursery)
            waiting.start_soon(watcher.wait, 1, nursery)
            await wait_all_tasks_blocked()
            pairs[0][1].send(b"x")
            cancelled.cancel_scope.cancel()
        pairs[1][1].send(b"x")
    assert set(watcher.woken) == {1}


@pytest.mark.parametrize("settled", [False, True])
async def test_the_last_one_may_be_cancelled_at_any_time(
    pairs: Pairs, nursery: trio.Nursery, *, settled: bool
) -> None:
    """Before the task that wakes has begun, and while it is about to find that the connection is readable."""
    watcher = Watcher(pairs)
    for number in range(8):
        async with trio.open_nursery() as cancelled:
            cancelled.start_soon(watcher.wait, number, nursery)
            if settled:
                await wait_all_tasks_blocked()
            else:
                await trio.lowlevel.checkpoint()
            pairs[number][1].send(b"x")
            if settled:
                await trio.lowlevel.checkpoint()
            cancelled.cancel_scope.cancel()
        await wait_all_tasks_blocked()
    async with trio.open_nursery() as waiting:
        waiting.start_soon(watcher.wait, MANY - 1, nursery)
        pairs[MANY - 1][1].send(b"x")
    assert MANY - 1 in watcher.woken


async def test_when_nobody_waits_any_more_nothing_is_left_and_it_may_begin_again(
    pairs: Pairs, nursery: trio.Nursery
) -> None:
    watcher = Watcher(pairs)
    gc.collect()  # other tests' epoll instances
    before = epolls(), trio.lowlevel.current_statistics().tasks_living
    for _ in range(2):
        async with trio.open_nursery() as waiting:
            await watcher.wait_for_all(nursery, waiting)
            assert epolls() == before[0] + 1
            for _, theirs in pairs:
                theirs.send(b"x")
        await wait_all_tasks_blocked()
        assert (epolls(), trio.lowlevel.current_statistics().tasks_living) == before
        for ours, _ in pairs:
            ours.recv(1)


async def test_without_an_epoll_instance_each_waits_by_itself(
    pairs: Pairs, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit of open files."""

    def refuse() -> None:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr("interceptd.connections.crowd.select.epoll", refuse)
    watcher = Watcher(pairs)
    async with trio.open_nursery() as waiting:
        await watcher.wait_for_all(nursery, waiting)
        for _, theirs in pairs:
            theirs.send(b"x")
    assert set(watcher.woken) == set(range(MANY))


async def test_when_the_task_that_wakes_is_cancelled_all_go_on(pairs: Pairs) -> None:
    watcher = Watcher(pairs)
    async with trio.open_nursery() as waiting, trio.open_nursery() as nursery:
        await watcher.wait_for_all(nursery, waiting)
        nursery.cancel_scope.cancel()
    assert set(watcher.woken) == set(range(MANY))
