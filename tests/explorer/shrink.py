"""Shrinks a failing schedule to the shortest one that fails in the same way.

Owns what may be left out, and what counts as shorter. Must not know why it fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from .rules import Rule
from .scheduler import TIME
from .script import Begin, End, MapFixed, Script, Verb
from .search import Explorer, Failure, Schedule

MOST_RUNS = 1500
"""Schedules that are tried before the shortest so far is taken."""


@dataclass(frozen=True)
class _Known:
    """A schedule that fails, and the figures that are to become smaller, the first the most important."""

    failure: Failure
    cost: tuple[int, int, int]


async def shortest(explorer: Explorer, failure: Failure) -> Failure:
    """Leave out what can be left out: verbs, choices, changes from one actor to another."""
    rule = failure.finding.rule
    known = await _try(explorer, failure, failure.schedule, rule)
    if known is None:  # it does not fail without the choices after the failure: never seen
        return failure
    runs = 0
    improved = True
    while improved:
        improved = False
        for candidate in _shorter(known.failure.schedule):
            runs += 1
            if runs > MOST_RUNS:
                return known.failure
            tried = await _try(explorer, failure, candidate, rule)
            if tried is not None and tried.cost < known.cost:
                known, improved = tried, True
                break
    return known.failure


async def _try(explorer: Explorer, failure: Failure, schedule: Schedule, rule: Rule) -> _Known | None:
    outcomes = await explorer.again(schedule)
    finding = outcomes.findings.get(rule)
    if finding is None:
        return None
    trace = tuple(outcomes.trace[: finding.step])
    play = schedule.play
    verbs = len(play.vmm) + sum(map(len, play.notifiers)) + sum(map(len, play.vps)) + len(play.refused)
    changes = sum(before != after for before, after in pairwise(trace)) + trace.count(TIME)
    found = replace(failure, finding=finding, schedule=replace(schedule, trace=trace))
    return _Known(found, (len(trace) + 3 * verbs, changes, int(schedule.backwards)))


def _shorter(schedule: Schedule) -> Iterator[Schedule]:
    for play in _smaller_plays(schedule.play):
        yield replace(schedule, play=play)
    if schedule.backwards:
        yield replace(schedule, backwards=False)
    trace = schedule.trace
    size = max(1, len(trace) // 2)
    while True:
        for start in range(0, len(trace), size):
            yield replace(schedule, trace=trace[:start] + trace[start + size :])
        if size == 1:
            break
        size //= 2
    for place in range(len(trace) - 1):
        here, following = trace[place : place + 2]
        if here != following:
            yield replace(schedule, trace=(*trace[:place], following, here, *trace[place + 2 :]))


def _smaller_plays(play: Script) -> Iterator[Script]:
    if play.refused:
        yield replace(play, refused=frozenset())
    for n in range(len(play.vps)):
        if play.vps[n]:
            yield replace(play, vps=(*play.vps[:n], (), *play.vps[n + 1 :]))
    for n in range(len(play.notifiers)):
        if play.notifiers[n]:
            yield replace(play, notifiers=(*play.notifiers[:n], (), *play.notifiers[n + 1 :]))
    for place in range(len(play.vmm)):
        less = play.vmm[:place] + play.vmm[place + 1 :]
        if _ends_what_it_began(less):
            yield replace(play, vmm=less)
    for n, touches in enumerate(play.vps):
        for place in range(len(touches)):
            fewer = touches[:place] + touches[place + 1 :]
            yield replace(play, vps=(*play.vps[:n], fewer, *play.vps[n + 1 :]))
    for n, verbs in enumerate(play.notifiers):
        for place in range(len(verbs)):
            fewer_verbs = verbs[:place] + verbs[place + 1 :]
            if _ends_what_it_began(fewer_verbs):
                yield replace(play, notifiers=(*play.notifiers[:n], fewer_verbs, *play.notifiers[n + 1 :]))


def _ends_what_it_began(verbs: Sequence[Verb]) -> bool:
    begun = [verb.pages for verb in verbs if isinstance(verb, Begin)]
    ended = [verb.pages for verb in verbs if isinstance(verb, End | MapFixed)]
    return all(pages in begun for pages in ended)
