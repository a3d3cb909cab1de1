"""Acting as another user of the machine.

Owns the child that gives up its privileges; needs root, or CAP_SETUID.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from fakes.eventually import PATIENCE

T = TypeVar("T")


def as_uid(uid: int, act: Callable[..., T], *arguments: object) -> T:
    """What `act`, a function of a module, returns or raises in a child process of the user `uid`."""
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("fork"), initializer=_become, initargs=(uid,)
    ) as child:
        return child.submit(act, *arguments).result(PATIENCE)


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
