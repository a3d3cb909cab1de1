"""The exercise itself: a fake VMM, its guests and its notifiers against the daemon behind a socket.

Owns the order of things and who runs beside whom; must not know where the daemon comes from or how anything
is shown.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import trio

from intercept_client import TrioNotifier, TrioVmm, TrioVp
from intercept_protocol.outcomes import Access, Answer

from . import live_memory
from .clock import Clock, During
from .declared_memory import DeclaredMemory
from .guest import Guest, Touch
from .judge import Judge
from .link import Link
from .live_memory import LiveMemory
from .memory import Memory, Setting
from .notifier import FakeNotifier, disturb
from .report import Report
from .scenario import Scenario
from .tally import Finding, Tally, VpTally, Wrong
from .truth import Truth
from .vmm import FakeVmm
from .workload import Turmoil


@dataclass(frozen=True, slots=True)
class Progress:
    """What somebody who watches may look at while the exercise runs."""

    scenario: Scenario
    tally: Tally
    vmm: FakeVmm


FINAL_TOUCH_EVERY: Final = 8
"""Pages from one touch to the next in the final comparison, which looks at all of them."""

Watch = Callable[[Progress], Awaitable[None]]


async def exercise(path: str, scenario: Scenario, watch: Watch) -> Report:
    """Exercise the daemon whose VMMs' socket is at `path`; `watch` runs beside it until it is cancelled.

    Raises what the clients raise where the daemon refuses or leaves; a wrong daemon is in the report.
    """
    started = time.perf_counter()
    clock = Clock()
    truth = Truth(clock)
    tally = Tally([VpTally() for _ in range(scenario.vps)])
    judge = Judge(truth, tally)
    async with AsyncExitStack() as connections:
        client = await connections.enter_async_context(TrioVmm.open(path, name="exercise"))
        partition = await client.call(scenario.setting.partition)
        link = Link(client, clock, tally)
        memory: Memory
        match scenario.setting:
            case Setting.DECLARED:
                memory = DeclaredMemory(link, truth)
            case Setting.LIVE:
                await live_memory.attach(client)
                announcer = await connections.enter_async_context(TrioNotifier.open(path, partition))
                memory = LiveMemory(link, announcer, truth, connections.enter_context(live_memory.arena()))
        vmm = FakeVmm(link, memory, truth, judge)

        async def notifier() -> FakeNotifier:
            client = await connections.enter_async_context(TrioNotifier.open(path, partition))
            return FakeNotifier(client, clock, truth, tally, vmm)

        async def guest(index: int) -> Guest:
            vp = await connections.enter_async_context(TrioVp.open(path, partition, vp_index=index))
            rng = scenario.rng(f"guest {index}")
            return Guest(index, vp, vmm, clock=clock, judge=judge, tally=tally, rng=rng)

        guests = [await guest(index) for index in range(scenario.vps)]
        turmoil = Turmoil(vmm, await notifier(), truth, tally, scenario.rng("turmoil"))
        disturber = await notifier()
        await turmoil.set_up()
        async with trio.open_nursery() as watching:
            watching.start_soon(watch, Progress(scenario, tally, vmm))
            await _run(scenario, tally, turmoil, guests, disturber)
            await turmoil.wait_idle()
            await _compare_all(vmm, truth, guests[0])
            watching.cancel_scope.cancel()
        statistics = await vmm.statistics()
    _compare_counts(tally, statistics.intercepts)
    seconds = time.perf_counter() - started
    return Report.of(scenario.setting.title, scenario, tally, statistics, seconds)


async def _run(
    scenario: Scenario, tally: Tally, turmoil: Turmoil, guests: list[Guest], disturber: FakeNotifier
) -> None:
    """Everybody at once. Who is behind is waited for, but never while a range is shut: those who are to be
    waited for may be waiting for it."""
    turns, guests_turns = trio.open_memory_channel[None](len(guests))
    nudges, disturbers_turns = trio.open_memory_channel[None](0)
    async with trio.open_nursery() as nursery, turns, nudges:
        for guest in guests:
            nursery.start_soon(guest.run, guests_turns)
        nursery.start_soon(disturb, disturber, disturbers_turns, scenario.rng("disturber"))
        rng, owed, burst = scenario.rng("bursts"), 0, 1
        deadline = trio.current_time() + scenario.time_limit
        while tally.steps < scenario.step_limit and trio.current_time() < deadline:
            await turmoil.go_on()
            owed += scenario.touches_a_deed
            if owed >= burst:
                for _ in range(owed):
                    await turns.send(None)
                owed, burst = 0, rng.randint(1, len(guests))
                if disturbers_turns.statistics().tasks_waiting_receive:
                    nudges.send_nowait(None)


async def _compare_all(vmm: FakeVmm, truth: Truth, guest: Guest) -> None:
    """With everything quiet: what every page of every region leads to; then some of them are touched anew."""
    for region in truth.regions:
        for gfn in range(region.gfns.start, region.gfns.end):
            await vmm.look("final comparison", gfn)
    for region in truth.regions:
        for gfn in (*range(region.gfns.start, region.gfns.end, FINAL_TOUCH_EVERY), region.gfns.end):
            await guest.touch(Touch(gfn, Access.READ))


def _compare_counts(tally: Tally, counted: dict[str, dict[str, int]]) -> None:
    """Every intercept was answered once, and the daemon counted what the guests heard."""
    for answer in Answer:
        heard, said = tally.answers[answer], counted[answer.outcome][answer.reason]
        if heard != said:
            tally.found(
                Finding(
                    Wrong.MISCOUNTED,
                    "statistics",
                    None,
                    f"{answer}: {said} by the daemon's count",
                    (f"{heard} heard by guests",),
                    During(0, 0),
                )
            )
