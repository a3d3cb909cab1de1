"""interceptd: a guest's memory intercepts handled outside the hypervisor.

ARCHITECTURE.md has the map: who owns what, the nursery tree, the two data flows, the locks.
"""

from importlib.metadata import version

__version__ = version("interceptd")
