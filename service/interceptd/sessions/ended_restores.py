"""The last figures of the restores that have ended, for those who ask late.

Owns which are forgotten: the uid that has most loses its oldest, so no uid has another's forgotten. Must not
know how a restore ends.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, NamedTuple

from intercept_protocol.messages import RestoreStatistics

LIMIT: Final = 64


class EndedRestore(NamedTuple):
    uid: int
    figures: RestoreStatistics


class EndedRestores:
    """By partition id; the last `LIMIT` of them, if all are one uid's."""

    def __init__(self) -> None:
        self._ended: dict[int, EndedRestore] = {}

    def add(self, partition_id: int, uid: int, figures: RestoreStatistics) -> None:
        self._ended[partition_id] = EndedRestore(uid, figures)
        if len(self._ended) > LIMIT:
            (most, _), *_ = Counter(each.uid for each in self._ended.values()).most_common(1)
            del self._ended[next(each for each, ended in self._ended.items() if ended.uid == most)]

    def find(self, partition_id: int) -> EndedRestore | None:
        return self._ended.get(partition_id)
