"""Which ledger formats this version writes and reads. Before a restart, the next version is asked whether it
reads the format of the running daemon."""

from __future__ import annotations

from typing import Final

LEDGER_FORMAT: Final = 2
"""The format that this version writes. A change that an older version would misread gets a new number."""
READABLE_FORMATS: Final = frozenset({1, 2})
