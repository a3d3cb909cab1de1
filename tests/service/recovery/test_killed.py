"""What the kernel promises of a process that is killed: its stores are there, in order, and each is whole.

A few kills; `tests/verify/test_killed.py` makes thousands.
"""

from __future__ import annotations

import random

import pytest

from fakes.killed import KilledServer, torn
from interceptd.ledger.inbox import VMM_INBOX
from interceptd.ledger.ledger import Ledger

KILLS = 30


@pytest.mark.parametrize("first", range(0, KILLS, 10))
def test_a_log_whose_writer_is_killed_ends_with_a_whole_record(first: int) -> None:
    for seed in range(first, first + 10):
        ledger = Ledger.create()
        assert torn(seed, ledger) is None
        ledger.close()


@pytest.mark.parametrize("pieces", [0, 100])
def test_nothing_that_the_kernel_handed_out_is_lost(ledger: Ledger, pieces: int) -> None:
    server = KilledServer(random.Random(pieces), ledger, VMM_INBOX if pieces else 2, pieces=pieces)
    for _ in range(KILLS):
        server.live()
    server.close()
    torn_requests = int(pieces > 0)
    assert server.lost <= torn_requests, "a piece is noted a microsecond after it came (ARCHITECTURE)"
    assert server.answered + server.owed + server.unread >= KILLS
