"""The VMM's own hypervisor: wherever the daemon dies, nothing is left in its table that the record lacks.

A scripted VMM has a table of its own. The daemon asks it for drawn changes, in turn, and at every moment a
successor is tried: one whose VMM had not got the last request, one whose VMM carries it out only now, and one
whose VMM had done so.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from explorer.kept_log import KeptLog
from fakes.model_partition import ModelPartition
from intercept_protocol import messages
from intercept_protocol.addresses import PAGE_SHIFT, GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import HypervisorCall
from intercept_protocol.outcomes import Access
from interceptd.errors import PartitionLost
from interceptd.hypervisor import HypervisorError
from interceptd.hypervisor.remote import RemoteHypervisor, TimedOut, refusal
from interceptd.ledger import records
from interceptd.ledger.records import Record
from interceptd.memory.region_manager import RegionManager
from interceptd.pages.mapping import Frame
from interceptd.pages.mapping import Mapping as GuestMapping
from interceptd.recovery.fold import _APPLY, Fold
from interceptd.recovery.restore import restore, settle

from .states import done, region

GFNS = 16


@dataclass
class Vmm:
    """`refuses` and `is_late` are about the next request."""

    table: dict[int, int] = field(default_factory=dict)
    """By gfn, the page of the VMM's that it has put there."""
    refuses: int | None = None
    """At which piece."""
    is_late: bool = False

    def carry_out(self, call: HypervisorCall) -> None:
        refuses, self.refuses = self.refuses, None
        for number, piece in enumerate(call.pieces if hasattr(call, "pieces") else [call]):
            if number == refuses:
                raise WireError(errno.EIO, "refused", done=number)
            for n in range(piece.page_count):
                self.table.pop(piece.start_gfn + n, None)
                if isinstance(piece, messages.MapGpa):
                    self.table[piece.start_gfn + n] = (piece.start_uaddr >> PAGE_SHIFT) + n


@dataclass
class Death:
    """What a successor finds: the log, the VMM's table, and a request that the VMM is still to carry out."""

    frames: list[bytes]
    table: dict[int, int]
    unread: HypervisorCall | None = None


class Asking(RemoteHypervisor):
    """Asks the scripted VMM, and notes each moment at which it may die."""

    def __init__(self, vmm: Vmm, log: KeptLog, pieces_per_call: int) -> None:
        log.ledger = _Words()  # type: ignore[assignment] # only its msgid is asked for
        super().__init__(lambda: 1.0, log)
        self._vmm = vmm
        self._log = log
        self._most = pieces_per_call
        self.deaths: list[Death] = []

    @property
    def pieces_per_call(self) -> int:
        return self._most

    def may_die(self, unread: HypervisorCall | None = None) -> None:
        self.deaths.append(Death(list(self._log.frames), dict(self._vmm.table), unread))

    async def _request(self, call: HypervisorCall) -> None:
        self.may_die()
        self.may_die(unread=call)
        is_late, self._vmm.is_late = self._vmm.is_late, False
        try:
            self._vmm.carry_out(call)
        except WireError as error:
            raise refusal(call, error) from None
        finally:
            self.may_die()
        if is_late:
            raise TimedOut(errno.ETIMEDOUT, "late")


class _Words:
    last_msgid = 0


def ranges(rng: random.Random, most: int) -> list[GfnRange]:
    """Disjoint."""
    cuts = sorted(rng.sample(range(GFNS + 1), 2 * rng.randint(1, most)))
    return [GfnRange(start=start, end=end) for start, end in zip(cuts[::2], cuts[1::2], strict=True)]


async def lived(rng: random.Random, pieces: int) -> list[Death]:
    """Some changes, and every moment at which the daemon could have died."""
    vmm, log = Vmm(), KeptLog()
    hypervisor = Asking(vmm, log, pieces)
    log.append(done("add_region", region(0, GFNS, 100, "pinned"), {"kind": "pinned"}))
    for _ in range(4):
        asked = ranges(rng, pieces)
        vmm.is_late = rng.random() < 0.3
        if rng.random() < 0.6:
            vmm.refuses = rng.randrange(len(asked)) if rng.random() < 0.4 else None
            maps = [
                GuestMapping(each.start, each.end, Frame("host", each.start), 100 + each.start, Access.READ)
                for each in asked
            ]
            with suppress(HypervisorError):
                await hypervisor.map_gpas(maps)
        else:
            vmm.is_late = False
            await hypervisor.unmap_gpas(asked)
        hypervisor.may_die()
    return hypervisor.deaths


