"""A VP's only request: `intercept`, whose message `hv_message` and `memory_intercept` describe.

Owns the method's name; must not know its bytes.
"""

from __future__ import annotations

from typing import Final

INTERCEPT_METHOD: Final = "intercept"
"""The only method without named fields: its parameter is the 256 raw bytes."""
