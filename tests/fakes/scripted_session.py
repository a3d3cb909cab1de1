"""A VMM's whole session in numbered messages, any of which can be spoilt.

Owns the script, what it is answered, and the ways of spoiling a message. As a process of its own it can be
killed at one, or stopped while it plays: `python -m fakes.scripted_session SOCKET HYPERVISOR N` dies at its
message N, and with N 0 plays until its stdin closes.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from fakes.raw_client import READ, WRITE, RawConnection, intercept_message, pack, request
from fakes.raw_vmm import GFN, MODEL, PAGE, PAGES, PATIENT, UADDR, WHOLE_MEMORY, region, vma

MESSAGES: Final = {"software": 26, "vmm": 39}
"""Of a whole session, by who the hypervisor is; its answers count."""
ALIAS: Final = GFN + PAGES
RIGHTS: Final = {"readable": True, "writable": False, "executable": False}
WHOLE: Final = {"start_uaddr": UADDR, "page_count": PAGES}
Spoil = Callable[[RawConnection, bytes], None]


class Spoilt(Exception):
    """The session ends here; its owner closes what it holds."""


class Session:
    """`spoil` sends, or does not, message `nth`, counted from 1; 0 for none and None for all."""

    def __init__(self, path: Path, hypervisor: str, nth: int | None, spoil: Spoil) -> None:
        self.messages = 0
        self._path = path
        self._hypervisor = hypervisor
        self._nth = nth
        self._spoil = spoil
        self._open = ExitStack()
        self._link: RawConnection | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def play(self) -> list[Any]:
        """What is answered to the calls that tell something."""
        vmm = self._connect("vmm")
        created = self._ask(vmm, "create_partition", {**MODEL, **PATIENT, "hypervisor": self._hypervisor})
        credentials = {key: created[key] for key in ("partition_id", "token")}
        if self._hypervisor == "vmm":
            self._link = self._connect("hypervisor", credentials)
        notifier, vp = (
            self._connect("notifier", credentials),
            self._connect("vp", {**credentials, "vp_index": 0}),
        )
        self._ask(vmm, "map_vma", vma(UADDR, PAGES))
        told = [
            self._ask(vmm, "add_region", region(GFN, PAGES, UADDR)),
            self._ask(vmm, "add_region", region(ALIAS, PAGES, UADDR, kind="auto", writable=False)),
            self._intercept(vp, GFN, WRITE),
            self._intercept(vp, GFN + 1, READ),
            self._intercept(vp, ALIAS, READ),
            self._intercept(vp, 0, READ),
        ]
        self._ask(notifier, "invalidate_begin", WHOLE_MEMORY)
        self._ask(vmm, "kick", {"vp_index": 0})
        told.append(self._intercept(vp, GFN, READ))
        self._ask(notifier, "invalidate_end", WHOLE_MEMORY)
        told.append(self._intercept(vp, GFN, READ))
        self._ask(notifier, "invalidate", {"start_uaddr": UADDR, "length": PAGE})
        self._ask(vmm, "set_policy", {"mmio_granularity": "page"})
        self._ask(vmm, "protect_vma", {**WHOLE, **RIGHTS})
        told += [self._intercept(vp, GFN, WRITE), self._ask(vmm, "translate", {"gfn": GFN})]
        self._ask(vmm, "unmap_vma", WHOLE)
        told.append(self._intercept(vp, GFN, READ))
        moved = region(ALIAS + PAGES, PAGES, UADDR)
        alias = {"start_gfn": ALIAS, "page_count": PAGES, "start_uaddr": UADDR}
        told.append(self._ask(vmm, "change_regions", {"remove": [alias], "add": [moved]}))
        self._ask(vmm, "remove_region", {"start_gfn": GFN, "page_count": PAGES, "start_uaddr": UADDR})
        told.append(self._ask(vmm, "statistics", {})["regions"])
        return told

    # ------------------------------------------------ messages

    def _connect(self, role: str, fields: Mapping[str, object] | None = None) -> RawConnection:
        connection = self._open.enter_context(RawConnection(self._path))
        self._ask(connection, "hello", {"protocol": 1, "role": role, **(fields or {})})
        return connection

    def _intercept(self, vp: RawConnection, gfn: int, access: int) -> Any:
        return self._ask(vp, "intercept", intercept_message(gfn, access))

    def _ask(self, connection: RawConnection, method: str, fields: object) -> Any:
        """One call; requests of the daemon to the hypervisor in between are answered."""
        self._say(connection, request(method, fields))
        while self._link is not None and not connection.is_readable():
            readable, _, _ = select.select([connection, self._link], [], [], connection.patience)
            assert readable, f"{method} was not answered"
            if self._link in readable:
                _, msgid, _, _ = self._link.receive()
                self._say(self._link, pack([1, msgid, None, None]))
        return connection.answer()

    def _say(self, connection: RawConnection, data: bytes) -> None:
        self.messages += 1
        if self._nth is None or self.messages == self._nth:
            self._spoil(connection, data)
        else:
            connection.send(data)


TOLD: Final = [
    {"kind": "movable"}, {"kind": "movable"},
    ["resume", "mapped"], ["resume", "already_mapped"], ["resume", "mapped"], ["forward", "no_region"],
    ["retry", "kicked"], ["resume", "mapped"], ["forward", "permission"], None, ["forward", "unbacked"],
    {"kinds": ["movable"]}, 1,
]  # fmt: skip
"""The answers to an undisturbed session."""


def close_in_the_middle(connection: RawConnection, data: bytes) -> None:
    connection.send(data[: len(data) // 2])
    connection.close()
    raise Spoilt


def close_before_the_answer(connection: RawConnection, data: bytes) -> None:
    connection.send(data)
    connection.close()
    raise Spoilt


def stall(connection: RawConnection, data: bytes) -> None:
    """Half of it comes, and then nothing more for as long as the session is held."""
    connection.send(data[: len(data) // 2])
    raise Spoilt


def dribble(connection: RawConnection, data: bytes) -> None:
    for byte in data:
        connection.send(bytes([byte]))


def die(connection: RawConnection, data: bytes) -> None:
    connection.send(data)
    os.kill(os.getpid(), signal.SIGKILL)


def main(path: Path, hypervisor: str, nth: int) -> None:
    played = 0
    while not (nth == 0 and select.select([sys.stdin], [], [], 0)[0]):
        with Session(path, hypervisor, nth, die) as session:
            if played == 1:  # in the second round, as the reader expects
                print("playing", flush=True)
            assert session.play() == TOLD
        played += 1
    print(played, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
