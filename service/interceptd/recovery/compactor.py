"""Shortens the logs of ledgers that have grown long, one after the other.

Owns the order of a compaction. It reads the log itself, so it needs nothing of the running partition, and
sees no unfinished call.
"""

from __future__ import annotations

from typing import NoReturn

import trio

from intercept_protocol.text import sentence
from interceptd.ledger.journal import Journal
from interceptd.ledger.ledger import LedgerFull, LedgerUnreadable
from interceptd.ledger.records import encode
from interceptd.recovery.fold import Fold
from interceptd.scheduling.time_share import SHARE, TimeShare, give_way


class Compactor:
    """One for all ledgers, so that only one fold at a time takes memory."""

    def __init__(self) -> None:
        self._long: dict[Journal, TimeShare] = {}
        self._is_wanted = trio.Event()

    def request(self, journal: Journal, share: TimeShare) -> None:
        """Compact this one in its turn, on the time of the uid that `share` belongs to."""
        self._long[journal] = share
        self._is_wanted.set()

    def forget(self, journal: Journal) -> None:
        """Do not compact this one any more: its ledger is closed in this step."""
        self._long.pop(journal, None)

    async def run(self) -> NoReturn:
        """Compact until cancelled."""
        while True:
            await self._is_wanted.wait()
            self._is_wanted = trio.Event()
            while self._long:
                journal, share = next(iter(self._long.items()))
                SHARE.set(share)
                try:
                    await self._compact(journal)
                except LedgerFull:
                    pass  # it stays as it is
                except LedgerUnreadable as error:
                    journal.give_up(sentence(error))
                for _ in journal.ledger.give_back():
                    if not await self._still_wanted(journal):
                        break
                if self._long.pop(journal, None) is not None:
                    journal.compacted()
                await trio.lowlevel.checkpoint()

    async def _compact(self, journal: Journal) -> None:
        """Fold the log to its end, write the fold to the other half, copy the records that came meanwhile,
        and exchange the halves in the same step that reaches the end."""
        fold = Fold()
        try:
            await self._rewrite(journal, fold)
        finally:
            await fold.discard()

    async def _rewrite(self, journal: Journal, fold: Fold) -> None:
        place = None
        for record, place in journal.ledger.frames():  # noqa: B007 - the place is used below
            fold.read(record)
            if not await self._still_wanted(journal):
                return
        rewriting = journal.ledger.rewrite()
        for each in fold.shortest_log():
            rewriting.append(encode(each))
            if not await self._still_wanted(journal):
                return
        for record, _ in journal.ledger.frames(place):
            rewriting.append(record)
            if not await self._still_wanted(journal):
                return
        rewriting.commit()

    async def _still_wanted(self, journal: Journal) -> bool:
        await give_way()
        return journal in self._long
