"""The answers to an intercept.

Owns the outcomes and their reasons; must not know how they are decided.
"""

from __future__ import annotations

from enum import Enum, IntFlag, StrEnum

import msgspec


class Access(IntFlag):
    """Rights on a page, as in replies and map requests: r 1, w 2, x 4."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXECUTE = 4


def allows(rights: Access, wanted: Access) -> bool:
    """Whether `rights` includes all of `wanted`. Uses plain ints: the flag's own `in` is slow."""
    return int.__and__(rights, wanted) == wanted


def spelled(rights: Access) -> str:
    """For people: `r-x`, `rw-`, `---`."""
    return "".join(
        letter if right & rights else "-"
        for letter, right in zip("rwx", (Access.READ, Access.WRITE, Access.EXECUTE), strict=True)
    )


class Outcome(StrEnum):
    """What a VMM does about an intercept; each answer has one."""

    RESUME = "resume"
    """Run the instruction again."""
    FORWARD = "forward"
    """Emulate the access. Only for decided accesses."""
    RETRY = "retry"
    """Nothing was decided: check your stop flags and send the intercept again; do not emulate."""
    FAIL = "fail"
    """Stop the VP: it would spin, or access wrong memory."""


class Answer(Enum):
    """Every answer of this version: an (outcome, reason) pair, as on the wire."""

    MAPPED = (Outcome.RESUME, "mapped")
    ALREADY_MAPPED = (Outcome.RESUME, "already_mapped")
    NOT_MEMORY = (Outcome.FORWARD, "not_memory")
    NO_REGION = (Outcome.FORWARD, "no_region")
    PERMISSION = (Outcome.FORWARD, "permission")
    UNBACKED = (Outcome.FORWARD, "unbacked")
    INVALIDATING = (Outcome.RETRY, "invalidating")
    CONTENDED = (Outcome.RETRY, "contended")
    KICKED = (Outcome.RETRY, "kicked")
    DRAINING = (Outcome.RETRY, "draining")
    RESTARTED = (Outcome.RETRY, "restarted")
    NO_PROGRESS = (Outcome.FAIL, "no_progress")
    HYPERVISOR_ERROR = (Outcome.FAIL, "hypervisor_error")

    def __init__(self, outcome: Outcome, reason: str) -> None:
        self.outcome = outcome
        self.reason = reason

    __hash__ = object.__hash__
    """Members are singletons. An enum's own hash is slow Python code, on the hot path."""

    def __str__(self) -> str:
        return f"{self.outcome} {self.reason}"


class LaterAnswer(msgspec.Struct, frozen=True):
    """An answer with a reason of a later version: a VMM acts on its `outcome` (V-3)."""

    outcome: Outcome
    reason: str

    def __str__(self) -> str:
        return f"{self.outcome} {self.reason}"


AnyAnswer = Answer | LaterAnswer
"""What `intercept` returns; a daemon of this version always gives an `Answer`."""
