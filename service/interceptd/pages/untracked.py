"""Lists and arrays that the cyclic garbage collector does not walk.

Owns the one call for that. A full pass stops all partitions, and visits each element of each list that is
tracked, also where the elements themselves are exempt (`gc=False`): 0.2 s for a million regions. What such a
list holds must not lead back to it, as with `gc=False`: the collector would never find that cycle.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import Any, TypeVar

Sequence = TypeVar("Sequence", bound="list[Any] | array[int]")

_untrack = ctypes.pythonapi.PyObject_GC_UnTrack
_untrack.argtypes = [ctypes.py_object]
_untrack.restype = None


def untracked(items: Sequence) -> Sequence:
    """Exempt this one, whatever is put into it later, and return it. Its slices are others."""
    _untrack(items)
    return items
