"""Long lists that the cyclic garbage collector does not visit: a pass stops everything for 20 ns per item.

Owns taking a list out of the collector's sight. Must not know what it holds. What a client may have a million
of is made without the collector already (`gc=False`), but it visits each item of the lists they lie in, and
a pass over young objects, which nobody schedules, may meet thousands of such lists.
"""

from __future__ import annotations

import ctypes
from typing import Final, TypeVar

Item = TypeVar("Item")

_untrack: Final = ctypes.pythonapi.PyObject_GC_UnTrack
_untrack.argtypes, _untrack.restype = [ctypes.py_object], None


def untracked(items: list[Item]) -> list[Item]:
    """The list itself, from now on unknown to the collector. It is freed like any other with its last
    reference, so no item may lead back to it. A slice of it is a new list, which is tracked."""
    _untrack(items)
    return items
