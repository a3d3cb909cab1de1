"""The receive buffer of one connection, in memory that outlives the daemon.

Owns the buffer and the marks around it. Must not know what a request means.

A kept connection reads straight into its inbox, so everything that the kernel has handed out is there. An
inbox holds one request at a time. Byte 0 is `IDLE`, which MessagePack never uses, while no answer is owed.

The hot path stores nothing else: one read takes a whole intercept, and one byte marks it as answered. The
same holds for any request that a small inbox receives in one read; what an older one has left lies behind it.
Parts of a request, and all that a large inbox receives, have their length noted after each read. They are
wiped when they are answered, after the byte: in the other order a kill in between would leave half a request.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgpack

from intercept_protocol._frames import MESSAGE_LIMIT, SHORT_REQUESTS

IDLE = 0xC1
_HEADER = 64
SMALL_INBOX = SHORT_REQUESTS.bytes
"""The longest request of a VP or a notifier."""
LARGE_INBOXES = 2
"""The first two hold a message of any length: the VMM's, and its hypervisor's."""
VMM_INBOX, HYPERVISOR_INBOX = range(LARGE_INBOXES)
INBOX_AREA = 16 << 20
_LARGE, _SMALL = _HEADER + MESSAGE_LIMIT, _HEADER + SMALL_INBOX
"""A small one has 21 cache lines. If it were a power of two, all would share the same sets of the cache."""
INBOXES = LARGE_INBOXES + (INBOX_AREA - LARGE_INBOXES * _LARGE) // _SMALL
_IDLE_BYTES = bytes([IDLE]) * MESSAGE_LIMIT
_LENGTH, _HELLO, _STRIKES, _SERIAL = range(4)
"""The words of the header: bytes noted, whether the answer to the hello is owed, `strikes`, `serial`."""


def inbox_place(number: int) -> tuple[int, int]:
    """Start and end of an inbox in the area."""
    if number < LARGE_INBOXES:
        start = number * _LARGE
        return start, start + _LARGE
    start = LARGE_INBOXES * _LARGE + (number - LARGE_INBOXES) * _SMALL
    return start, start + _SMALL


class Inbox:
    """Of one connection. A new one must be cleared before it is used."""

    __slots__ = ("_buffer", "_marked", "_whole", "_words", "is_small", "number")

    def __init__(self, number: int, memory: memoryview) -> None:
        self.number = number
        self._words = memory[:_HEADER].cast("I")
        self._buffer = memory[_HEADER:]
        self._whole: Sequence[memoryview] = [self._buffer]
        self.is_small = len(self._buffer) == SMALL_INBOX
        self._marked = bool(self._words[_LENGTH] or self._words[_HELLO] or self._words[_STRIKES])
        """Whether there is more to wipe than the first byte."""

    @property
    def capacity(self) -> int:
        return len(self._buffer)

    def clear(self) -> None:
        """Wipe everything: no answer is owed."""
        self._buffer[0] = IDLE
        self._words[_LENGTH] = self._words[_HELLO] = self._words[_STRIKES] = 0
        self._buffer[:] = _IDLE_BYTES[: len(self._buffer)]
        self._marked = False

    # ------------------------------------------------ receiving

    def space(self, size: int) -> Sequence[memoryview]:
        """Where to read up to `size` bytes more; empty if the inbox is full."""
        if not self._marked:
            return self._whole if size >= len(self._buffer) else [self._buffer[:size]]
        at = self._words[_LENGTH]
        return [self._buffer[at : at + size]] if at < len(self._buffer) else []

    def received(self, count: int) -> bytes:
        """The `count` bytes that were just read to `space`."""
        at = self._words[_LENGTH] if self._marked else 0
        return bytes(self._buffer[at : at + count])

    def expect_part(self) -> None:
        """Call it before a read that may bring only a part of a request: what is left of an older one would
        pass for its rest."""
        if self.is_small and not self._marked:
            self._buffer[:] = _IDLE_BYTES[:SMALL_INBOX]

    def note(self, count: int) -> None:
        """Add `count` to the bytes noted; a request may be incomplete."""
        if self.is_small and not self._marked:  # an older request may lie behind them
            self._buffer[count:] = _IDLE_BYTES[: SMALL_INBOX - count]
        self._words[_LENGTH] += count
        self._marked = True

    def owe_hello(self) -> None:
        """The hello was received, and is not answered yet."""
        self._words[_HELLO] = 1
        self._marked = True

    def answered(self, *, put_off: bool = False) -> None:
        """No answer is owed any more. `put_off` keeps the strikes: the peer will ask again."""
        self._buffer[0] = IDLE
        if self._marked:
            self._wipe(self._words[_STRIKES] if put_off else 0)

    def _wipe(self, strikes: int) -> None:
        words = self._words
        length = words[_LENGTH]
        words[_HELLO] = 0
        self._buffer[:length] = _IDLE_BYTES[:length]
        words[_LENGTH] = 0
        words[_STRIKES] = strikes
        self._next_serial()
        self._marked = bool(strikes)

    @property
    def serial(self) -> int:
        """The number of the request that is here, if its length was noted or `Done` records it."""
        return self._words[_SERIAL]

    def take_serial(self) -> int:
        """The serial, for a `Done`: the next request has another. A client may use one msgid for several."""
        self._marked = True
        return self._words[_SERIAL]

    def _next_serial(self) -> None:
        self._words[_SERIAL] = (self._words[_SERIAL] + 1) & 0xFFFF_FFFF

    # ------------------------------------------------ a successor

    @property
    def owes_hello(self) -> bool:
        return bool(self._words[_HELLO])

    @property
    def strikes(self) -> int:
        """How many successors have begun to carry out this request."""
        return self._words[_STRIKES]

    def strike(self) -> None:
        self._words[_STRIKES] += 1
        self._marked = True

    def take_over(self) -> bytes:
        """What was received and not answered: a request or the beginning of one, or nothing.

        Notes its length, or wipes an inbox that owes nothing: the predecessor may have died before it did so.
        """
        if self._buffer[0] == IDLE:
            if not self._words[_HELLO]:
                self.clear()
                self._next_serial()
            return b""
        owed = self._owed()
        self._words[_LENGTH] = len(owed)
        self._buffer[len(owed) :] = _IDLE_BYTES[: len(self._buffer) - len(owed)]
        self._marked = True
        return owed

    def _owed(self) -> bytes:
        """One whole message if there is one, else all that may have been received.

        If no length was noted, or bytes lie behind it, the daemon died between the kernel's read and the
        note, or this is an intercept. A request that comes in pieces may be misread then (T-13). Otherwise
        only the noted bytes count: idle bytes behind them would pass for the rest of a string.
        """
        data, length = bytes(self._buffer), self._words[_LENGTH]
        received = data[:length] + data[length:].rstrip(_IDLE_BYTES[:1])
        if len(received) == length:
            return received
        unpacker = msgpack.Unpacker(strict_map_key=False)
        unpacker.feed(data)
        try:
            unpacker.skip()
        except (msgpack.OutOfData, ValueError, msgpack.UnpackException):
            return received
        return data[: unpacker.tell()]
