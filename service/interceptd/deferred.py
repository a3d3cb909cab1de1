"""Modules that are named where they are imported and loaded where they are first used.

Owns how that is done to modules of others, while they are imported. Must not know which those are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


class _Deferred(ModuleType):
    """Stands in for a module of its name; has nothing of its own, and gives what that module gives."""

    def __getattr__(self, attribute: str) -> object:
        _withdraw(self)
        return getattr(import_module(self.__name__), attribute)


@contextmanager
def deferred(*names: str) -> Iterator[None]:
    """Within the block, `import name` loads nothing unless something of the module is used there; after it,
    everything that imports it anew gets the module itself. One that is loaded already is left alone.

    The standard library's `LazyLoader` loads a module when it is imported for the second time.
    """
    stand_ins = [_Deferred(name) for name in names if name not in sys.modules]
    for stand_in in stand_ins:
        sys.modules[stand_in.__name__] = stand_in
    try:
        yield
    finally:
        for stand_in in stand_ins:
            _withdraw(stand_in)


def _withdraw(stand_in: _Deferred) -> None:
    if sys.modules.get(stand_in.__name__) is stand_in:
        del sys.modules[stand_in.__name__]
