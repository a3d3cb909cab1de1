"""Runs a Python command as another user, also where that user cannot read the interpreter or the project.

Owns giving up root: everything that is needed is loaded before. Arguments: the uid, and the command, whose
interpreter is this one.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Final

NEEDED: Final = (
    "fakes.live_changes", "fakes.live_silence", "fakes.live_vmm_program", "fakes.crowd", "interceptd.cli",
    "interceptd.metrics.endpoint",
)  # fmt: skip
"""What is run or told to run, with all that it imports."""
PR_SET_DUMPABLE: Final = 4
"""prctl(2): a change of uid clears it, an exec would set it again."""


def launch(uid: int) -> tuple[str, ...]:
    """What to put before a command; needs root, and `puppet.ENVIRONMENT`."""
    return sys.executable, "-m", "fakes.as_user", str(uid)


def program(module: str) -> CodeType:
    """What `python -m MODULE` would run, read now."""
    spec = find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = find_spec(f"{module}.__main__")
    assert spec is not None, f"no module {module}"
    code: CodeType | None = spec.loader.get_code(spec.name)  # type: ignore[union-attr]  # a SourceLoader
    assert code is not None, f"{module} has no source"
    return code


if __name__ == "__main__":
    uid, _, _, module, *arguments = sys.argv[1:]
    for name in NEEDED:
        import_module(name)
    code = program(module)
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)
    sys.argv = [module, *arguments]
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(code, main.__dict__)
