"""`interceptd`, also as `python -m interceptd`: the process, from exec to the first line of the command.

Owns what a fresh process may do and an importer may not: its collector, and how its modules are loaded. Must
not know flags. `make bench` measures what it is for, `tests/system/test_start.py` holds what is not loaded.
"""

import gc
import sys

gc.disable()  # while modules are loaded all that is made stays: to look for cycles in it took a sixteenth
sys.modules["rich"] = None  # type: ignore[assignment]  # structlog then does without, as our lines do: a seventh

from interceptd.cli import main  # noqa: E402

del sys.modules["rich"]
gc.freeze()  # what was loaded is there for good: no pass over it ever finds anything
gc.enable()

if __name__ == "__main__":
    main()
