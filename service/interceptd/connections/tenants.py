"""One uid's share of the daemon: its connections, how fast it may ask, and how much of the log it may fill.

Owns the counts and the pace. Must not know what is asked, nor who may connect.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from interceptd.eager_lock import EagerLock

log = structlog.get_logger()

BURST_SECONDS = 0.25
"""What a uid that was quiet may ask at once, as seconds of its pace: a new VMM attaches all its VPs."""

REFUSAL_TURNS = 4
"""A refused connection costs accept, a task, a log line and reading what was sent: some five requests."""

REFUSALS_LOGGED_PER_SECOND = 100
"""Some 20 kB. Whoever connects only to be refused would else write as fast as the disk takes it."""


class Tenant:
    """All connections of one uid, `connections` of them.

    What is over the pace waits its turn, in the order in which it came, and its connection is not read
    meanwhile: nothing is lost, and no other uid waits.
    """

    def __init__(self, requests_per_second: Callable[[], int], gate: EagerLock) -> None:
        self.connections = 0
        self._rate = requests_per_second
        self._paid_until = 0.0
        self._line = EagerLock()
        self._gate = gate
        self._logged_since = 0.0
        self._logged = 0
        self._not_logged = 0

    async def throttle(self) -> None:
        """Block until one more request is within the pace (the generic cell rate algorithm, ITU-T I.371), and
        until it is this uid's turn: of all requests that wait one goes ahead in a round of the event loop."""
        async with self._line:
            now = trio.current_time()
            self._paid_until = max(self._paid_until, now) + 1 / self._rate()
            if self._paid_until > now + BURST_SECONDS:
                await trio.sleep_until(self._paid_until - BURST_SECONDS)
            async with self._gate:
                await trio.lowlevel.checkpoint()

    def charge(self) -> None:
        """Charge what a connection costs that is refused, beyond its turn; nobody waits here."""
        self._paid_until += REFUSAL_TURNS / self._rate()

    def log_refusal(self, event: str, **fields: object) -> None:
        """Log that a connection of this uid was refused, or count it for the next line's `not_logged`."""
        now = trio.current_time()
        if now >= self._logged_since + 1:
            self._logged_since, self._logged = now, 0
        if self._logged >= REFUSALS_LOGGED_PER_SECOND:
            self._not_logged += 1
            return
        if self._not_logged:
            fields |= {"not_logged": self._not_logged}
        log.info(event, **fields)
        self._logged, self._not_logged = self._logged + 1, 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to remember: it has no connection and the whole burst again."""
        return not self.connections and self._paid_until <= trio.current_time()


class Tenants:
    """By uid; `requests_per_second` is asked at every turn."""

    def __init__(self, requests_per_second: Callable[[], int]) -> None:
        self._rate = requests_per_second
        self._gate = EagerLock()  # FIFO, and each uid waits in it once: they take turns
        self._by_uid: dict[int, Tenant] = {}

    def of(self, uid: int) -> Tenant:
        if uid not in self._by_uid:
            self._by_uid = {known: tenant for known, tenant in self._by_uid.items() if not tenant.idle}
            self._by_uid[uid] = Tenant(self._rate, self._gate)
        return self._by_uid[uid]

    @property
    def connections(self) -> int:
        """Of all uids, in any state."""
        return sum(tenant.connections for tenant in self._by_uid.values())
