"""What can be explored, by name.

Owns the names and which scenarios each can be put through. Must not know how a search goes.
"""

from __future__ import annotations

from dataclasses import dataclass

from intercept_protocol.messages import RegionKind

from . import core as ours
from .core import Held
from .model_partition import Parts
from .mutants import MENDS
from .patches.v0 import PatchV0
from .patches.v3 import PatchV3
from .scenarios import Scenario
from .system_under_test import Build


@dataclass(frozen=True)
class Variant:
    """`kinds` are the regions that it deals with."""

    name: str
    about: str
    build: Build
    kinds: frozenset[RegionKind] = frozenset(RegionKind)

    def applies_to(self, scenario: Scenario) -> bool:
        return scenario.kinds <= self.kinds


_MMIO = frozenset({RegionKind.MMIO})
_WITHOUT = "ours-without-"
PATCH_V0 = Variant("patch-v0", "the patch as posted on 19 January 2026", PatchV0, _MMIO)
PATCH_V3 = Variant("patch-v3", "its posting of 11 May 2026", PatchV3, _MMIO)
OURS = Variant("ours", "the daemon's own core", ours.of(Parts()))
OURS_LIVE = Variant(
    "ours-live", "the same with a hypervisor that waits for nobody", ours.of(Parts(), Held.ADDRESS_SPACE)
)
OURS_MODEL = Variant(
    "ours-model", "the same where nobody waits, in one step each", ours.of(Parts(), Held.NEITHER)
)
CORE = (OURS, OURS_LIVE, OURS_MODEL)
"""The daemon's own core in the three settings of its ports."""
MENDS_OUT = tuple(Variant(_WITHOUT + name, mend.about, ours.of(mend.parts)) for name, mend in MENDS.items())
VARIANTS = {variant.name: variant for variant in (PATCH_V0, PATCH_V3, *CORE, *MENDS_OUT)}
