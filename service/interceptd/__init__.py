"""interceptd: a guest's memory intercepts handled outside the hypervisor.

ARCHITECTURE.md has the map: who owns what, the nursery tree, the two data flows, the locks.
"""

__version__ = "0.1.0"
"""The build reads it from here. importlib.metadata would slow every start."""
