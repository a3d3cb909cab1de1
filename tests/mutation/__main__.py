"""Mutation testing of the core: `make mutation`, or `make mutation ONLY="region_list.py interval_index.py"`.

Every mutant must be noticed by a test, or be explained in survivors.toml. Exits with 1 if one survives that
is not, or if an explanation explains nothing. With arguments, only the mutants whose name holds one of them.

A custom runner: the hazards here are steps left out, locks and shields not taken, and neither mutmut nor
cosmic-ray leaves out a statement or a context; mutmut 3 passes over decorated functions and tables, and wants
the source in src/; cosmic-ray restarts pytest for each mutant, which costs more than the tests do.
"""

from __future__ import annotations

import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

from mutation.mutants import Mutant, mutants_of
from mutation.trials import Laboratory, Verdict, experiment

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "service" / "interceptd"
CORE = (
    "memory/region_manager.py",
    "memory/guest_mappings.py",
    "memory/known_vmas.py",
    "memory/region_change.py",
    "memory/mapping_change.py",
    "memory/fault_handler.py",
    "mmu_notifier.py",
    "memory/region_list.py",
    "hypervisor/slat.py",
    "hypervisor/software.py",
    "memory/region.py",
    "memory/region_facts.py",
    "pages/mapping.py",
    "pages/range_map.py",
    "pages/interval_index.py",
    "pages/ordered_map.py",
    "pages/range_bounds.py",
    "pages/sorted_chunks.py",
    "address_space/declared.py",
    "memory/attempt.py",
    "partition/progress_guard.py",
    "eager_lock.py",
    "quota.py",
)
TESTS = (
    "tests/service/hazards",
    "tests/service/invariants/test_bounded_time.py",
    "tests/service/invariants/test_cancellation.py",
    "tests/service/test_at_once.py",
    "tests/service/test_change_regions.py",
    "tests/service/test_change_regions_meanwhile.py",
    "tests/service/test_declared_address_space.py",
    "tests/service/test_facts.py",
    "tests/service/test_intercept.py",
    "tests/service/test_interval_index.py",
    "tests/service/test_known_vmas.py",
    "tests/service/test_large_pages.py",
    "tests/service/test_event_bus.py",
    "tests/service/test_histogram.py",
    "tests/service/test_hypervisor_lists.py",
    "tests/service/test_mapping.py",
    "tests/service/test_mmu_notifier.py",
    "tests/service/test_open_invalidations.py",
    "tests/service/test_ordered_map.py",
    "tests/service/test_orderings.py",
    "tests/service/test_partition.py",
    "tests/service/test_pinned.py",
    "tests/service/test_prefault.py",
    "tests/service/test_progress_guard.py",
    "tests/service/test_quotas.py",
    "tests/service/test_refused_changes.py",
    "tests/service/test_eager_lock.py",
    "tests/service/test_range_bounds.py",
    "tests/service/test_range_map.py",
    "tests/service/test_region.py",
    "tests/service/test_region_change.py",
    "tests/service/test_region_list.py",
    "tests/service/test_region_manager.py",
    "tests/service/test_slat.py",
    "tests/service/test_sorted_chunks.py",
    "tests/service/test_software_hypervisor.py",
    "tests/service/test_tenants.py",
    "tests/service/test_undone_changes.py",
    "tests/service/test_counters.py",
    "tests/service/test_long_walks.py",
    "tests/service/test_virtual_processor.py",
    "tests/service/recovery/test_journal.py",
    "--deselect=tests/service/hazards/test_extents.py::"
    "test_q_a_pinned_region_over_many_vmas_always_yields_to_other_partitions",
    "--deselect=tests/service/hazards/test_extents.py::"
    "test_q_an_invalidation_of_many_regions_yields_to_other_partitions",
    "--deselect=tests/service/hazards/test_locking.py::"
    "test_h6_a_fault_during_a_remove_maps_nothing_that_outlives_the_region",
    "--deselect=tests/service/test_virtual_processor.py::"
    "test_i4_every_intercept_gets_exactly_one_answer_while_kicked_and_drained",
)
"""What tests the core in this process and fails in a moment. The drawn schedules are left out: what only they
find is found by chance, and has no test that says what was wrong."""


def main(wanted: list[str]) -> int:
    explained: dict[str, str] = tomllib.loads((HERE / "survivors.toml").read_text())
    mutants = [mutant for file in CORE for mutant in mutants_of(SOURCES / file)]
    unknown = sorted(explained.keys() - {mutant.name for mutant in mutants})
    chosen = [m for m in mutants if not wanted or any(text in m.name for text in wanted)]
    verdicts: dict[Mutant, Verdict] = {}

    def work(laboratory: Laboratory) -> None:
        print(f"{len(chosen)} mutants, {laboratory.test_count} tests", flush=True)
        for mutant in chosen:
            verdicts[mutant] = laboratory.trial(mutant)
            survived = verdicts[mutant] is Verdict.SURVIVED
            if survived != (mutant.name in explained):
                print("SURVIVED" if survived else "KILLED, though explained:", mutant.name, flush=True)

    started = time.monotonic()
    experiment(TESTS, SOURCES, work)
    print(*(f"EXPLAINED, though there is none: {name}" for name in unknown), sep="\n")
    _print_table(verdicts, explained)
    print(f"{time.monotonic() - started:.0f} s")
    return int(
        len(verdicts) < len(chosen)
        or bool(unknown)
        or any((v is Verdict.SURVIVED) != (m.name in explained) for m, v in verdicts.items())
    )


def _print_table(verdicts: dict[Mutant, Verdict], explained: dict[str, str]) -> None:
    print(f"{'file':<20}{'mutants':>9}{'killed':>9}{'in time':>9}{'explained':>11}{'survived':>10}")
    for file in (*CORE, "all"):
        counts = Counter(
            "explained" if verdict is Verdict.SURVIVED and mutant.name in explained else verdict.value
            for mutant, verdict in verdicts.items()
            if file in ("all", str(mutant.path.relative_to(SOURCES)))
        )
        in_time, survived = counts[Verdict.KILLED.value], counts[Verdict.SURVIVED.value]
        killed = in_time + counts[Verdict.OUT_OF_TIME.value]
        print(f"{file:<20}{counts.total():>9}{killed:>9}{in_time:>9}{counts['explained']:>11}{survived:>10}")
    print(f"score: {killed / max(counts.total(), 1):.1%}, and {counts['explained']} that no test can notice")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
