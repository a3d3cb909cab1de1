"""Runs a Python command as another user, also where that user could not reach the interpreter.

Owns giving up root: everything that is needed is imported before. Arguments: the uid, and the command, whose
interpreter is this one.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
from importlib import import_module
from typing import Final

NEEDED: Final = ("fakes.live_changes", "fakes.live_vmm_program", "fakes.crowd", "interceptd.cli")
"""What is run or told to run, with all that it imports."""
PR_SET_DUMPABLE: Final = 4
"""prctl(2): a change of uid clears it, an exec would set it again."""


def launch(uid: int) -> tuple[str, ...]:
    """What to put before a command; needs root, and `puppet.ENVIRONMENT`."""
    return sys.executable, "-m", "fakes.as_user", str(uid)


if __name__ == "__main__":
    uid, _, _, module, *arguments = sys.argv[1:]
    for name in NEEDED:
        import_module(name)
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # it is run, not imported
    runpy.run_module(module, run_name="__main__", alter_sys=True)
