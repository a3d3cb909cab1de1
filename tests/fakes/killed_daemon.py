"""A daemon that kills itself with SIGKILL where a test says: `python -m fakes.killed_daemon PLAN serve ...`.

Owns the points: each is a function of the real daemon, before or after which the process ends. PLAN is a file
of a few bytes that test and daemons share: which points are to come, and at which call of each. A daemon that
reaches the first strikes it off and dies; its successor goes on with the next. An environment variable names
a safeguard that every daemon does without.
"""

from __future__ import annotations

import importlib
import inspect
import mmap
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

MUTANT_VARIABLE: Final = "KILLED_DAEMON_MUTANT"
PLAN_BYTES: Final = mmap.PAGESIZE
COMPACT_BYTES: Final = 4096
"""The logs of these daemons are compacted early."""

Condition = Callable[..., bool]


class Point(NamedTuple):
    """Before or after the calls of a function, given as `module:name`, for which `condition` holds."""

    function: str
    is_after: bool
    condition: Condition


def _before(function: str, condition: Condition = lambda *_, **__: True) -> Point:
    return Point(f"interceptd.{function}", False, condition)


def _after(function: str, condition: Condition = lambda *_, **__: True) -> Point:
    return Point(f"interceptd.{function}", True, condition)


def _recording(*kinds: str) -> Condition:
    return lambda _, record: type(record).__name__ in kinds


def _stored(letter: str) -> Condition:
    return lambda _, name, *__, **___: name[0] == letter


_APPEND: Final = "ledger.journal:Journal.append"
_RETURNING: Final = "recovery.returning:"
POINTS: Final[Mapping[str, Point]] = {
    # a connection comes
    "accepted": _before("sessions.handshake:Admission.admit"),
    "admitted": _after("sessions.handshake:Admission.admit"),
    "ledger stored": _after("systemd.fd_store:FdStore.store", _stored("p")),
    "connection stored": _after("systemd.fd_store:FdStore.store", _stored("c")),
    "joined": _after(_APPEND, _recording("Opened", "Joined")),
    "partition made": _before("partition.keeping:Keeping.created"),
    "partition recorded": _after(_APPEND, _recording("Created")),
    # a request
    "peeked": _before("connections.request_reader:RequestReader._receive"),
    "read": _before("ledger.inbox:Inbox.note"),
    "noted": _after("ledger.inbox:Inbox.note"),
    "carried out": _before(_APPEND, _recording("Done")),
    "done": _after(_APPEND, _recording("Done")),
    "to be sent": _before("connections.connection:Connection.send_now"),
    "sent": _after("connections.connection:Connection.send_now"),
    "marked": _before("ledger.inbox:Inbox._wipe"),
    "wiped": _after("ledger.inbox:Inbox.answered"),
    # an intercept, on the hot path
    "intercept read": _after("connections.received_fds:ReceivedFds.receive"),
    # the guest's mappings
    "changing": _after(_APPEND, _recording("Changing")),
    "asked": _after("connections.connection:Connection.send_now", lambda _, data: data[:2] == b"\x94\0"),
    "told": _after("connections.connection:Connection.receive_response"),
    "to be edited": _before(_APPEND, _recording("Mapped", "Unmapped")),
    "edited": _after(_APPEND, _recording("Mapped", "Unmapped")),
    "settled": _after(_APPEND, _recording("Settled")),
    "exchanging": _before("memory.region_manager:RegionManager._exchange"),
    "exchanged": _after("memory.region_manager:RegionManager._exchange"),
    "to be unmade": _before("memory.mapping_change:MappingChange.unmake"),
    "to be put back": _before("memory.mapping_change:MappingChange.put_back"),
    "put back": _after("memory.mapping_change:MappingChange.put_back"),
    "policy": _after(_APPEND, _recording("Policy")),
    # memory
    "memory to be stored": _before("systemd.fd_store:FdStore.store", _stored("m")),
    "memory stored": _after("systemd.fd_store:FdStore.store", _stored("m")),
    "event unread": _before("address_space.userfaultfd:Userfaultfd.read_events"),
    "event read": _before("ledger.journal:Journal.gone"),
    "gone": _after("ledger.journal:Journal.gone"),
    "event forgotten": _after("address_space.userfaultfd:Userfaultfd.forget_event"),
    "unserved": _before(_APPEND, _recording("Served")),
    "served": _after(_APPEND, _recording("Served")),
    # an end
    "ending": _before("partition.partition:Partition._end"),
    "unmapped all": _after("memory.region_manager:RegionManager.close"),
    "to be let go": _before("partition.keeping:Keeping.let_go"),
    "let go": _after("partition.keeping:Keeping.let_go"),
    "ended": _before("partition.keeping:Keeping.end"),
    "dropping": _before("systemd.fd_store:FdStore.remove"),
    "dropped": _after("partition.keeping:Keeping.end"),
    "leaving": _before("partition.keeping:Keeping.leave"),
    "left": _after("partition.keeping:Keeping.leave"),
    # a compaction
    "compacting": _after("ledger.ledger:Rewriting.append"),
    "to be committed": _before("ledger.ledger:Rewriting.commit"),
    "committed": _after("ledger.ledger:Rewriting.commit"),
    "compacted": _after("ledger.journal:Journal.compacted"),
    # a successor
    "taking over": _before("ledger.ledger:Ledger.open"),
    "counted": _after("ledger.ledger:Ledger.count_restart"),
    "restored": _before(f"{_RETURNING}announce"),
    "announced": _after(f"{_RETURNING}announce"),
    "connection taken over": _after(f"{_RETURNING}ReturningVmm._take_over"),
    "linked": _before(f"{_RETURNING}ReturningVmm._attach_memory"),
    "memory attached": _before(f"{_RETURNING}settle"),
    "all settled": _after(f"{_RETURNING}settle"),
    "joining again": _before(f"{_RETURNING}ReturningVmm._join"),
    "joined again": _after(f"{_RETURNING}ReturningVmm._join"),
    "owed": _before(f"{_RETURNING}ReturningVmm._owed_to_vmm"),
    "about to answer": _after(f"{_RETURNING}ReturningVmm._owed_to_vmm"),
    "found": _after("recovery.recover:Recovery.wait_found"),
    "ready": _after("systemd.notify:ServiceManager.ready"),
}  # fmt: skip
_KEPT_RESTORE: Final = "partition.kept_restore:KeptRestore."
RESTORE_POINTS: Final[Mapping[str, Point]] = {
    # a restore is asked for
    "listener stored": _after("systemd.fd_store:FdStore.store", _stored("l")),
    "image stored": _after("systemd.fd_store:FdStore.store", _stored("i")),
    "page list stored": _after("systemd.fd_store:FdStore.store", _stored("f")),
    "restore to be recorded": _before(_APPEND, _recording("Restoring")),
    "restore recorded": _after(_APPEND, _recording("Restoring")),
    # a VMM hands its memory over
    "hand-off connected": _after(f"{_KEPT_RESTORE}connected"),
    "hand-off seen": _before(f"{_KEPT_RESTORE}handed_off"),
    "hand-off to be recorded": _before(_APPEND, _recording("HandedOff")),
    "hand-off recorded": _after(_APPEND, _recording("HandedOff")),
    "listener dropped": _after(f"{_KEPT_RESTORE}handed_off"),
    # pages come in, and are given back
    "fault read": _before("partition.fault_reader:FaultReader._fault"),
    "brought in": _before("hypervisor.userfaultfd:UserfaultfdHypervisor._record"),
    "brought in and recorded": _after("hypervisor.userfaultfd:UserfaultfdHypervisor._record"),
    "removal read": _before("partition.fault_reader:FaultReader._remove"),
    "removal forgotten": _after("address_space.missing_faults:MissingFaults.forget_message"),
    "to be left to the kernel": _before("address_space.missing_faults:MissingFaults.unregister"),
    "left to the kernel": _after("address_space.missing_faults:MissingFaults.unregister"),
    # a successor
    "restore found": _before("sessions.restores:Restores.go_on"),
    "image open": _after("sessions.restores:open_image"),
    "bringing back": _before("recovery.returning_restore:announce"),
    "removing again": _before("recovery.returning_restore:removal_in"),
    "brought back": _before("partition.fault_reader:FaultReader.wake_all"),
    "woken": _after("partition.fault_reader:FaultReader.wake_all"),
}  # fmt: skip
"""Those of a restored guest alone."""
_ALL: Final = {**POINTS, **RESTORE_POINTS}
_NUMBERS: Final = {name: number for number, name in enumerate(_ALL, start=1)}


