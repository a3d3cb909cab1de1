"""A ledger for a test, which is closed behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import pytest

from interceptd.ledger.ledger import Ledger


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger.create()
    yield made
    with suppress(OSError, ValueError):  # the test has closed it
        made.close()


def found(ledger: Ledger) -> Ledger:
    """What a successor opens: the same memory by another descriptor."""
    return Ledger.open(os.dup(ledger.descriptor))
