"""Fixtures of the client tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from fakes.c_programs import CPrograms

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job, `make test &`: the commands that are interrupted here would ignore it like us.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    """Where the scripted daemon listens."""
    return tmp_path / "d.sock"


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> CPrograms:
    """In C."""
    return CPrograms(tmp_path_factory.mktemp("c"))
