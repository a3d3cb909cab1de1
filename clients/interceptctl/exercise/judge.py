"""Compares the answers that a guest got, and what it reaches, with the truth.

Owns what counts as wrong, and its wording; must not know connections.
"""

from __future__ import annotations

from collections.abc import Set

from intercept_protocol.outcomes import Access, Answer, AnyAnswer, LaterAnswer, Outcome

from .clock import During
from .kills import Kills
from .tally import Finding, Tally, Wrong
from .truth import State, Truth
from .world import Sight, rights_text


class Judge:
    """Judges while the question is open: afterwards the truth may drop that history."""

    def __init__(self, truth: Truth, tally: Tally, kills: Kills) -> None:
        self._truth = truth
        self._tally = tally
        self._kills = kills

    def retry(self, vp_index: int, answer: AnyAnswer, during: During) -> None:
        """Judge whether an answer that says why a VP must ask again has that cause, after it was counted."""
        if self._kills.may_explain(answer, during):
            return
        if answer is Answer.RESTARTED:
            cause = "a restart of the daemon meanwhile"
        elif answer is Answer.KICKED and self._tally.vps[vp_index].kicks < 0:
            cause = "a kick, or a restart, which counts as one"
        else:
            return
        self._tally.found(
            Finding(Wrong.UNCAUSED, f"VP {vp_index}", None, f"{answer}", (f"after {cause}",), during)
        )

    def not_memory(self, who: str, answer: AnyAnswer, during: During) -> None:
        """Judge the answer to a message that is not a memory fault."""
        if not _is_one_of(answer, {Answer.NOT_MEMORY, Answer.RESTARTED}):
            right = (str(Answer.NOT_MEMORY),)
            self._tally.found(Finding(Wrong.UNTRUE_ANSWER, who, None, f"no memory: {answer}", right, during))

    def answer(self, who: str, gfn: int, access: Access, answer: AnyAnswer, during: During) -> None:
        """Judge the answer to an access."""
        match answer.outcome:
            case Outcome.RETRY:
                return
            case Outcome.FAIL:
                wrong = Wrong.FAILED
            case _ if _is_one_of(answer, self._truth.possible_answers(gfn, access, during)):
                return
            case _:
                wrong = Wrong.UNTRUE_ANSWER
        self._found(wrong, who, gfn, f"{rights_text(access)}: {answer}", during)

    def sight(
        self, who: str, gfn: int, seen: Sight | None, during: During, resumed_since: int | None
    ) -> None:
        """Judge what a guest reaches. Reaching nothing is right, except after a resume: then the page must be
        mapped, unless something revoked it since the intercept was sent."""
        self._tally.looks += 1
        if seen is not None:
            if seen not in self._truth.possible_sights(gfn, during):
                self._found(Wrong.UNTRUE_SIGHT, who, gfn, f"reaches {seen}", during)
        elif resumed_since is not None and not self._truth.touched(gfn, During(resumed_since, during.last)):
            self._found(Wrong.LOST, who, gfn, "reaches nothing", during)

    def addition(self, slot: str, home: int, said: str, right: str) -> None:
        """Judge whether a region was added: the VMM knows its memory, so there is one right answer."""
        if said != right:
            self._tally.found(Finding(Wrong.MISJUDGED, f"add of {slot}", home, said, (right,), During(0, 0)))

    def _found(self, wrong: Wrong, who: str, gfn: int, told: str, during: During) -> None:
        states = tuple(_state_text(state, gfn) for state in self._truth.states(gfn, during))
        self._tally.found(Finding(wrong, who, gfn, told, states, during))


def _is_one_of(answer: AnyAnswer, right: Set[Answer]) -> bool:
    """A reason that only a newer daemon knows is judged by its outcome (V-3)."""
    if isinstance(answer, LaterAnswer):
        return any(answer.outcome is one.outcome for one in right)
    return answer in right


def _state_text(state: State, gfn: int) -> str:
    when = f"from {state.during.first} to {state.during.last}"
    if state.region is None:
        return f"{when} no region"
    region = f"{state.region.kind} region {state.region.gfns} {rights_text(state.region.access)}"
    uaddr = f"page {state.region.uaddr_page(gfn):#x}"
    shut = ", being invalidated" if state.shut else ""
    if state.backing is None:
        return f"{when} {region}, {uaddr} is unbacked{shut}"
    return f"{when} {region}, {uaddr} is {Sight(state.backing.frame, state.backing.access)}{shut}"
