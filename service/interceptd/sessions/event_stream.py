"""The sending side of an operator's connection: answers, and the events in between.

Owns the rule that two messages never mix, and how many events are sent in one turn. Must not know what is
published, nor what an operator may ask.
"""

from __future__ import annotations

from contextlib import suppress

import trio

from intercept_protocol import rpc
from intercept_protocol.events import EVENT_METHOD
from interceptd.connections.connection import Connection, ConnectionGone
from interceptd.telemetry.event_bus import Subscription

EVENTS_A_TURN = 64
"""Encoding one takes some 5 us, and other tasks wait as long."""


class EventStream:
    """One operator's. An operator that does not read is waited for by this task alone."""

    def __init__(self, connection: Connection, subscription: Subscription) -> None:
        self._connection = connection
        self._subscription = subscription
        self._sending = trio.Lock()

    async def send(self, data: bytes) -> None:
        """Send an answer, whole. Raises `ConnectionGone`."""
        async with self._sending:
            await self._connection.send(data)

    async def run(self) -> None:
        """Send events as they come, until cancelled, or until the connection is gone: its reader notices."""
        with suppress(ConnectionGone):
            while True:
                await self._subscription.wait()
                events = self._subscription.take(EVENTS_A_TURN)
                await self.send(
                    b"".join(rpc.encode_notification(EVENT_METHOD, [event.to_fields()]) for event in events)
                )
                await trio.lowlevel.checkpoint()
