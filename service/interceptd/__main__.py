"""`interceptd`, also as `python -m interceptd`: the process, from exec to the first line of the command.

Owns what a fresh process may do and an importer may not: tune the garbage collector and the imports. Must not
know flags. `make bench` measures the start; `tests/system/test_start.py` checks what is not imported.
"""

import gc
import sys

gc.disable()  # everything that imports create stays alive: a collection would find no garbage
sys.modules["rich"] = None  # type: ignore[assignment]  # structlog then skips its slow import

from interceptd.cli import main  # noqa: E402

del sys.modules["rich"]
gc.freeze()  # modules are never garbage: keep them out of every later collection
gc.enable()

if __name__ == "__main__":
    main()