class Plan:
    """The points to come, in memory that the test shares with its daemons."""

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(PLAN_BYTES)
            self._bytes = mmap.mmap(file.fileno(), PLAN_BYTES)

    def set(self, *points: tuple[str, int]) -> None:
        """Die at these points, one after the other; each with which call of it from now on, or from then on,
        is meant."""
        entries = b"".join(bytes([_NUMBERS[name], call]) for name, call in points)
        self._bytes[1 : 1 + len(entries)] = entries
        self._bytes[len(entries) + 1] = 0
        self._bytes[:1] = b"\1"  # last: a daemon may be looking

    @property
    def is_over(self) -> bool:
        """Whether each point was reached."""
        return not self._bytes[0] or not self._bytes[1]

    def reach(self, name: str) -> None:
        """Die here, if it is planned."""
        if self._bytes[0] and self._bytes[1] == _NUMBERS[name]:
            if self._bytes[2] > 1:
                self._bytes[2] -= 1
                return
            self._bytes[1:-2] = self._bytes[3:]
            os.kill(os.getpid(), signal.SIGKILL)


def patch(plan: Plan, name: str, point: Point) -> None:
    """Have the process die at a point when the plan says so."""
    module, _, path = point.function.partition(":")
    holder: Any = importlib.import_module(module)
    *owners, attribute = path.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    original: Callable[..., Any] = getattr(holder, attribute)

    def reached(*args: Any, **options: Any) -> None:
        if point.condition(*args, **options):
            plan.reach(name)

    async def awaited(found: Awaitable[Any], *args: Any, **options: Any) -> Any:
        result = await found
        reached(*args, **options)
        return result

    def patched(*args: Any, **options: Any) -> Any:
        if not point.is_after:
            reached(*args, **options)
        result = original(*args, **options)
        if point.is_after:
            if inspect.isawaitable(result):
                return awaited(result, *args, **options)
            reached(*args, **options)
        return result

    raw = inspect.getattr_static(holder, attribute)
    setattr(holder, attribute, staticmethod(patched) if isinstance(raw, classmethod) else patched)


def main() -> None:
    plan = Plan(Path(sys.argv.pop(1)))
    from interceptd import cli  # noqa: PLC0415 - tests import this module, and not the daemon
    from interceptd.ledger import journal  # noqa: PLC0415

    journal.COMPACT_BYTES = COMPACT_BYTES
    if mutant := os.environ.get(MUTANT_VARIABLE):
        from fakes.forgetful_daemons import MUTANTS  # noqa: PLC0415

        MUTANTS[mutant](plan)
    for name, point in _ALL.items():
        patch(plan, name, point)
    cli.main()


if __name__ == "__main__":
    main()
