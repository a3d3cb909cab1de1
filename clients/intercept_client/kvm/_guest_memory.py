"""What the guest reaches right now: the memslots, and the accesses that are being completed on its behalf.

Owns the slot table, the one lock around it and KVM's slots, and the claims. A claim is a completion in
flight: a guest's access that the VMM carries out. So an unmap, like KVM's own, returns only when none is left
in its range, and from then on none begins: the memory may then be reused.

The lock is held across memslot ioctls and until the vCPUs have left the guest, but never across a copy, a
callback or anything that waits for the daemon: the hypervisor connection needs the lock to answer, and others
wait for that answer.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

from intercept_client._hypervisor_session import MapRequest, refused_after
from intercept_protocol.addresses import PAGE_SHIFT, GfnRange, Uaddr, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Access, spelled

from ._memslots import Change, Memslot, MemslotTable
from ._run_gate import RunGate


class SlotEditor(Protocol):
    """What this needs of KVM; see `Machine`."""

    slot_limit: int
    has_read_only_slots: bool

    def set_memslot(self, slot: Memslot) -> None: ...

    def delete_memslot(self, slot: Memslot) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """One page that the guest reaches, held for one access."""

    gfn: int
    uaddr: Uaddr


class GuestMemory:
    """Thread-safe. `generation` grows with every change of the slots; `gate` is for those who run vCPUs."""

    def __init__(self, editor: SlotEditor) -> None:
        self.gate = RunGate()
        self._editor = editor
        self._table = MemslotTable(editor.slot_limit)
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)
        self._claims: list[Claim] = []
        self._frozen_because: str | None = None
        self.generation = 0

    @property
    def slots(self) -> list[Memslot]:
        """By gfn."""
        with self._lock:
            return list(self._table)

    def region_added(self, gfns: GfnRange) -> None:
        """Keep its memslots apart from its neighbours', so that unmapping all of it needs no free one."""
        with self._lock:
            self._table.add_region(gfns)

    def region_removed(self, gfns: GfnRange) -> None:
        """Once for each `region_added`."""
        with self._lock:
            self._table.remove_region(gfns)

    # ------------------------------------------------ what the daemon asks for

    def map(
        self,
        gfns: GfnRange,
        uaddrs: UaddrRange,
        access: Access,
        start_pfn: int | None = None,  # noqa: ARG002 - KVM resolves host pages itself
    ) -> None:
        """Let the guest reach `uaddrs` at `gfns`, and nothing else there; without rights: nothing at all.

        Raises `WireError`, and leaves all as it was: ENOSPC without a free memslot, EOPNOTSUPP for rights
        that KVM cannot give, and any error of KVM. KVM cannot withhold execution: what may be read may run.
        """
        if access == Access.NONE:
            self.unmap(gfns)
            return
        if Access.READ not in access:
            raise WireError(
                errno.EOPNOTSUPP, f"gfns {gfns}: a memslot can always be read, got {spelled(access)}"
            )
        if Access.WRITE not in access and not self._editor.has_read_only_slots:
            raise WireError(errno.EOPNOTSUPP, f"gfns {gfns}: this KVM has no read-only memslots")
        with self._lock:
            if self._frozen_because is not None:
                raise WireError(errno.ESHUTDOWN, f"no more maps: {self._frozen_because}")
            if change := self._table.plan_map(gfns, uaddrs, access):
                self._change(gfns, change)

    def unmap(self, gfns: GfnRange) -> None:
        """Leave the guest nothing at `gfns`; returns when no access to what was there is under way.

        Raises `WireError`, and leaves all as it was: ENOSPC where the rests of slots do not fit, and whatever
        KVM says. `OSError` if KVM does not take back what it gave either.
        """
        with self._lock:
            self._change(gfns, self._table.plan_unmap(gfns))

    def map_list(self, pieces: Sequence[MapRequest]) -> None:
        """`map` each. Where all are to lose their memory, the vCPUs stop once."""
        if all(piece.access == Access.NONE for piece in pieces):
            self.unmap_list([piece.gfns for piece in pieces])
            return
        for done, piece in enumerate(pieces):
            try:
                self.map(piece.gfns, piece.uaddrs, piece.access)
            except WireError as refusal:
                raise refused_after(done, refusal) from refusal

    def unmap_list(self, ranges: Sequence[GfnRange]) -> None:
        """`unmap` each, while the vCPUs stop once."""
        with self._lock:
            try:
                with self.gate.closed():
                    for done, gfns in enumerate(ranges):
                        self._unmap_at(done, gfns)
            finally:  # with the gate open: what is under way may have to walk the guest's page tables
                self._wait_released(lambda claim: any(claim.gfn in gfns for gfns in ranges))

    # ------------------------------------------------ without the daemon

    def freeze(self, why: str) -> None:
        """Refuse every map from now on: without the daemon nothing would unmap it in time."""
        with self._lock:
            self._frozen_because = why

    def revoke(self, ranges: Iterable[GfnRange]) -> None:
        """As `unmap`, but a lack of memslots or of KVM's memory does not make it fail: if the rest of a slot
        cannot stay, it goes as well. The guest then reaches less than it should, never more.

        Raises `WireError` if KVM does not even delete a slot; all the others are gone by then.
        """
        with self._lock:
            self._revoke(ranges)

    def unmap_behind(self, uaddrs: UaddrRange) -> None:
        """`revoke` every gfn that is backed by part of `uaddrs`."""
        with self._lock:
            self._revoke(self._table.behind(uaddrs))
            self._wait_released(lambda claim: claim.uaddr >> PAGE_SHIFT in uaddrs)

    # ------------------------------------------------ completing the guest's accesses

    def claim(self, gfn: int, access: Access) -> Claim | None:
        """The page behind `gfn`, if the guest may access it so. The caller has to `release` it.

        From the claim until its release, no unmap of the gfn returns.
        """
        with self._lock:
            slot = self._table.find(gfn)
            if slot is None or access not in slot.access:
                return None
            claim = Claim(gfn, Uaddr(slot.uaddr_page(gfn) << PAGE_SHIFT))
            self._claims.append(claim)
            return claim

    def reaches(self, gfn: int, access: Access) -> bool:
        """Whether the guest may access `gfn` so, right now."""
        with self._lock:
            slot = self._table.find(gfn)
            return slot is not None and access in slot.access

    def release(self, claim: Claim) -> None:
        with self._lock:
            self._claims.remove(claim)
            self._released.notify_all()

    # ------------------------------------------------ helpers; the lock is held

    def _change(self, gfns: GfnRange, change: Change) -> None:
        """Carry out a change of what is at `gfns`, and wait for the claims there on what was before.

        Also where nothing changes: another thread may have just removed it, and be waiting too.
        """
        if change:
            self._replace(change)
        self._wait_released(lambda claim: claim.gfn in gfns)

    def _unmap_at(self, done: int, gfns: GfnRange) -> None:
        """Unmap one piece of a list, after so many others."""
        try:
            if change := self._table.plan_unmap(gfns):
                self._replace(change)
        except WireError as refusal:
            raise refused_after(done, refusal) from refusal

    def _replace(self, change: Change) -> None:
        with self.gate.closed() if change.removed else nullcontext():
            self._carry_out(change)
        self._table.apply(change)
        self.generation += 1

    def _wait_released(self, concerns: Callable[[Claim], bool]) -> None:
        """Wait for the accesses in question that are under way. Meanwhile others may change the slots."""
        old = [claim for claim in self._claims if concerns(claim)]
        while any(claim in self._claims for claim in old):
            self._released.wait()

    def _revoke(self, ranges: Iterable[GfnRange]) -> None:
        failures: list[WireError] = []
        for gfns in ranges:
            try:
                self._change(gfns, self._table.plan_unmap(gfns))
            except (OSError, WireError):
                failures += self._drop(gfns)
        if failures:
            raise failures[0]

    def _drop(self, gfns: GfnRange) -> list[WireError]:
        """Delete every slot that overlaps `gfns`, whole: that needs no other. Returns what KVM refused."""
        failures: list[WireError] = []
        for slot in self._table.overlapping(gfns):
            try:
                self._replace(Change(removed=(slot,)))
            except WireError as refused:
                failures.append(refused)
        self._wait_released(lambda claim: claim.gfn in gfns)
        return failures

    def _carry_out(self, change: Change) -> None:
        """All or nothing. Raises what the undo does, if that fails too."""
        done: list[tuple[Memslot, bool]] = []
        try:
            for slot in change.removed:
                self._editor.delete_memslot(slot)
                done.append((slot, False))
            for slot in change.added:
                self._editor.set_memslot(slot)
                done.append((slot, True))
        except OSError as error:
            self._undo(done)
            number = error.errno or errno.EIO
            raise WireError(number, f"KVM refused a memslot: {error.strerror or error}") from error

    def _undo(self, done: list[tuple[Memslot, bool]]) -> None:
        """Take back what is `done` of a change: slots, and whether they are new.

        The table remains what the guest reaches: old slots that KVM does not take back leave it, and new ones
        that KVM does not delete come in. Then raises the `OSError`: the daemon believes otherwise, so its
        hypervisor connection has to end.
        """
        failures: list[OSError] = []
        stuck: list[Memslot] = []
        for slot, is_new in reversed(done):
            try:
                if is_new:
                    self._editor.delete_memslot(slot)
                else:
                    self._editor.set_memslot(slot)
            except OSError as error:
                failures.append(error)
                if is_new:
                    stuck.append(slot)
                else:
                    self._table.apply(Change(removed=(slot,)))
        self._table.apply(Change(added=tuple(stuck)))
        if failures:
            self.generation += 1
            raise failures[0]
