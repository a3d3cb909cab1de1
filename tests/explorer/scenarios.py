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
from .random_script import turmoil
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
_ALL = (
    Scenario(
        "two-vps-and-an-unmap", "VPs fault on a BAR while the VMM unmaps it", situations.two_vps_and_an_unmap
    ),
    Scenario(
        "remove-and-add-again",
        "a region goes and another comes under a fault",
        situations.remove_and_add_again,
    ),
    Scenario(
        "remove-and-invalidate", "a region is removed while its memory goes", situations.remove_and_invalidate
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
        "a region comes while its memory goes",
        situations.region_added_in_an_open_range,
    ),
    Scenario(
        "pinned-add",
        "pinned memory goes while it is added",
        situations.pinned_add,
        frozenset({RegionKind.PINNED}),
    ),
    Scenario("aliases", "two regions over one memory", situations.aliases),
    Scenario("msix-hole", "a BAR of two VMAs with a page left out", situations.msix_hole),
    Scenario(
        "low-frames", "a fault's offset is greater than its frame's number", situations.region_before_its_vma
    ),
    Scenario("read-only", "a region or a VMA that may not be written", situations.read_only),
    Scenario("rights-go", "a VMA is made read-only", situations.rights_go),
    Scenario("movable", "RAM goes and comes back while VPs fault", situations.movable, MOVABLE),
    Scenario("no-translation", "a fault whose gpa is no gva's translation", situations.no_translation),
    Scenario("trapped", "a page faults for ever, mapped or not", situations.trapped),
    Scenario("kick", "the VMM wants its VP back while it waits", situations.kick),
    Scenario("another-process", "a VP is run by another process than the VMM's", situations.another_process),
    Scenario("flood", "more invalidations at once than are kept apart", situations.flood),
    Scenario(
        "turmoil", "a VMM, its threads and its guest do whatever they like", turmoil, frozenset(RegionKind)
    ),
)
SCENARIOS = {scenario.name: scenario for scenario in _ALL}
