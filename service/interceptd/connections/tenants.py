"""One uid's share of the daemon: its use of what is limited, its request rate, its share of the log.

Owns the ledger of every limit per uid, and the rates. Must not know what is requested, nor who may connect.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Protocol

import structlog
import trio

from intercept_protocol.errors import EncodedError
from interceptd.connections.closer import Closer
from interceptd.connections.crowd import FEW, Crowd
from interceptd.connections.refusals import RefusedRequests, method_word, warn_of_limit
from interceptd.eager_lock import EagerLock
from interceptd.log_pace import LogPace
from interceptd.log_share import LogShare
from interceptd.memory_budget import Cost, MemoryBudget, MemoryShare, unlimited
from interceptd.quota import Quota
from interceptd.scheduling.step_monitor import StepMonitor
from interceptd.scheduling.time_share import OnePerRound, TimeShares

log = structlog.get_logger()

BURST_SECONDS = 0.25
"""How much of its rate an idle uid may use at once, in seconds: a new VMM attaches all its VPs."""

REFUSAL_REQUESTS = 4
"""A refused connection costs an accept, a task, a log line and reading what was sent: about five requests."""
OBJECTS_PER_CONNECTION = 80
"""Of a VP, by `gc.get_objects`."""


class UidLimits(Protocol):
    """The limits per uid that are in force now, by their names in the configuration."""

    @property
    def control_requests_per_second(self) -> int: ...
    @property
    def connections_per_uid(self) -> int: ...
    @property
    def vmms_per_uid(self) -> int: ...
    @property
    def partitions_per_uid(self) -> int: ...
    @property
    def vps_per_uid(self) -> int: ...
    @property
    def regions_per_uid(self) -> int: ...
    @property
    def mappings_per_uid(self) -> int: ...
    @property
    def vmas_per_uid(self) -> int: ...
    @property
    def unclosed_descriptors_per_uid(self) -> int: ...


class Tenant:
    """One uid. Each `Quota` counts over all of its connections and partitions.

    Requests are rate-limited; the excess is delayed in the order of arrival, and its connections are not read
    meanwhile. Nothing is lost, and no other uid waits.
    """

    def __init__(
        self,
        uid: int,
        limits: Callable[[], UidLimits],
        gate: OnePerRound,
        turns: TimeShares,
        *,
        refused: RefusedRequests,
        memory: MemoryBudget,
    ) -> None:
        self.uid = uid
        self.time_share = turns.share()
        self._turns = turns
        self._crowd = Crowd()
        self.is_crowd = False
        """Whether it has many connections, which use its own `wait_readable`."""
        self.memory = MemoryShare(uid, memory)
        self.connections = self._quota("connections", Cost.CONNECTION, lambda: limits().connections_per_uid)
        self.hellos = self._quota("connections without hello", Cost.HELLO, lambda: sys.maxsize)
        self.vmms = self._quota("VMMs", Cost.VMM, lambda: limits().vmms_per_uid)
        self.partitions = self._quota("partitions", Cost.PARTITION, lambda: limits().partitions_per_uid)
        self.vps = self._quota("VPs", Cost.VP, lambda: limits().vps_per_uid)
        self.regions = self._quota("regions", Cost.REGION, lambda: limits().regions_per_uid)
        self.mappings = self._quota("mappings", Cost.MAPPING, lambda: limits().mappings_per_uid)
        self.vmas = self._quota("VMAs", Cost.VMA, lambda: limits().vmas_per_uid)
        self.invalidations = self._quota("open invalidations", Cost.OPEN_INVALIDATION, lambda: sys.maxsize)
        self.unclosed = Quota(
            uid,
            "unclosed descriptors",
            "unclosed_descriptors_per_uid",
            lambda: limits().unclosed_descriptors_per_uid,
        )
        self.closer = Closer(self.unclosed)
        """Closes what this uid's peers sent; it alone changes `unclosed`."""
        self._limits = limits
        self._paid_until = 0.0
        self._queue = EagerLock()
        self._gate = gate
        self.log_share = LogShare(uid)
        self.warnings = LogPace()
        self._refused = refused

    def _quota(self, noun: str, cost: Cost, limit: Callable[[], int]) -> Quota:
        """Of what takes memory; its limit is named after the noun."""
        return Quota(self.uid, noun, f"{noun.lower()}_per_uid", limit, memory=self.memory, cost=cost)

    def refused(self, method: str, error: EncodedError) -> None:
        """Count a request that is answered with `error`, and warn of the limit that it names, if any."""
        self._refused.count(method, error)
        warn_of_limit(self.uid, method_word(method), error, self.warnings)

    def count_connection(self) -> None:
        """Raises ENOSPC at the limit."""
        self.connections.acquire()
        self.is_crowd = self.connections.count > FEW

    def count_kept_connection(self) -> None:
        """The same, even beyond the limit."""
        self.connections.add(1)
        self.is_crowd = self.connections.count > FEW

    def forget_connection(self) -> None:
        self.connections.release()
        self.is_crowd = self.connections.count > FEW

    async def wait_readable(self, connection: socket.socket) -> None:
        """Block until a connection of this uid is readable. Of many that are, a few wake up per round."""
        if self._turns.nursery is None:
            await trio.lowlevel.wait_readable(connection)
        else:
            await self._crowd.wait_readable(connection, self._turns.nursery)

    async def throttle(self, requests: int = 1) -> None:
        """Block until one more request, which costs as much as `requests`, is within the rate (the generic
        cell rate algorithm, ITU-T I.371), and until it is this uid's turn: one waiting request goes ahead per
        round of the event loop."""
        cost = requests / self._limits().control_requests_per_second
        now = trio.current_time()
        paid_until = max(self._paid_until, now) + cost
        if paid_until <= now + BURST_SECONDS and not self._queue.locked() and self._gate.enter_nowait():
            self._paid_until = paid_until  # as a rule nobody is in the way
            return
        async with self._queue:
            now = trio.current_time()
            self._paid_until = max(self._paid_until, now) + cost
            if self._paid_until > now + BURST_SECONDS:
                await trio.sleep_until(self._paid_until - BURST_SECONDS)
            await self._gate.enter()

    def charge(self, requests: int = REFUSAL_REQUESTS) -> None:
        """Charge the cost of that many requests, by default of a refused connection, to the requests that
        follow; nothing waits here."""
        self._paid_until += requests / self._limits().control_requests_per_second

    def tell_not_logged(self) -> None:
        """Log how many lines were not, if there is no next line to say it."""
        if not_logged := self.log_share.take_not_logged():
            log.info("lines_not_logged", uid=self.log_share.uid, not_logged=not_logged)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to remember: it has nothing, and its whole bursts again."""
        paid = self._paid_until <= trio.current_time() and self.log_share.idle
        holds = self.memory.held or self.memory.cached or self.unclosed.count
        return paid and self.warnings.idle and not holds


class Tenants:
    """All of them, by uid. `limits` is called whenever one is needed; `turns` divides the loop's time, and
    `memory` is what they share."""

    def __init__(
        self,
        limits: Callable[[], UidLimits],
        turns: TimeShares | None = None,
        memory: MemoryBudget | None = None,
    ) -> None:
        self.memory = memory or unlimited()
        self._limits = limits
        self._turns = turns or TimeShares(StepMonitor())
        self._gate = self._turns.one_per_round()  # each uid waits in it at most once: they take turns
        self._by_uid: dict[int, Tenant] = {}
        self.refused = RefusedRequests()

    def of(self, uid: int) -> Tenant:
        if uid not in self._by_uid:
            for idle in [tenant for tenant in self._by_uid.values() if tenant.idle]:
                idle.tell_not_logged()
                del self._by_uid[idle.uid]
            self._turns.set_uids(len(self._by_uid) + 1)
            self._by_uid[uid] = Tenant(
                uid, self._limits, self._gate, self._turns, refused=self.refused, memory=self.memory
            )
        return self._by_uid[uid]

    def tell_not_logged(self) -> None:
        """At the daemon's end: log how many lines of each uid were not."""
        for tenant in self._by_uid.values():
            tenant.tell_not_logged()

    @property
    def kept_objects(self) -> int:
        """About how many objects that the garbage collector visits are kept for clients."""
        return OBJECTS_PER_CONNECTION * self.connections

    @property
    def connections(self) -> int:
        """Of all uids, in any state."""
        return sum(tenant.connections.count for tenant in self._by_uid.values())

    def suspect(self) -> dict[str, int]:
        """For the log: the uid with the most connections, and how many it has."""
        most = max(self._by_uid.values(), key=lambda tenant: tenant.connections.count, default=None)
        return (
            {}
            if most is None
            else {"most_connections_uid": most.uid, "most_connections": most.connections.count}
        )

    @property
    def vmms(self) -> int:
        """VMM connections of all uids, with a partition or without."""
        return sum(tenant.vmms.count for tenant in self._by_uid.values())
