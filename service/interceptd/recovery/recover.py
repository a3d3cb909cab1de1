"""Takes over the partitions of a predecessor, with the connections that the service manager has kept.

Owns finding them, and deciding which cannot go on. Must not know how one comes back (`returning`).

Each comes back in a task of its own, so a huge or broken one holds up no other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial

import structlog
import trio

from intercept_protocol.text import sentence
from interceptd.connections.connection import Connection
from interceptd.connections.peer import Peer
from interceptd.ledger.inbox import VMM_INBOX
from interceptd.ledger.ledger import Ledger, LedgerUnreadable, LedgerVoid
from interceptd.log_share import charge_lines_to
from interceptd.partition.keeping import Keeper, Keeping
from interceptd.partition.kept_restore import KeptRestore
from interceptd.partition.registry import PartitionRegistry
from interceptd.recovery.fold import Fold
from interceptd.recovery.remains import Remains, sort
from interceptd.recovery.returning import Left, ReturningVmm
from interceptd.recovery.returning_restore import CannotReturn, LeftRestore, ReturningRestore, VmmEnded
from interceptd.scheduling.time_share import SHARE, give_way
from interceptd.sessions.dispatcher import Dispatcher
from interceptd.systemd.socket_activation import Kept

log = structlog.get_logger()


class NotRecovered(Exception):
    """A VMM cannot go on; the text says why."""


class NobodyLeft(Exception):
    """Nobody waits to go on; the text says why."""


class Recovery:
    """Of one start. `dispatcher` serves the VMMs that come back; `registry` counts them."""

    def __init__(self, dispatcher: Dispatcher, registry: PartitionRegistry, keeper: Keeper) -> None:
        self._dispatcher = dispatcher
        self._registry = registry
        self._keeper = keeper
        self._missing: set[str] = set()
        self._changed = trio.Event()
        self.connections = 0
        dispatcher.restores.wait_returned = self.wait_found

    def start(self, kept: Iterable[Kept], connections: trio.Nursery) -> None:
        """Begin to bring back everything, in tasks of `connections`."""
        for key, found in sort(kept).items():
            self._missing.add(key)
            connections.start_soon(self._recover, key, found)

    async def wait_found(self) -> None:
        """Block until each partition can be joined, or is given up. No VMM can hold this up."""
        while self._missing:
            await self._changed.wait()

    def found(self, key: str) -> None:
        self._missing.discard(key)
        self._changed.set()
        self._changed = trio.Event()

    async def _recover(self, key: str, remains: Remains) -> None:
        ledger: Ledger | None = None
        try:
            ledger = _ledger(remains)
            if (uid := _restoring_uid(ledger)) is not None:
                await self._recover_restore(key, remains, ledger, uid)
                return
            vmm, fold = await self._vmm(remains, ledger)
        except (LedgerVoid, NobodyLeft) as why:
            log.info("partition_not_continued", key=key, reason=sentence(why))
            await self._let_go(key, remains, ledger)
            return
        except Exception as why:
            # Whatever it is, it concerns this VMM alone: raised here, it would end all others.
            self._registry.not_recovered += 1
            ours = None if isinstance(why, NotRecovered | LedgerUnreadable | OSError) else why
            log.error(  # noqa: TRY400 - as a rule not a fault of ours
                "partition_not_recovered", key=key, error=sentence(why), exc_info=ours
            )
            await self._let_go(key, remains, ledger)
            return
        ledger.count_restart()
        inboxes = [VMM_INBOX, *fold.joined]
        keeping = Keeping(self._keeper, ledger, vmm.tenant, key, inboxes=inboxes, gone_count=fold.gone_count)
        left = Left(remains, fold, keeping, self._keeper.predecessor_rested)
        await ReturningVmm(self._dispatcher, left, vmm, lambda: self.found(key), self._count).run()

    async def _recover_restore(self, key: str, remains: Remains, ledger: Ledger, uid: int) -> None:
        """Raises `LedgerUnreadable` for a log that makes no sense, and `NotRecovered`."""
        tenant = self._dispatcher.admission.tenants.of(uid)
        SHARE.set(tenant.time_share)
        charge_lines_to(tenant.log_share)
        fold = await _folded(ledger)
        ledger.count_restart()
        keeping = Keeping(self._keeper, ledger, tenant, key, gone_count=fold.gone_count)
        left = LeftRestore(remains, fold, KeptRestore(keeping), tenant)
        found, restores = partial(self.found, key), self._dispatcher.restores
        try:
            await ReturningRestore(restores, left, found, partial(self._count, connections=0)).run()
        except BaseException as why:
            await self._keeper.forget(key)
            keeping.end()
            match why:
                case VmmEnded():
                    raise NobodyLeft(sentence(why)) from why
                case CannotReturn():
                    raise NotRecovered(sentence(why)) from why
            raise

    async def _let_go(self, key: str, remains: Remains, ledger: Ledger | None) -> None:
        if ledger is not None:
            ledger.close()
        await self._keeper.forget(key)
        remains.let_go(self._dispatcher.admission.tenants.of(os.geteuid()).closer)
        self.found(key)

    def _count(self, partitions: int, connections: int) -> None:
        self._registry.recovered += partitions
        self.connections += connections

    async def _vmm(self, remains: Remains, ledger: Ledger) -> tuple[Connection, Fold]:
        """The VMM's connection and its folded log. From here on its uid pays for the time.

        Raises `NobodyLeft`, and `LedgerUnreadable` for a log that makes no sense."""
        first = next(iter(remains.connections.values()), None)
        if first is None:
            raise NobodyLeft("its VMM has left")
        tenants, watch = self._dispatcher.admission.tenants, self._dispatcher.watch
        peer = Peer.of(first)
        tenant = tenants.of(peer.uid)
        SHARE.set(tenant.time_share)
        charge_lines_to(tenant.log_share)
        structlog.contextvars.bind_contextvars(**peer.named)
        fold = await _folded(ledger)
        if fold.opened is None:
            raise NobodyLeft("its VMM was not welcomed")
        vmm = remains.connections.pop(fold.opened.cookie, None)
        if vmm is None:
            raise NobodyLeft("its VMM has left")
        return Connection(vmm, tenants, watch), fold


async def _folded(ledger: Ledger) -> Fold:
    """Raises `LedgerUnreadable`."""
    fold = Fold()
    for frame, _ in ledger.frames():
        fold.read(frame)
        await give_way()
    for _ in ledger.give_back():
        await give_way()
    return fold


def _restoring_uid(ledger: Ledger) -> int | None:
    """Who asked, if the ledger is of a restore: its first record says so. Raises `LedgerUnreadable`."""
    first = next(ledger.frames(), None)
    if first is None:
        return None
    fold = Fold()
    fold.read(first[0])
    return None if fold.restoring is None else fold.restoring.uid


def _ledger(remains: Remains) -> Ledger:
    """Takes over its descriptor. Raises `NotRecovered`, `LedgerUnreadable`."""
    if len(remains.ledgers) != 1:
        raise NotRecovered(f"it has {len(remains.ledgers)} ledgers")
    ledger = Ledger.open(remains.ledgers[0])
    remains.ledgers.clear()
    return ledger
