"""Thousands of kills: no commit word is torn, and nothing that the kernel handed out is lost."""

from __future__ import annotations

import random

import pytest

from fakes.killed import KilledServer, torn
from interceptd.ledger.inbox import VMM_INBOX
from interceptd.ledger.ledger import Ledger

pytestmark = [pytest.mark.verify, pytest.mark.alone]
KILLS = 1000


def test_no_log_is_torn() -> None:
    for seed in range(KILLS):
        ledger = Ledger.create()
        assert torn(seed, ledger) is None
        ledger.close()


@pytest.mark.parametrize("pieces", [0, 3, 100])
def test_no_request_is_lost(pieces: int) -> None:
    server = lives(pieces=pieces)
    assert server.lost == 0
    assert server.answered > 0
    assert server.owed + server.twice > 0, "some were killed between the receive and the answer"


def test_the_requests_of_a_server_that_copies_are_lost() -> None:
    """Kills that hit nothing would show nothing."""
    assert lives(copies=True).lost > 0


def lives(*, pieces: int = 0, copies: bool = False) -> KilledServer:
    ledger = Ledger.create()
    server = KilledServer(random.Random(1), ledger, VMM_INBOX if pieces else 2, pieces=pieces, copies=copies)
    for _ in range(KILLS):
        server.live()
    server.close()
    ledger.close()
    return server
