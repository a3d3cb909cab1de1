"""What the tests of the clients share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    """Where the scripted daemon listens."""
    return tmp_path / "d.sock"
