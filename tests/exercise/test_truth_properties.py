"""The exerciser's reference, which drops history, agrees with the one that keeps it, for all sequences."""

from __future__ import annotations

import math
from contextlib import ExitStack
from enum import Enum

from hypothesis import given
from hypothesis import strategies as st

from exercise.plainest import Change, Plainest, begin
from exercise.worlds import GFN, READ, READ_WRITE, UADDRS, WRITE, backing, region
from interceptctl.exercise.clock import Clock, During
from interceptctl.exercise.history import FOREVER
from interceptctl.exercise.truth import Edit, Truth
from interceptctl.exercise.world import Backing, Invalidation, Region


class Act(Enum):
    MAP = "map, or unmap what is mapped"
    PROTECT = "protect"
    ADD = "add, or remove what was added"
    ACKNOWLEDGE = "acknowledge the change that is under way"
    SHUT = "begin, be acknowledged, end: the next of the three"
    ASK = "ask a question"
    ANSWER = "answer the oldest question"


class Play:
    """Tells both models of each act, and compares them at every answer."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.truth = Truth(self.clock)
        self.plainest = Plainest()
        self.under_way: tuple[Edit, Change[Region | None] | Change[Backing | None]] | None = None
        self.shutting: Invalidation | None = None
        self.questions: list[tuple[ExitStack, int]] = []
        self.pfn = 0
        self.compared = 0

    def act(self, act: Act) -> None:
        match act:
            case Act.ACKNOWLEDGE if self.under_way is not None:
                edit, change = self.under_way
                change.acknowledged = self.clock.tick()
                edit.acknowledge(int(change.acknowledged))
                self.under_way = None
            case Act.MAP | Act.PROTECT | Act.ADD if self.under_way is None:
                self.change(act)
            case Act.SHUT:
                self.shut()
            case Act.ASK:
                stack = ExitStack()
                self.questions.append((stack, stack.enter_context(self.clock.question())))
            case Act.ANSWER if self.questions:
                stack, asked = self.questions.pop(0)
                with stack:
                    self.compare(During(asked, self.clock.tick()))
                self.compared += 1

    def change(self, act: Act) -> None:
        truth, plainest, at = self.truth, self.plainest, self.clock.tick()
        mapped = truth.backing(UADDRS.start)
        match act:
            case Act.ADD if truth.regions:
                edit = truth.ask_remove(truth.regions[0], at)
                self.under_way = edit, begin(plainest.regions, None, at)
            case Act.ADD:
                added = region()
                self.under_way = truth.ask_add(added, at), begin(plainest.regions, added, at)
            case Act.PROTECT if mapped is not None:
                access = READ if WRITE in mapped.access else READ_WRITE
                edit = truth.ask_protect(UADDRS, access, at)
                self.under_way = edit, begin(plainest.backings, Backing(mapped.frame, access, io=True), at)
            case Act.MAP if mapped is not None:
                self.under_way = truth.ask_unmap(UADDRS, at), begin(plainest.backings, None, at)
            case Act.MAP:
                self.pfn += 0x10
                new = backing(self.pfn)
                self.under_way = truth.ask_map(UADDRS, new, at), begin(plainest.backings, new, at)

    def shut(self) -> None:
        at = self.clock.tick()
        if self.shutting is None:
            self.shutting = self.truth.ask_invalidation(UADDRS, at)
        elif self.shutting.gone == FOREVER:
            self.shutting.gone, self.shutting.shut_until = at, FOREVER
            self.plainest.shut.append((at, math.inf))
        else:
            self.shutting.shut_until = at
            self.plainest.shut[-1] = self.shutting.gone, at
            self.shutting = None

    def compare(self, during: During) -> None:
        for access in (READ, WRITE):
            assert self.truth.possible_answers(GFN, access, during) == self.plainest.answers(access, during)
        assert self.truth.possible_sights(GFN, during) == self.plainest.sights(during)


@given(st.lists(st.sampled_from(Act), max_size=60))
def test_both_models_agree_on_what_was_possible(acts: list[Act]) -> None:
    play = Play()
    for act in (*acts, Act.ASK, Act.ANSWER):
        play.act(act)
    assert play.compared > 0
