"""A request that the recorded daemon has carried out, and that this one may refuse.

Owns the difference that this is. Must not know what is requested.
"""

from __future__ import annotations

from collections.abc import Awaitable

from intercept_protocol.errors import WireError
from intercept_protocol.trace import Kind, Traced

from .verdict import Difference, Verdict


async def ask(verdict: Verdict, record: Traced, what: str, request: Awaitable[None]) -> None:
    """Repeat what the recorded daemon has carried out; that this one refuses it is a difference."""
    try:
        await request
    except WireError as error:
        refused(verdict, record, what, error)


def refused(verdict: Verdict, record: Traced, what: str, error: WireError) -> None:
    start = record.values[0]
    of_guest = record.kind in {Kind.INTERCEPT, Kind.REGION_ADDED, Kind.REGION_REMOVED, Kind.GUEST_MAPPED}
    verdict.differ(
        Difference(
            record=record.number,
            time_ns=record.time_ns,
            gfn=start if of_guest else None,
            page=None if of_guest else start,
            what=what,
            recorded="carried out",
            replayed=f"refused: {error}",
        )
    )
