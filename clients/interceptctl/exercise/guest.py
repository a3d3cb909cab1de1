"""A fake guest: one VP that touches pages and follows the answers.

Owns what it touches, and the check after every resume; must not know what is right or what changes.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from enum import Enum
from typing import Final

import trio

from intercept_client import TrioVp
from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.hv_message import InterceptMessage, MessageType, build_memory_intercept
from intercept_protocol.outcomes import Access, AnyAnswer, Outcome

from .clock import Clock, During
from .judge import Judge
from .kills import Kills
from .layout import NOWHERE, SLOTS
from .patience import answered_in_time
from .tally import Tally
from .vmm import FakeVmm

_ACCESSES: Final = (Access.READ, Access.WRITE, Access.EXECUTE)
_ACCESS_WEIGHTS: Final = (55, 35, 10)
_FAULTS: Final = (MessageType.UNMAPPED_GPA, MessageType.GPA_INTERCEPT)
_NO_MEMORY: Final = InterceptMessage(
    message_type=MessageType.X64_HALT, payload_size=0, payload=bytes(240)
).build()


@dataclass(frozen=True, slots=True)
class Touch:
    """One access to one page."""

    gfn: int
    access: Access


class _Place(Enum):
    """Where a guest goes next."""

    HOT = "where something is changing"
    SHOWN = "in a region"
    HOME = "where a region may be"
    NOWHERE = "where there never is one"
    ELSEWHERE = "not to memory"


_PLACE_WEIGHTS: Final = (42, 42, 8, 4, 4)


class Guest:
    def __init__(
        self,
        index: int,
        vp: TrioVp,
        vmm: FakeVmm,
        *,
        clock: Clock,
        judge: Judge,
        tally: Tally,
        kills: Kills,
        rng: random.Random,
    ) -> None:
        self._index = index
        self._name = f"VP {index}"
        self._vp = vp
        self._vmm = vmm
        self._clock = clock
        self._judge = judge
        self._tally = tally
        self._kills = kills
        self._rng = rng

    async def run(self, turns: trio.MemoryReceiveChannel[None]) -> None:
        """Do one thing per turn; retry a page until it is decided."""
        async for _ in turns:
            touch = self._pick()
            if touch is None:
                await self._do_something_else()
            else:
                await self.touch(touch)

    async def touch(self, touch: Touch) -> None:
        """Touch a page until the answer is not RETRY."""
        with answered_in_time():
            while await self._fault(touch) is Outcome.RETRY:
                pass

    async def _fault(self, touch: Touch) -> Outcome:
        gfn, access = touch.gfn, touch.access
        message = build_memory_intercept(
            gpa=gfn << PAGE_SHIFT, access=access, message_type=self._rng.choice(_FAULTS)
        )
        with self._clock.question() as asked:
            answer, during = await self._ask(message, asked)
            self._judge.answer(self._name, gfn, access, answer, during)
            if answer.outcome is Outcome.RESUME:
                await self._vmm.look(self._name, gfn, resumed_since=asked)
        return answer.outcome

    async def _do_something_else(self) -> None:
        with self._clock.question() as asked:
            with answered_in_time():
                answer, during = await self._ask(_NO_MEMORY, asked)
            self._judge.not_memory(self._name, answer, during)

    async def _ask(self, message: bytes, asked: int) -> tuple[AnyAnswer, During]:
        began = time.perf_counter()
        answer = await self._vp.intercept(message)
        during = During(asked, self._clock.tick())
        self._tally.answered(self._index, answer)
        self._kills.answered(answer, during, time.perf_counter() - began)
        self._judge.retry(self._index, answer, during)
        return answer, during

    def _pick(self) -> Touch | None:
        """Mostly where something is changing or mapped; now and then elsewhere."""
        rng = self._rng
        access = rng.choices(_ACCESSES, _ACCESS_WEIGHTS)[0]
        match rng.choices(list(_Place), _PLACE_WEIGHTS)[0]:
            case _Place.ELSEWHERE:
                return None
            case _Place.NOWHERE:
                return Touch(rng.choice(NOWHERE), access)
            case _Place.HOT:
                hot = self._vmm.hot
                return Touch(rng.randrange(max(hot.start - 1, 0), hot.end + 1), access)
            case _Place.SHOWN:
                gfns = rng.choice(self._vmm.shown or [self._vmm.hot])
                return Touch(rng.randrange(gfns.start, gfns.end), access)
            case _Place.HOME:
                slot = rng.choice(SLOTS)
                gfns = slot.gfns(rng.choice(slot.homes))
                return Touch(rng.randrange(gfns.start, gfns.end), access)
