"""Fixtures of the client tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job, `make test &`: the commands that are interrupted here would ignore it like us.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    """Where the scripted daemon listens."""
    return tmp_path / "d.sock"
