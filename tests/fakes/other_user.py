"""Acting as another user of the machine.

Owns the child that gives up its privileges; needs root, or CAP_SETUID.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from fakes.as_user import PR_SET_DUMPABLE
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
        initializer=become,
        initargs=(uid, uid if gid is None else gid, groups),
    ) as child:
        return child.submit(act, *arguments).result(PATIENCE)


def become(uid: int, gid: int, groups: Sequence[int] = ()) -> None:
    """Give up root in this process, whose files in /proc are the new user's as after an exec."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)
