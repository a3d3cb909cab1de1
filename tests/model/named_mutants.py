"""Mutants of the transition table that are known hazards: each breaks a promise.

Owns the edits of the table, one per hazard (see `tests/service/hazards/`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from model.mutants import edited, without_condition, without_effect
from model.transitions import terms as t
from model.transitions.table import (
    BACKED,
    BATCH,
    CHANGING,
    EXTENT,
    FOUND,
    GOING,
    KNOWN,
    LOCK,
    ONE,
    OPEN,
    OPENED,
    PAGE,
    PHASE,
    RECORD,
    REGION,
    RELIANCE,
    SEEN,
    SERVING,
    SIGHT,
    SOME,
    TABLE,
    TURNING,
    Batch,
    Lock,
    Phase,
    Reliance,
)

Mutant = Callable[[], t.Table]
FRESH = t.Is(RELIANCE, (Reliance.FRESH,))
FREE = t.Is(LOCK, (Lock.FREE,))
SEEN_FRESH = t.Is(SIGHT, (Reliance.FRESH,))
DONE = t.Is(BATCH, (Batch.DONE,))


def no_staleness_check_at_commit() -> t.Table:
    return without_condition(TABLE, "commit", FRESH)


def forwards_although_stale() -> t.Table:
    return without_condition(TABLE, "forward", FRESH)


def acknowledged_before_the_unmap() -> t.Table:
    return without_condition(TABLE, "begin_is_acknowledged", DONE)


def told_and_acknowledged_before_the_unmap() -> t.Table:
    return without_condition(TABLE, "telling_is_acknowledged", DONE)


def a_pass_that_unmaps_nothing() -> t.Table:
    return without_condition(TABLE, "served", t.Apart(RECORD, SERVING))


def no_notifier() -> t.Table:
    """The later posting of the patch: the region list has its locks, and no one announces an unmap."""
    return edited(TABLE, "tell", lambda row: replace(row, then=_but(row.then, GOING, RELIANCE, BATCH)))


def windows_not_cut_back_to_what_is_open() -> t.Table:
    """Only the faulting page is checked, not its neighbours."""
    table = without_condition(TABLE, "begin", t.Apart(SOME, OPEN))
    return edited(table, "begin", lambda row: replace(row, when=(*row.when, t.Apart(ONE, OPEN))))


def attempts_registered_after_a_pause() -> t.Table:
    """An invalidation between `begin` and the end of `resolve` marks no attempt stale."""

    def late(row: t.Row) -> t.Row:
        return replace(row, then=tuple(map(_only_resolved, row.then)))

    return edited(edited(TABLE, "begin_invalidation", late), "tell", late)


def maps_outside_the_lock() -> t.Table:
    return without_effect(without_condition(TABLE, "commit", FREE), "commit", t.Put(LOCK, Lock.VP))


def a_pass_that_does_not_wait_for_the_lock() -> t.Table:
    return without_condition(TABLE, "take", FREE)


def a_pass_that_answers_for_what_came_after_it_took() -> t.Table:
    """The pending set is read before the pass and cleared after it."""
    done = (
        t.PutEach(BATCH, Batch.DONE),
        t.Put(GOING, t.NOTHING),
        t.Put(SERVING, t.NOTHING),
        t.Put(LOCK, Lock.FREE),
    )
    return edited(TABLE, "served", lambda row: replace(row, then=done))


def unlinked_after_the_unmap() -> t.Table:
    """Attempts that begin while a remove unmaps are not stale, and commit into no region."""
    table = without_effect(TABLE, "remove", t.Put(REGION, t.NOTHING))
    return edited(table, "removed", lambda row: replace(row, then=(*row.then, t.Put(REGION, t.NOTHING))))


def removed_without_calling_attempts_stale() -> t.Table:
    return edited(TABLE, "remove", lambda row: replace(row, then=_but(row.then, RELIANCE)))


def a_region_added_while_another_is_unmapped() -> t.Table:
    return without_condition(TABLE, "add", FREE)


def a_change_of_regions_that_takes_the_old_ones_out_first() -> t.Table:
    """The list is without them until the new ones are added."""
    without = t.Put(REGION, REGION - SOME)
    return edited(TABLE, "change_regions", lambda row: replace(row, then=(*row.then, without)))


def exchanged_before_the_unmap() -> t.Table:
    return without_condition(TABLE, "exchange", t.Apart(RECORD, TURNING))


def exchanged_without_calling_attempts_stale() -> t.Table:
    return edited(TABLE, "exchange", lambda row: replace(row, then=_but(row.then, RELIANCE)))


def a_change_of_regions_that_unmaps_everything() -> t.Table:
    """What stays is mapped again by faults."""
    [condition] = (each for each in TABLE["unmap"].when if isinstance(each, t.Either))
    return without_condition(TABLE, "unmap", condition)


def a_change_of_regions_that_does_not_wait_for_the_lock() -> t.Table:
    return without_condition(TABLE, "change_regions", FREE)


def resumed_while_the_map_is_out() -> t.Table:
    return without_condition(TABLE, "resume", t.Apart(ONE, CHANGING))


def every_vp_maps_the_whole_extent() -> t.Table:
    return edited(TABLE, "map", lambda row: replace(row, when=(*row.when[:-1], t.Within(SOME, EXTENT))))


def one_frame_extrapolated_over_the_window() -> t.Table:
    return without_condition(TABLE, "resolve", t.Within(FOUND, BACKED))


def learned_although_stale() -> t.Table:
    return without_condition(TABLE, "learn", SEEN_FRESH)


def learned_if_the_attempt_is_fresh() -> t.Table:
    """What was seen reaches beyond the attempt's window."""
    table = without_condition(TABLE, "learn", SEEN_FRESH)
    return edited(table, "learn", lambda row: replace(row, when=(*row.when, FRESH)))


