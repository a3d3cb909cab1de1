"""The daemon as on Linux before 6.16: `python -m fakes.before_passrights serve ...`.

Its setsockopt(SO_PASSRIGHTS) is ENOPROTOOPT, so peers can send descriptors on every connection.
"""

from __future__ import annotations

import errno
import platform
import runpy
import sys
from pathlib import Path
from typing import Final

from fakes.under_seccomp import refuse

SETSOCKOPT: Final = {"x86_64": 54, "aarch64": 208}
SO_PASSRIGHTS = 83
LAUNCH: Final = (sys.executable, "-m", "fakes.before_passrights")
ENVIRONMENT: Final = {"PYTHONPATH": str(Path(__file__).parents[1])}
"""For `DaemonProcess`."""

if __name__ == "__main__":
    refuse(SETSOCKOPT[platform.machine()], errno.ENOPROTOOPT, where=(2, SO_PASSRIGHTS))
    runpy.run_module("interceptd", run_name="__main__", alter_sys=True)
