"""Daemons that survive worse: the real one without one safeguard of its restart, for tests that detect it.

Owns the mutants. `fakes.killed_daemon` runs them; a kill between two steps that a mutant has turned round is
planned as usual.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any, Final

from fakes.killed_daemon import Plan
from interceptd.connections.connection import Connection
from interceptd.hypervisor.remote import RemoteHypervisor
from interceptd.ledger.inbox import IDLE, Inbox
from interceptd.ledger.journal import Journal
from interceptd.ledger.records import Changing, Done, Record, Settled
from interceptd.partition.keeping import Hello, Keeping
from interceptd.partition.virtual_processor import VirtualProcessor
from interceptd.recovery import fold
from interceptd.recovery.returning import ReturningVmm

Mutant = Callable[[Plan], None]


def _replace(owner: object, name: str, by: object) -> None:
    setattr(owner, name, by)


def without_inboxes(_: Plan) -> None:
    """What was received and not answered is lost."""
    take_over = Inbox.take_over

    def forget(inbox: Inbox) -> bytes:
        if not inbox.owes_hello:
            inbox.clear()
        return take_over(inbox)

    _replace(Inbox, "take_over", forget)


def wiping_before_marking(plan: Plan) -> None:
    """An answered request is forgotten before the inbox says that nothing is owed."""
    wipe = Inbox._wipe

    def answered(inbox: Inbox, *, put_off: bool = False) -> None:
        if inbox._marked:
            strikes = inbox.strikes if put_off else 0
            first = inbox._buffer[0]
            wipe(inbox, strikes)
            inbox._buffer[0] = first
        plan.reach("marked")
        inbox._buffer[0] = IDLE

    _replace(Inbox, "answered", answered)


def answering_before_recording(_: Plan) -> None:
    """What was carried out is recorded when its answer is sent, and nothing is owed any more."""
    append, answer = Journal.append, Connection.answer
    held: list[tuple[Journal, Record]] = []

    def hold(journal: Journal, record: Record) -> None:
        if isinstance(record, Done):
            held.append((journal, record))
        else:
            append(journal, record)

    async def answer_first(connection: Connection, data: bytes) -> None:
        await answer(connection, data)
        while held:
            append(*held.pop())

    _replace(Journal, "append", hold)
    _replace(Connection, "answer", answer_first)


def welcoming_before_storing(_: Plan) -> None:
    """A connection is kept once it was welcomed."""
    join, send = Keeping.join, Connection.send
    coming: dict[Connection, tuple[Keeping, Hello]] = {}

    async def note(keeping: Keeping, connection: Connection, hello: Hello) -> None:
        coming[connection] = keeping, hello

    async def send_first(connection: Connection, data: bytes) -> None:
        await send(connection, data)
        if connection in coming:
            keeping, hello = coming.pop(connection)
            await join(keeping, connection, hello)

    _replace(Keeping, "join", note)
    _replace(Connection, "send", send_first)


def closing_without_shutdown(_: Plan) -> None:
    """The keeper's duplicate keeps a closed connection open."""
    _replace(socket.socket, "shutdown", lambda *_: None)


def without_kept_kicks(_: Plan) -> None:
    """A kick that nobody waited for dies with its daemon."""
    join, kick = ReturningVmm._join_vp, VirtualProcessor.kick
    is_returning = False

    def join_unkicked(*args: Any) -> None:
        nonlocal is_returning
        is_returning = True
        join(*args)
        is_returning = False

    def kick_later(vp: VirtualProcessor) -> None:
        if not is_returning:
            kick(vp)

    _replace(ReturningVmm, "_join_vp", join_unkicked)
    _replace(VirtualProcessor, "kick", kick_later)


def confusing_answers(_: Plan) -> None:
    """An answer to what a predecessor had asked is a violation."""
    _replace(RemoteHypervisor, "_is_predecessors", lambda *_: False)


def without_doubt(_: Plan) -> None:
    """What the VMM was being asked is taken for not done."""

    append = Journal.append

    def append_others(journal: Journal, record: Record) -> None:
        if not isinstance(record, Changing | Settled):
            append(journal, record)

    _replace(Journal, "append", append_others)


def forgetting_what_went(_: Plan) -> None:
    """Events of the userfaultfd are not recorded."""
    _replace(Journal, "gone", lambda *_: None)


def forgetting_the_event_read(_: Plan) -> None:
    """An event that was read and not recorded is lost."""
    _replace(ReturningVmm, "_invalidate_event", lambda *_: None)


def forgetting_begins(_: Plan) -> None:
    """Ranges that were begun are open no more."""
    _replace(fold, "_DONE", {**fold._DONE, "invalidate_begin": lambda *_: None})


MUTANTS: Final[Mapping[str, Mutant]] = {
    "without inboxes": without_inboxes,
    "wiping before marking": wiping_before_marking,
    "answering before recording": answering_before_recording,
    "welcoming before storing": welcoming_before_storing,
    "closing without shutdown": closing_without_shutdown,
    "without kept kicks": without_kept_kicks,
    "confusing answers": confusing_answers,
    "without doubt": without_doubt,
    "forgetting what went": forgetting_what_went,
    "forgetting the event read": forgetting_the_event_read,
    "forgetting begins": forgetting_begins,
}
