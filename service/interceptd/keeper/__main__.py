"""The program that `interceptd keep` executes once it has read its arguments. It loads no library.

`python -m interceptd.keeper PATIENCE serve ARGUMENTS...`
"""

import sys

from interceptd.keeper.keeper import Keeper

if __name__ == "__main__":
    patience, *arguments = sys.argv[1:]
    sys.exit(Keeper([sys.executable, "-m", "interceptd"], arguments, float(patience)).run())
