"""Building the VMM in C.

Owns where its source is, and the compiler's command; must not know what it is run for.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).parents[1]
_IN_WHEEL: Final = _PACKAGE / "c"
_IN_CHECKOUT: Final = _PACKAGE.with_name("c")
_OPTIONS: Final = ("-std=c11", "-O2", "-pthread")
_SHOWN: Final = 2000


class CannotBuild(Exception):
    """There is no compiler, or it failed; the text says which."""


@contextmanager
def built_vmm(options: Sequence[str] = _OPTIONS) -> Iterator[Path]:
    """The VMM's binary, while the block lasts. Blocks for some seconds. Raises `CannotBuild`."""
    with tempfile.TemporaryDirectory(prefix="interceptd-vmm-") as directory:
        yield build_vmm(Path(directory), options)


def build_vmm(directory: Path, options: Sequence[str] = _OPTIONS) -> Path:
    """Build it into `directory`; returns the binary. Raises `CannotBuild`."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        raise CannotBuild(
            f"the VMM in C takes a C compiler, and there is no {compiler[0]} (CC names another)"
        )
    binary = directory / "vmm"
    command: list[str | Path] = [*compiler, *options, "-o", binary, *sources()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"{compiler[0]} does not build the VMM in C:\n{done.stderr[-_SHOWN:]}")
    return binary


def sources() -> list[Path]:
    """Of the VMM, without its headers."""
    headers = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT
    return sorted((headers / "vmm").glob("*.c"))
