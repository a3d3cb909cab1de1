"""Which ledgers this version writes and reads. A daemon asks the next version before it makes way for it."""

from __future__ import annotations

from typing import Final

LEDGER_FORMAT: Final = 1
"""What this version writes. A change that an older version would misread gets a new number."""
READABLE_FORMATS: Final = frozenset({1})
