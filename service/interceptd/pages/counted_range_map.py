"""A range map whose items count against a limit of their uid.

Owns that the count follows every insertion, cut and end. Must not know what the items are, nor when there is
room for more: the caller asks the quota before it inserts.
"""

from __future__ import annotations

from intercept_protocol.addresses import PageRange
from interceptd.pages.range_map import Item, RangeItem, RangeMap
from interceptd.quota import Quota


class CountedRangeMap(RangeMap[Item]):
    """See the module."""

    __slots__ = ("_quota",)

    def __init__(self, quota: Quota) -> None:
        super().__init__()
        self._quota = quota

    def insert_unchecked(self, item: Item) -> None:
        super().insert_unchecked(item)
        self._quota.change(1)

    def carve(self, pages: RangeItem | PageRange) -> list[Item]:
        before = len(self._items)
        removed = super().carve(pages)
        self._quota.change(len(self._items) - before)
        return removed

    def take_over(self, items: RangeMap[Item]) -> None:
        """Have the items of another map, which must not be used any more, instead of none."""
        assert not self._items, "an empty map"
        self._items, self._page_count = items._items, items._page_count
        self._quota.change(len(self._items))

    def drop_some(self) -> bool:
        before = len(self._items)
        more = super().drop_some()
        self._quota.change(len(self._items) - before)
        return more
