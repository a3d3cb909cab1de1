"""What the VMM emulates itself: devices on the memory bus and on the port bus.

Owns which device answers at which address; must not know vCPUs or the daemon. The VMM knows its own devices,
so an access to one is answered at once, without an intercept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

FLOATING: Final = 0xFF
"""What a read finds on a bus that no device drives."""


class Device(Protocol):
    """What a VMM emulates. vCPU threads call it, several at a time; an access has 1 to 8 bytes."""

    def read(self, offset: int, size: int) -> bytes:
        """What the guest reads at `offset` of the device's window: exactly `size` bytes."""

    def write(self, offset: int, data: bytes) -> None:
        """The guest writes `data` at `offset` of the device's window."""


class Unclaimed:
    """Where no device is: reads find a floating bus, writes are lost."""

    def read(self, offset: int, size: int) -> bytes:  # noqa: ARG002 - the same everywhere
        return bytes([FLOATING]) * size

    def write(self, offset: int, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Window:
    """The addresses [start, start + length) of a bus, and the device that answers there."""

    start: int
    length: int
    device: Device

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.start + self.length


class Bus:
    """A few windows; the first that contains an address answers, and `fallback` where none does."""

    def __init__(self, *windows: Window, fallback: Device | None = None) -> None:
        self._windows = windows
        self.fallback = fallback or Unclaimed()

    def find(self, address: int) -> Window | None:
        """The window that contains `address`."""
        return next((window for window in self._windows if address in window), None)

    def read(self, address: int, size: int) -> bytes:
        """What the guest reads at an address of the bus."""
        window = self.find(address)
        if window is None:
            return self.fallback.read(address, size)
        return window.device.read(address - window.start, size)

    def write(self, address: int, data: bytes) -> None:
        """The guest writes at an address of the bus."""
        window = self.find(address)
        if window is None:
            self.fallback.write(address, data)
        else:
            window.device.write(address - window.start, data)
