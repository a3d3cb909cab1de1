"""The progress guard (I8): a VP that keeps asking for what is mapped already does not spin forever.

Owns the count of one VP. Must not know how the answer came about.
"""

from __future__ import annotations

from intercept_protocol.outcomes import Access, Answer
from interceptd.pages.mapping import Mapping

REPEATS = 16
"""`already_mapped` answers running for one gfn and access, with no change to the mapping in between."""


class ProgressGuard:
    __slots__ = ("_access", "_count", "_gfn", "_mapping")
    _gfn: int
    _access: Access
    _count: int

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Another answer came in between."""
        self._mapping: Mapping | None = None  # so that the next answer, which has one, begins a run

    def answer(self, mapping: Mapping, gfn: int, access: Access) -> Answer:
        """ALREADY_MAPPED, or NO_PROGRESS for the 17th in a row; then the count starts again.

        Mappings are immutable and replaced when they change, so "no change" is "the same object".
        """
        if mapping is not self._mapping or gfn != self._gfn or access is not self._access:
            self._mapping, self._gfn, self._access, self._count = mapping, gfn, access, 0
        if self._count == REPEATS:
            self.reset()
            return Answer.NO_PROGRESS
        self._count += 1
        return Answer.ALREADY_MAPPED
