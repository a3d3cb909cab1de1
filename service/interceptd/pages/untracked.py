"""Long lists that the cyclic garbage collector does not visit: a pass stops everything for 20 ns per item.

Owns hiding a list from the collector. Must not know what it holds. Objects of which a client may have a
million are hidden already (`gc=False`), but the collector would visit every item of their lists. A pass over
young objects, which may come at any time, may meet thousands of such lists.
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
