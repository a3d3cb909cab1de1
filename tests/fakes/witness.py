"""A well-behaved VMM that must be served while another peer misbehaves.

Owns a partition with a VP and a notifier, and one round of everything that it is entitled to.
"""

from __future__ import annotations

import os
from typing import Any

from fakes.raw_client import READ, WRITE
from fakes.raw_vmm import GFN, PAGES, PFN, WHOLE_MEMORY, RawVmm


class Witness(RawVmm):
    SERVED: tuple[object, ...] = (
        None,
        ["resume", "mapped"],
        ["resume", "already_mapped"],
        ["forward", "no_region"],
        {"frame": ["host", PFN + 3], "pfn": PFN + 3, "access": 3},
    )
    """What `serve` returns when nothing is amiss."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.add_memory()
        self.first_vp = self.vp(0)
        self._notifier = self.notifier()

    def serve(self) -> tuple[Any, ...]:
        """One round: an invalidation, the fault that follows it, and what is not ours to answer."""
        return (
            self._notifier.ask("invalidate", WHOLE_MEMORY),
            self.first_vp.intercept(GFN + 3, WRITE),
            self.first_vp.intercept(GFN + 3, READ),
            self.first_vp.intercept(GFN + PAGES),
            self.ask("translate", gfn=GFN + 3),
        )
