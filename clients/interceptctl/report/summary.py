"""A history in numbers: the counts and the percentiles that the page and `--json` show.

Owns the arithmetic; must not know how numbers are spelled.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from intercept_protocol.messages import AddressSpaceKind
from intercept_protocol.outcomes import Answer
from intercept_protocol.text import visible

from .history import IMAGE_BACKINGS, STAGES, History, Whole

_PER_MILLE: Final = {"p50": 500, "p90": 900, "p99": 990, "p99.9": 999, "max": 1000}
MAPPED: Final = (Answer.MAPPED.outcome.value, Answer.MAPPED.reason)
PERCENTILES: Final = tuple(_PER_MILLE)


def percentiles(took: Whole) -> dict[str, int]:
    """ns by `PERCENTILES`: of each, at least that share took at most so long. Empty for no intercepts."""
    if not len(took):
        return {}
    ranks = [-(-len(took) * share // 1000) - 1 for share in _PER_MILLE.values()]
    return dict(zip(PERCENTILES, np.partition(took, ranks)[ranks].tolist(), strict=True))


def answered(history: History) -> dict[int, Whole]:
    """ns in the daemon of all intercepts, by answer."""
    found = history.intercepts
    total = found.stages["total"]
    return {code: total[found.answer == code] for code in np.unique(found.answer).tolist()}


def restored(history: History) -> dict[str, int] | None:
    """Pages of a restored guest that came in, by what stands behind them and by what for, and the time of
    its first and its last fault; None for another guest.

    Those that were not touched came in around others, or were prefetched."""
    if history.header.address_space != AddressSpaceKind.IMAGE:
        return None
    codes = [code for code, words in enumerate(history.header.answers) if tuple(words) == MAPPED]
    faults = history.intercepts.time[np.isin(history.intercepts.answer, codes)]
    counts = {f"{name}_pages": history.brought_in[name] for name in IMAGE_BACKINGS}
    moments = {"first_fault_ns": int(faults.min()), "quiet_ns": int(faults.max())} if len(faults) else {}
    return counts | {"touched_pages": len(faults)} | moments


def summary(history: History, damage: str | None) -> dict[str, Any]:
    """For `--json`."""
    return {
        "records": history.records,
        "intercepts": len(history.intercepts.number),
        "invalidations": len(history.invalidations),
        "duration_ns": history.until,
        "end": history.end,
        "restore": restored(history),
        "damage": damage,
        "gaps": [hole._asdict() for hole in history.holes],
        "answers": {
            visible(history.answer(code)): {"intercepts": len(took), "latency_ns": percentiles(took)}
            for code, took in answered(history).items()
        },
        "stages": {stage: percentiles(history.intercepts.stages[stage]) for stage in STAGES},
    }
