"""What the parts of a partition record for a successor.

Owns when a log is long enough to compact, and the numbers of `Gone`. Must not know what a successor makes of
a record.

If a record cannot be written, the ledger becomes void, because it no longer says what the guest has. The
partition goes on, and ends with this daemon.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from interceptd.ledger import records
from interceptd.ledger.ledger import Ledger, LedgerFull
from interceptd.ledger.records import Record

log = structlog.get_logger()

COMPACT_BYTES = 1 << 20
"""A log is compacted when it is longer than this, and twice as long as after its last compaction."""


class Journal:
    """Of one ledger. `on_long` is called, perhaps repeatedly, while a compaction is worth its time."""

    def __init__(self, ledger: Ledger, on_long: Callable[[Journal], None], *, gone_count: int = 0) -> None:
        self.ledger = ledger
        self.is_void = False
        self._on_long = on_long
        self._long_bytes = COMPACT_BYTES
        self._gone_count = gone_count
        self._served_count = 0

    def append(self, record: Record) -> None:
        """Add a record. It counts at once."""
        if self.is_void:
            return
        try:
            if self.ledger.append(records.encode(record)) > self._long_bytes:
                self._on_long(self)
        except LedgerFull:
            self.give_up("its log is full")

    def compacted(self) -> None:
        """Note that a compaction has made the log as short as it can be."""
        self._long_bytes = max(COMPACT_BYTES, 2 * self.ledger.log_bytes)

    def give_up(self, why: str) -> None:
        """Make the ledger void: no successor can take over."""
        if not self.is_void:
            self.is_void = True
            self.ledger.void()
            log.warning("partition_not_kept", reason=why)

    def end(self) -> None:
        """Make the ledger void, of a partition that has ended: nothing is left to go on with."""
        self.is_void = True
        self.ledger.void()

    def gone(self, start_page: int, end_page: int) -> None:
        """Record that memory went which no request will announce again."""
        self._gone_count += 1
        self.append(records.Gone(self._gone_count, start_page, end_page))

    @property
    def gone_count(self) -> int:
        """The number of the last `Gone`, for `served`."""
        return self._gone_count

    def served(self, number: int) -> None:
        """Record that the guest has lost everything up to `Gone` number `number`."""
        if number > self._served_count:
            self._served_count = number
            self.append(records.Served(number))
