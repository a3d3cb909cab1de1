"""Lists that the cyclic garbage collector does not walk.

Owns the one call for that. A full pass stops all partitions, and visits each element of each list that is
tracked, also where the elements themselves are exempt (`gc=False`): 0.2 s for a million regions. What such a
list holds must not lead back to it, as with `gc=False`: the collector would never find that cycle.
"""

from __future__ import annotations

import ctypes
from typing import TypeVar

Item = TypeVar("Item")

_untrack = ctypes.pythonapi.PyObject_GC_UnTrack
_untrack.argtypes = [ctypes.py_object]
_untrack.restype = None


def untracked(items: list[Item]) -> list[Item]:
    """Exempt this list, whatever is put into it later, and return it. Its slices are lists of their own."""
    _untrack(items)
    return items
