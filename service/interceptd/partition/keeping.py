"""Has the service manager keep a VMM for the next daemon: its ledger, its connections, its memory.

Owns the order in which they are stored and recorded, and the numbers of the inboxes. If the manager refuses
one, nothing of this VMM outlives the daemon: with half of it a successor could not go on.

A connection is stored, then recorded, then welcomed. If a successor finds one stored and not recorded, it had
no welcome, and its client begins again (H-16 of the protocol).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import structlog
import trio

from interceptd.address_space.attachment import Attachment
from interceptd.connections.connection import Connection
from interceptd.connections.tenants import Tenant
from interceptd.descriptor_reserve import kept_from_newcomers
from interceptd.ledger import records
from interceptd.ledger.inbox import HYPERVISOR_INBOX, INBOXES, LARGE_INBOXES, VMM_INBOX
from interceptd.ledger.journal import Journal
from interceptd.ledger.last_id import LastId
from interceptd.ledger.ledger import Ledger
from interceptd.scheduling.time_share import TimeShare
from interceptd.systemd.fd_store import FdStore, StoreRefused

log = structlog.get_logger()

LAST_ID = "d"
"""Its name in the store."""
SHARE = 3
"""A uid may hold so many times as much of the store as it leaves free, so the next uid finds room."""
_LETTERS = "pcmlif"
"""Ledger, connections, memory; of a restore its listener, image, and list of pages."""
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


class Hello(NamedTuple):
    """What a successor must know of a connection's hello."""

    role: str
    msgid: int
    vp_index: int = 0
    lists: bool = False


class Keeper:
    """The daemon's access to the store. `store` is None if nothing outlives the daemon. Calls `on_long` for a
    journal whose log is worth a compaction, and `on_end` when a journal ends."""

    def __init__(
        self,
        store: FdStore | None,
        on_long: Callable[[Journal, TimeShare], None],
        on_end: Callable[[Journal], None],
    ) -> None:
        self.store = store
        self.on_long = on_long
        self.on_end = on_end
        self._last_id: LastId | None = None
        self.predecessor_rested = False
        self._names: defaultdict[int, set[str]] = defaultdict(set)
        """By uid: the names under which it may have descriptors in the store."""

    @property
    def works(self) -> bool:
        """Whether what is connected now would outlive the daemon."""
        return self.store is not None and self.store.works

    async def keep_last_id(self, kept: int | None) -> int:
        """Keep the last partition id; `kept` is a predecessor's descriptor of it. Returns the id, 0 without
        one. Raises `StoreRefused`, `OSError`."""
        assert self.store is not None, "else nothing is kept"
        self._last_id = LastId(kept)
        self.predecessor_rested = self._last_id.take_rest()
        if kept is None:
            await self.store.store(LAST_ID, [self._last_id.descriptor], poll=False)
        return self._last_id.value

    def created(self, partition_id: int) -> None:
        """Record that this id was given out."""
        if self._last_id is not None:
            self._last_id.value = partition_id

    def rest(self) -> None:
        """Record that the daemon rests: its successor does not blame a request for its end."""
        if self._last_id is not None:
            self._last_id.rest()

    def begin(self, uid: int, key: str) -> None:
        """Count the names of this VMM for its uid."""
        self._names[uid].update(_names(key))

    def end(self, uid: int, key: str) -> None:
        """Count the names of this VMM no longer."""
        self._names[uid].difference_update(_names(key))
        if not self._names[uid]:
            del self._names[uid]

    def require_share(self, uid: int, more: int) -> None:
        """Raises `StoreRefused` if `more` descriptors would exceed the uid's share of the store."""
        assert self.store is not None, "else nothing is kept"
        held = self.store.held_as(self._names[uid])
        if held + more > SHARE * (self.store.room - more):
            raise StoreRefused(f"uid {uid} has {held} descriptors in the store, and others need room, too")

    def remove(self, key: str) -> None:
        """Have the manager drop everything of one VMM."""
        if self.store is not None:
            for name in _names(key):
                self.store.remove(name)

    async def forget(self, key: str) -> None:
        """The same, and wait until the manager has done so."""
        if self.store is not None:
            self.remove(key)
            await self.store.settle()

    async def open(self, vmm: Connection, name: str, msgid: int) -> Keeping | None:
        """Keep a VMM that said hello. None if nothing is kept."""
        keeping = self.new_keeping(vmm.tenant, key_of(vmm.cookie))
        if keeping is not None:
            await keeping.open(vmm, name, msgid)
        return keeping

    def new_keeping(self, tenant: Tenant, key: str) -> Keeping | None:
        """With a ledger that is not stored yet. None if nothing is kept."""
        if self.store is None:
            return None
        try:
            ledger = Ledger.create()
        except OSError as error:
            log.warning("partition_not_kept", reason=str(error))
            return None
        if kept_from_newcomers(ledger.descriptor):
            ledger.close()
            log.warning("partition_not_kept", reason="no descriptor is left for its ledger")
            return None
        return Keeping(self, ledger, tenant, key)


