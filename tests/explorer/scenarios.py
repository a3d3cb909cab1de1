"""The situations that are explored, by name.

Owns the names, what each is about and which kinds of regions are in it; most draw some of their details, so
that one name stands for many scripts. Must not know variants.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from intercept_protocol.messages import RegionKind

from . import situations
from .random_script import random_script
from .script import Script

Draw = Callable[[random.Random], Script]


@dataclass(frozen=True)
class Scenario:
    """`about` is a sentence; `kinds` are the regions in it, for variants that know only some."""

    name: str
    about: str
    draw: Draw
    kinds: frozenset[RegionKind] = frozenset({RegionKind.MMIO})


MMIO_AND_MOVABLE = frozenset({RegionKind.MMIO, RegionKind.MOVABLE})
MOVABLE = frozenset({RegionKind.MOVABLE})
ANY = frozenset(RegionKind)
_ALL = (
    Scenario(
        "two-vps-and-an-unmap", "VPs fault on a BAR while the VMM unmaps it", situations.two_vps_and_an_unmap
    ),
    Scenario(
        "remove-and-add-again",
        "a region is replaced during a fault",
        situations.remove_and_add_again,
    ),
    Scenario(
        "remove-and-invalidate",
        "a region is removed while its memory is unmapped",
        situations.remove_and_invalidate,
    ),
    Scenario("bar-move", "the guest reprograms a BAR: the same memory at other gfns", situations.bar_move),
    Scenario("roll-back", "a map is refused while another VP maps the same BAR", situations.roll_back),
    Scenario(
        "bar-without-memory", "the hypervisor fails a BAR's second batch", situations.bar_without_memory
    ),
    Scenario(
        "deposit-failure", "the hypervisor fails RAM's second batch", situations.deposit_failure, MOVABLE
    ),
    Scenario("vmm-death", "the VMM dies in the middle of everything", situations.vmm_death, MMIO_AND_MOVABLE),
    Scenario(
        "invalidate-storm", "three threads invalidate what two VPs fault on", situations.invalidate_storm
    ),
    Scenario("nested-begins", "two threads invalidate one range", situations.nested_begins),
    Scenario(
        "begin-beside-a-fault", "a range is open next to a faulting page", situations.begin_beside_a_fault
    ),
    Scenario(
        "add-in-an-open-range",
        "a region is added while its memory is unmapped",
        situations.region_added_in_an_open_range,
    ),
    Scenario(
        "pinned-add",
        "pinned memory is unmapped while it is added",
        situations.pinned_add,
        frozenset({RegionKind.PINNED}),
    ),
    Scenario("shadow", "a ROM takes the place of RAM in one step", situations.shadow, ANY),
    Scenario("bar-move-at-once", "the same move of a BAR in one step", situations.bar_move_at_once, ANY),
    Scenario("swap", "two regions exchange their memory in one step", situations.swap, ANY),
    Scenario("resize", "some of a region stays, and the rest changes in one step", situations.resize, ANY),
    Scenario("refused-change", "the hypervisor refuses a change of regions", situations.refused_change, ANY),
    Scenario("aliases", "two regions over the same memory", situations.aliases),
    Scenario("msix-hole", "a BAR of two VMAs with an unmapped page between", situations.msix_hole),
    Scenario(
        "low-frames", "a fault's offset is greater than its frame's number", situations.region_before_its_vma
    ),
    Scenario("read-only", "a read-only region or VMA", situations.read_only),
    Scenario("rights-go", "a VMA is made read-only", situations.rights_go),
    Scenario("movable", "RAM is unmapped and mapped again while VPs fault", situations.movable, MOVABLE),
    Scenario("several-vmas", "one of several VMAs behind RAM changes", situations.several_vmas, MOVABLE),
    Scenario(
        "no-translation", "a fault whose gpa is not the translation of a gva", situations.no_translation
    ),
    Scenario("trapped", "a page faults forever, mapped or not", situations.trapped),
    Scenario("kick", "the VMM kicks a VP that waits", situations.kick),
    Scenario("another-process", "a VP is run by another process than the VMM's", situations.another_process),
    Scenario("flood", "more simultaneous invalidations than the pending set holds", situations.flood),
    Scenario("random", "a VMM, its threads and its guest act at random", random_script, ANY),
)
SCENARIOS = {scenario.name: scenario for scenario in _ALL}
