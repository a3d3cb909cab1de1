"""A keeper that spoils what it keeps, once, before it starts the second daemon:
`python -m fakes.spoiling_keeper PLAN PATIENCE serve ...`.

Owns the ways to spoil a ledger. The first ledger stays as it is, the last one becomes its copy, and each of
the others is spoilt in another way, in the order of `SPOILT`. Things that no ledger knows lie beside them.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from typing import Final

from interceptd.keeper.keeper import Keeper
from interceptd.keeper.store import Store
from interceptd.ledger.inbox import INBOX_AREA
from interceptd.ledger.ledger import PAGE

LOG: Final = PAGE + INBOX_AREA
SPOILT: Final[Mapping[str, tuple[int, bytes]]] = {
    "of a later format": (8, (99).to_bytes(4, sys.byteorder)),
    "torn": (LOG, b"\xff" * 4),
    "of other records": (LOG + 4, b"\xc1" * 8),
    "longer than it is": (16, (LOG + 1).to_bytes(8, sys.byteorder)),
    "no ledger": (0, b"ICPT"),
}
"""What is written to the ledger, and where."""


def spoil(store: Store) -> None:
    ledgers = [descriptor for name, descriptor in store.named() if name.startswith("p")]
    whole, *spoilt, copy = ledgers
    for place in (0, LOG):
        os.pwrite(copy, os.pread(whole, PAGE, place), place)
    for descriptor, (place, data) in zip(spoilt, SPOILT.values(), strict=True):
        if not place:
            os.ftruncate(descriptor, 4)
        else:
            os.pwrite(descriptor, data, place)
    here, there = socket.socketpair()
    with tempfile.TemporaryFile() as file:
        for name, descriptor in (
            ("cnobody", here.fileno()),
            ("mnobody", file.fileno()),
            ("pno", file.fileno()),
        ):
            store.add(name, [os.dup(descriptor)], polled=False)
        store.add("unheard-of", [os.dup(file.fileno())], polled=False)
        store.add("own-vmm", [os.dup(file.fileno())], polled=False)
    here.close()
    there.detach()


class SpoilingKeeper(Keeper):
    def _start(self) -> None:
        if self._served and len(self._store) and not hasattr(self, "_spoilt"):
            self._spoilt = True
            spoil(self._store)
        super()._start()


if __name__ == "__main__":
    _plan, _patience, *_arguments = sys.argv[1:]
    _daemon = [sys.executable, "-m", "fakes.killed_daemon", _plan]
    sys.exit(SpoilingKeeper(_daemon, _arguments, float(_patience)).run())