class Keeping:
    """Of one VMM, by the name that it has in the store."""

    def __init__(
        self,
        keeper: Keeper,
        ledger: Ledger,
        tenant: Tenant,
        key: str,
        *,
        inboxes: Iterable[int] = (),
        gone_count: int = 0,
    ) -> None:
        """`inboxes` are those that a predecessor used, and `gone_count` is its last number."""
        assert keeper.store is not None, "the keeper keeps"
        share = tenant.time_share
        self.ledger = ledger
        self.journal = Journal(ledger, lambda long: keeper.on_long(long, share), gone_count=gone_count)
        self.key = key
        self._uid = tenant.uid
        self._keeper = keeper
        self._store: FdStore = keeper.store
        keeper.begin(self._uid, self.key)
        self._used = set(inboxes)

    async def open(self, vmm: Connection, name: str, msgid: int) -> None:
        """Keep the ledger and the VMM's connection, whose hello is not answered yet."""
        inbox = self.ledger.inbox(VMM_INBOX)
        inbox.clear()
        inbox.owe_hello()
        vmm.use(inbox)
        await self.keep("p", self.ledger.descriptor, poll=False)
        await self.keep("c", vmm.descriptor, poll=True)
        self.journal.append(records.Opened(vmm.cookie, name, msgid))

    def created(self, partition_id: int, token: bytes, request: Sequence[Any]) -> None:
        """The VMM's partition was created; its answer is owed."""
        fields = request[0] if request else {}
        serial = self.ledger.inbox(VMM_INBOX).serial
        self.journal.append(records.Created(serial, partition_id, token, fields))

    async def join(self, connection: Connection, hello: Hello) -> None:
        """Keep a connection that joins, whose hello is not answered yet."""
        if self.journal.is_void:
            return
        number = self._free_inbox(hello.role)
        if number is None:
            self.give_up(f"more than {INBOXES - LARGE_INBOXES} connections joined")
            return
        self._used.add(number)
        inbox = self.ledger.inbox(number)
        inbox.clear()
        inbox.owe_hello()
        try:
            await self.keep("c", connection.descriptor, poll=True)
        except BaseException:
            self._used.discard(number)
            raise
        connection.use(inbox)  # from here on `leave` ends what is kept
        self.journal.append(
            records.Joined(number, connection.cookie, hello.role, hello.msgid, hello.vp_index, hello.lists)
        )

    def leave(self, connection: Connection) -> None:
        """Record that a connection ended while its partition goes on."""
        if connection.inbox is not None:
            self.left(connection.inbox.number)
            self._store.hung_up(f"c{self.key}")

    def left(self, inbox: int) -> None:
        """Record that the connection of an inbox ended, perhaps while no daemon ran."""
        self._used.discard(inbox)
        self.journal.append(records.Left(inbox))

    @property
    def event(self) -> memoryview:
        """Where events of the VMM's userfaultfd are read to."""
        return self.ledger.event

    async def keep_memory(self, attachment: Attachment) -> None:
        """Keep what the VMM handed over, before it is used."""
        await self.keep("m", *attachment.descriptors, poll=False)

    async def forget_memory(self) -> None:
        """Have the manager close its duplicates of the memory before we close ours: the last close of a
        userfaultfd waits for its VMM. Cannot be cancelled."""
        if self._store.remove(f"m{self.key}"):
            with trio.CancelScope(shield=True):
                await self._store.settle()

    async def let_go(self) -> None:
        """Call it when the partition has ended and nothing of it is mapped: no successor will take it
        over."""
        self.journal.end()
        await self.forget_memory()

    def give_up(self, why: str) -> None:
        """From now on nothing of this VMM outlives the daemon."""
        self.journal.give_up(why)
        self._keeper.remove(self.key)

    def end(self) -> None:
        """Call it when the VMM's connection ends."""
        self._keeper.on_end(self.journal)
        self.journal.end()
        self._keeper.remove(self.key)
        self._keeper.end(self._uid, self.key)
        self.ledger.close()

    async def keep(self, letter: str, *descriptors: int, poll: bool) -> None:
        """Keep descriptors under one of `_LETTERS`. With `poll` one that hangs up is dropped."""
        if self.journal.is_void:
            return
        try:
            self._keeper.require_share(self._uid, len(descriptors))
            await self._store.store(f"{letter}{self.key}", descriptors, poll=poll)
        except StoreRefused as refused:
            self.give_up(str(refused))

    def drop(self, letter: str) -> None:
        """Keep what was kept under this letter no longer."""
        self._store.remove(f"{letter}{self.key}")

    def _free_inbox(self, role: str) -> int | None:
        if role == "hypervisor":
            return HYPERVISOR_INBOX
        return next((number for number in range(LARGE_INBOXES, INBOXES) if number not in self._used), None)


def _names(key: str) -> list[str]:
    """The names of everything that is stored of one VMM."""
    return [f"{letter}{key}" for letter in _LETTERS]


def key_of(cookie: int) -> str:
    """A short name: all names of the store share one variable of the next daemon's environment."""
    digits = ""
    while cookie:
        cookie, digit = divmod(cookie, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return digits or "0"