def learned_in_open_ranges() -> t.Table:
    table = without_effect(TABLE, "resolve", t.Put(SEEN, FOUND - OPEN))
    return edited(table, "resolve", lambda row: replace(row, then=(*row.then, t.Put(SEEN, FOUND))))


def known_for_ever() -> t.Table:
    return _forgetting_nothing("begin_invalidation", "tell")


def forgotten_when_it_is_served() -> t.Table:
    """And not in the step that makes attempts stale."""
    table = _forgetting_nothing("begin_invalidation", "tell")
    forget = t.Put(KNOWN, KNOWN - SERVING)
    return edited(table, "served", lambda row: replace(row, then=(forget, *row.then)))


def a_no_from_memory() -> t.Table:
    return without_condition(TABLE, "recall", t.Within(PAGE, FOUND))


def attempts_on_replaced_memory_not_called_stale() -> t.Table:
    """Begun before the invalidation, resolved before the change, and committed after it. The change always
    replaces the memory, so only the age of the frames shows the fault."""
    table = edited(TABLE, "begin_invalidation", lambda row: replace(row, then=_but(row.then, RELIANCE)))
    return edited(table, "change", lambda row: replace(row, when=(*row.when, t.Within(OPENED, FOUND))))


NAMED_MUTANTS: Mapping[str, Mutant] = {
    mutant.__name__: mutant
    for mutant in (
        no_staleness_check_at_commit,
        attempts_on_replaced_memory_not_called_stale,
        forwards_although_stale,
        acknowledged_before_the_unmap,
        told_and_acknowledged_before_the_unmap,
        a_pass_that_unmaps_nothing,
        no_notifier,
        windows_not_cut_back_to_what_is_open,
        attempts_registered_after_a_pause,
        maps_outside_the_lock,
        a_pass_that_does_not_wait_for_the_lock,
        a_pass_that_answers_for_what_came_after_it_took,
        unlinked_after_the_unmap,
        removed_without_calling_attempts_stale,
        a_region_added_while_another_is_unmapped,
        a_change_of_regions_that_takes_the_old_ones_out_first,
        exchanged_before_the_unmap,
        exchanged_without_calling_attempts_stale,
        a_change_of_regions_that_unmaps_everything,
        a_change_of_regions_that_does_not_wait_for_the_lock,
        resumed_while_the_map_is_out,
        every_vp_maps_the_whole_extent,
        one_frame_extrapolated_over_the_window,
        learned_although_stale,
        learned_if_the_attempt_is_fresh,
        learned_in_open_ranges,
        known_for_ever,
        forgotten_when_it_is_served,
        a_no_from_memory,
    )
}


def _forgetting_nothing(*rows: str) -> t.Table:
    table = TABLE
    for name in rows:
        table = edited(table, name, lambda row: replace(row, then=_but(row.then, KNOWN)))
    return table


def _but(effects: tuple[t.Effect, ...], *variables: t.Variable) -> tuple[t.Effect, ...]:
    return tuple(effect for effect in effects if effect.variable not in variables)


def _only_resolved(effect: t.Effect) -> t.Effect:
    if effect.variable is not RELIANCE or not isinstance(effect, t.PutEach):
        return effect
    return replace(effect, where=(*effect.where, t.Is(PHASE, (Phase.RESOLVED,))))
