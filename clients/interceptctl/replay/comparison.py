"""Which recorded answers can be expected again, and how one differs from what was answered.

Owns which answers depend on the partition's state alone. Must not know how intercepts are sent.
"""

from __future__ import annotations

from typing import Final

from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Answer, spelled
from intercept_protocol.trace import Intercept

from .model import Made, Model, Region
from .verdict import Difference

REPEATABLE: Final = frozenset(
    str(answer.reason)
    for answer in (
        Answer.MAPPED, Answer.ALREADY_MAPPED, Answer.NOT_MEMORY, Answer.NO_REGION, Answer.PERMISSION,
        Answer.UNBACKED, Answer.INVALIDATING,
    )
)  # fmt: skip
"""Reasons that depend on the partition's state; all others depend on time, too."""


def why_not(intercept: Intercept, region: Region | None, model: Model, *, live: bool) -> str | None:
    """Why the recorded answer cannot be expected again."""
    if intercept.reason not in REPEATABLE:
        return intercept.reason
    if intercept.gfn is None:
        return None
    reason = intercept.reason
    if region is None:
        going = reason == "already_mapped" and model.table.at(intercept.gfn) is not None
        return "region being removed" if going else None
    if region.waiting:
        return "region being added"
    page = region.uaddr_page(intercept.gfn)
    if reason == "invalidating":
        return None if model.open_at(page) else "invalidating"
    vma = model.vmas.at(page)
    if reason == "unbacked" and vma is not None and not region.dangling:
        if vma.io is not (region.kind is RegionKind.MMIO) and region.kind is not RegionKind.PINNED:
            return "memory of another kind than the region's (auto)"
        if live and vma.since is not None and vma.since_ns >= intercept.time_ns - intercept.total_ns:
            return "memory that was mapped meanwhile"
    return None


def claim(intercept: Intercept, model: Model) -> Made | None:
    """How what the guest reaches there came about; this may be the answer that it was made for."""
    mapping = None if intercept.gfn is None else model.table.at(intercept.gfn)
    if mapping is None:
        return None
    if intercept.reason == "mapped":
        mapping.made.answered = True
    return mapping.made


def is_another_order(intercept: Intercept, got: str, made: Made | None) -> bool:
    """Whether the recorded answers are right in another order.

    Of two that want one page, the first to come maps it; the second may be answered before it. What the
    VMM prefaults is found mapped, too.
    """
    if made is None:
        return False
    if (intercept.reason, got) == ("already_mapped", "mapped") and not made.answered:
        made.early = True
        return True
    if (intercept.reason, got) == ("mapped", "already_mapped") and made.early:
        made.early = False
        return True
    return False


def difference(intercept: Intercept, region: Region | None, got: tuple[str, str]) -> Difference:
    gfn = intercept.gfn
    return Difference(
        record=intercept.number,
        time_ns=intercept.time_ns,
        vp_index=intercept.vp_index,
        gfn=gfn,
        page=None if region is None or gfn is None else region.uaddr_page(gfn),
        what="no access to memory" if gfn is None else f"{spelled(intercept.access)} of gfn {gfn:#x}",
        recorded=f"{intercept.outcome} {intercept.reason}",
        replayed=" ".join(got),
    )
