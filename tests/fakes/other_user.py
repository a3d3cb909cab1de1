"""Acting as another user of the machine.

Owns the child that gives up its privileges; needs root, or CAP_SETUID.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from fakes.eventually import PATIENCE

T = TypeVar("T")


def as_uid(
    uid: int, act: Callable[..., T], *arguments: object, gid: int | None = None, groups: Sequence[int] = ()
) -> T:
    """What `act`, a function of a module, returns or raises in a child process of the user `uid`; its group
    has the same number unless said."""
    with ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_become,
        initargs=(uid, uid if gid is None else gid, groups),
    ) as child:
        return child.submit(act, *arguments).result(PATIENCE)


def _become(uid: int, gid: int, groups: Sequence[int]) -> None:
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