async def recovered(death: Death, pieces: int, seen: list[Death] | None = None) -> str | None:
    """How the VMM's table is not what a successor has recorded. `seen` gets the moments of its own death."""
    fold, log, vmm = Fold(), KeptLog(), Vmm(dict(death.table))
    for frame in death.frames:
        fold.read(frame)
    log.go_on_from(death.frames, fold)
    hypervisor = Asking(vmm, log, pieces)
    model = ModelPartition()
    partition = model.partition
    partition.hypervisor, partition.table = hypervisor, hypervisor.table
    model.mappings._hypervisor = hypervisor
    strays = await restore(partition, fold)
    if death.unread is not None:
        with suppress(WireError):
            vmm.carry_out(death.unread)  # it lay in the socket, before what the successor asks
    await settle(partition, strays)
    recorded = {
        gfn: mapping.start_uaddr_page + gfn - mapping.start
        for mapping in model.mappings._record
        for gfn in range(mapping.start, mapping.end)
    }
    if seen is not None:
        seen += hypervisor.deaths
    if vmm.table != recorded:
        return f"the VMM has {vmm.table}, and the record {recorded}"
    if log.fold.doubt or list(log.fold.table) != list(hypervisor.table):
        return f"the log has {list(log.fold.table)}, and in doubt {list(log.fold.doubt)}"
    return None


async def wrong(seeds: Sequence[int], *, again: bool = True) -> str | None:
    """The first contradiction in some lives, each of whose deaths has a successor, which may die as well."""
    for seed in seeds:
        rng = random.Random(seed)
        pieces = rng.choice((1, 2, 3))
        for death in await lived(rng, pieces):
            later: list[Death] = []
            fewer = rng.randint(1, pieces)
            if how := await recovered(death, fewer, later):
                return f"seed {seed}: {how}"
            for second in later if again else ():
                if how := await recovered(second, fewer):
                    return f"seed {seed}, the second death: {how}"
    return None


async def test_wherever_the_daemon_dies_the_vmm_has_what_is_recorded() -> None:
    assert await wrong(range(40)) is None


async def test_a_successor_that_does_not_unmap_what_is_in_doubt_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stale: the guest reaches what nobody will take away."""
    monkeypatch.setitem(_APPLY, records.Changing, lambda *_: None)
    assert "the VMM has" in (await wrong(range(10)) or "")


async def test_a_successor_that_records_what_is_in_doubt_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def believe(*_: object) -> None:
        pass

    monkeypatch.setattr(RegionManager, "doubt", believe)
    assert "and the record" in (await wrong(range(10)) or "")


async def test_doubt_that_ends_with_the_first_part_of_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(fold: Fold, _: Record) -> None:
        fold.doubt = type(fold.doubt)()

    monkeypatch.setitem(_APPLY, records.Settled, forget)
    assert "the second death" in (await wrong(range(40)) or "")


async def test_an_unmap_that_failed_leaves_its_gfns_in_doubt() -> None:
    """Its partition must end, and may be killed before it has."""
    vmm, log = Vmm({gfn: 100 + gfn for gfn in range(GFNS)}), KeptLog()
    hypervisor = Asking(vmm, log, 3)
    vmm.refuses = 1
    with pytest.raises(HypervisorError):
        await hypervisor.unmap_gpas([GfnRange(start=0, end=2), GfnRange(start=4, end=6)])
    assert [(gfns.start, gfns.end) for gfns in log.fold.doubt] == [(0, 2), (4, 6)]


async def test_a_late_map_that_cannot_be_undone_leaves_its_gfns_in_doubt() -> None:
    vmm, log = Vmm(is_late=True), KeptLog()
    hypervisor = Asking(vmm, log, 3)

    async def answered_once(_: HypervisorCall) -> None:
        hypervisor._request = refuse  # type: ignore[method-assign,assignment] # next
        raise TimedOut(errno.ETIMEDOUT, "late")

    async def refuse(_: HypervisorCall) -> None:
        raise HypervisorError(errno.EIO, "refused")

    hypervisor._request = answered_once  # type: ignore[method-assign,assignment] # late
    with pytest.raises(PartitionLost):
        await hypervisor.map_gpas([GuestMapping(0, 2, Frame("host", 5), 100, Access.READ)])
    assert [(gfns.start, gfns.end) for gfns in log.fold.doubt] == [(0, 2)]
