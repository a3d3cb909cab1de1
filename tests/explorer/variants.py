"""What can be explored, by name.

Owns the names and which scenarios each can be put through. Must not know how a search goes.
"""

from __future__ import annotations

from dataclasses import dataclass

from intercept_protocol.messages import RegionKind

from . import core
from .core import Held
from .model_partition import Parts
from .mutants import MUTANTS
from .patches.v0 import PatchV0
from .patches.v3 import PatchV3
from .rules import Rule
from .scenarios import Scenario
from .system_under_test import Build


@dataclass(frozen=True)
class Variant:
    """`kinds` are the regions that it deals with, `rules` those that it is looked at for."""

    name: str
    about: str
    build: Build
    kinds: frozenset[RegionKind] = frozenset(RegionKind)
    rules: frozenset[Rule] = frozenset(Rule)

    def applies_to(self, scenario: Scenario) -> bool:
        return scenario.kinds <= self.kinds


_MMIO = frozenset({RegionKind.MMIO})
_WITHOUT = "core-without-"
PATCH_V0 = Variant("patch-v0", "the patch as posted on 19 January 2026", PatchV0, _MMIO)
PATCH_V3 = Variant("patch-v3", "its posting of 11 May 2026", PatchV3, _MMIO)
CORE = Variant("core", "the daemon's own core", core.of(Parts()))
CORE_LIVE = Variant(
    "core-live", "the same with a hypervisor that never waits", core.of(Parts(), Held.ADDRESS_SPACE)
)
CORE_MODEL = Variant("core-model", "the same without waiting, one step each", core.of(Parts(), Held.NEITHER))
CORE_LISTS = Variant(
    "core-lists", "the same with a hypervisor that takes three pieces at once", core.of(Parts(), Held.LISTS)
)
CORES = (CORE, CORE_LIVE, CORE_MODEL, CORE_LISTS)
"""The daemon's own core in the four modes of its ports."""
MUTANT_VARIANTS = tuple(
    Variant(
        _WITHOUT + name,
        mutant.about,
        core.of(mutant.parts),
        rules=frozenset(rule for rule in Rule if rule.is_of_recovery is mutant.is_of_recovery),
    )
    for name, mutant in MUTANTS.items()
)
VARIANTS = {variant.name: variant for variant in (PATCH_V0, PATCH_V3, *CORES, *MUTANT_VARIANTS)}
