"""Opens its own maps file and execs its arguments, which are left with the maps of a dead mm.

Owns the descriptor's number in the environment.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "STALE_MAPS"

if __name__ == "__main__":
    maps = os.open("/proc/self/maps", os.O_RDONLY)
    os.set_inheritable(maps, True)
    os.execvpe(sys.argv[1], sys.argv[1:], os.environ | {VARIABLE: str(maps)})
