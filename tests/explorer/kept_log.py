"""The log that a successor of the daemon would find, and what it adds up to.

Owns the records, each encoded and decoded as in a ledger, and which calls are being carried out. Must not
know what is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from intercept_protocol import codec, messages
from interceptd.ledger.journal import Journal
from interceptd.ledger.records import Done, Record, encode
from interceptd.recovery.fold import _DONE, Fold

INBOX = 2
"""The connections' inboxes are not modelled: all are one."""
LoggedCall = messages.VmmCall | messages.NotifierCall


class KeptLog(Journal):
    """A journal without a ledger."""

    def __init__(self) -> None:
        self.is_void = False
        self._gone_count = self._served_count = 0
        self.frames: list[bytes] = []
        self.fold = Fold()
        self.under_way: list[LoggedCall] = []
        """What was asked and is not recorded as done."""

    def append(self, record: Record) -> None:
        self.frames.append(encode(record))
        self.fold.read(self.frames[-1])

    def go_on_from(self, frames: Sequence[bytes], fold: Fold) -> None:
        """Be the log of a successor that has found these frames."""
        self.frames, self._gone_count = list(frames), fold.gone_count
        for frame in frames:
            self.fold.read(frame)

    @contextmanager
    def carrying_out(self, call: LoggedCall) -> Iterator[list[msgspec.Struct | None]]:
        """From a call to its answer, which is appended to the list: then it is recorded. An error is not."""
        self.under_way.append(call)
        reply: list[msgspec.Struct | None] = []
        try:
            yield reply
            self._done(call, reply[0])
        finally:
            self.under_way.remove(call)

    def _done(self, call: LoggedCall, reply: msgspec.Struct | None) -> None:
        if call.METHOD in _DONE:
            fields = None if reply is None else codec.to_fields(reply)
            self.append(Done(INBOX, len(self.frames), call.METHOD, codec.to_fields(call), fields))
