"""A VMM's client of each kind, told what to do call by call: for threads, for trio, in C.

Owns wording how a call ended in the same way for all: what it returned and `ok`; `refused` and the error;
`timed out`; `lost`, with the daemon's last words if there are any. Must not know what the daemon says.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from fakes.c_programs import CPrograms, conversation
from fakes.eventually import PATIENCE
from intercept_client import (
    BlockingNotifier,
    BlockingVmm,
    BlockingVp,
    ConnectionEnded,
    ConnectionLost,
    TrioNotifier,
    TrioVmm,
    TrioVp,
)
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import PartitionCredentials, Translation, VpSelection

PARTITION: Final = PartitionCredentials(partition_id=7, token=b"fifteen letters\0")
_LOCAL: Final = ("connect", "socket", "request", "send", "receive", "answer")
"""What the C client names as failed on its own side."""
_ENDS: Final = (ConnectionEnded, ConnectionLost, ProtocolViolation, OSError, WireError)
Open = Callable[[Path, str], AbstractContextManager["Player"]]


class Player(Protocol):
    """`opened` says how opening ended."""

    opened: str

    def do(self, verb: str, *numbers: int) -> str:
        """Make a call: `kick`, `kick_all`, `translate`, `intercept`, `invalidate`; or `timeout`, in
        milliseconds, for those that follow, 0 for none."""
        ...


def _call(client: Any, verb: str, numbers: tuple[int, ...]) -> Any:
    """Of a client for threads, its result; of one for trio, an awaitable."""
    match verb, numbers:
        case "kick", (vp_index,):
            return client.kick(vp_index)
        case "kick_all", ():
            return client.kick(VpSelection.ALL)
        case "translate", (gfn,):
            return client.translate(gfn)
        case "intercept", ():
            return client.intercept(bytes(256))
        case "invalidate", (start, length):
            return client.invalidate(UaddrRange.of_bytes(start, length))
    raise ValueError(verb)


def _worded(verb: str, result: object) -> str:
    match result:
        case None:
            return "nothing ok" if verb == "translate" else "ok"
        case Translation(frame=(backing, page), access=access):
            return f"{backing} {page} {access} ok"
        case _:
            return f"{getattr(result, 'outcome')} {getattr(result, 'reason')} ok"  # noqa: B009 - of either answer


def _failure(error: BaseException, *, opening: bool = False) -> str:
    match error:
        case ConnectionEnded(error=last_words):
            return f"lost {last_words.name}: {last_words.message}"
        case WireError() if opening:  # a refused hello is the end of the connection
            return f"lost {error.name}: {error.message}"
        case WireError():
            details = "".join(
                f" {key}={error.details[key]}" for key in ("field", "limit") if key in error.details
            )
            return f"refused {error.name}: {error.message}{details}"
        case TimeoutError():
            return "timed out"
        case _:
            return "lost"


class _Blocking:
    def __init__(self, client: BlockingVmm | BlockingVp | BlockingNotifier | None, opened: str) -> None:
        self._client = client
        self.opened = opened

    def do(self, verb: str, *numbers: int) -> str:
        assert self._client is not None
        if verb == "timeout":
            self._client.timeout = numbers[0] / 1000 if numbers[0] else None
            return "ok"
        try:
            return _worded(verb, _call(self._client, verb, numbers))
        except _ENDS as error:
            return _failure(error)


@contextmanager
def _blocking(path: Path, role: str) -> Iterator[Player]:
    opening: dict[str, Callable[[], BlockingVmm | BlockingVp | BlockingNotifier]] = {
        "vmm": lambda: BlockingVmm.open(path),
        "vp": lambda: BlockingVp.open(path, PARTITION, vp_index=0),
        "notifier": lambda: BlockingNotifier.open(path, PARTITION),
    }
    try:
        client = opening[role]()
    except _ENDS as error:
        yield _Blocking(None, _failure(error, opening=True))
        return
    with client:
        yield _Blocking(client, "ok")


class _Trio:
    """Its client lives in a trio of another thread."""

    def __init__(self, path: Path, role: str) -> None:
        self._path = path
        self._role = role
        self._timeout = float("inf")
        self._client: TrioVmm | TrioVp | TrioNotifier | None = None
        self._closed = trio.Event()
        self._ready = threading.Event()
        self.opened = "ok"

    async def live(self) -> None:
        opening: dict[str, Callable[[], AbstractAsyncContextManager[TrioVmm | TrioVp | TrioNotifier]]] = {
            "vmm": lambda: TrioVmm.open(self._path),
            "vp": lambda: TrioVp.open(self._path, PARTITION, vp_index=0),
            "notifier": lambda: TrioNotifier.open(self._path, PARTITION),
        }
        self._token = trio.lowlevel.current_trio_token()
        try:
            async with opening[self._role]() as self._client:
                self._ready.set()
                await self._closed.wait()
        except _ENDS as error:
            self.opened = _failure(error, opening=True)
        finally:
            self._ready.set()

    def wait_ready(self) -> None:
        assert self._ready.wait(PATIENCE)

    def close(self) -> None:
        if self.opened == "ok":
            trio.from_thread.run_sync(self._closed.set, trio_token=self._token)

    def do(self, verb: str, *numbers: int) -> str:
        return trio.from_thread.run(self._do, verb, numbers, trio_token=self._token)

    async def _do(self, verb: str, numbers: tuple[int, ...]) -> str:
        if verb == "timeout":
            self._timeout = numbers[0] / 1000 or float("inf")
            return "ok"
        try:
            with trio.fail_after(self._timeout):
                return _worded(verb, await _call(self._client, verb, numbers))
        except trio.TooSlowError:
            return "timed out"
        except _ENDS as error:
            return _failure(error)


@contextmanager
def _trio(path: Path, role: str) -> Iterator[Player]:
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        player = _Trio(path, role)
        lived = thread.submit(trio.run, player.live)
        player.wait_ready()
        try:
            yield player
        finally:
            player.close()
            lived.result(PATIENCE)


class _InC:
    def __init__(self, said: Callable[..., str], opened: str) -> None:
        self._said = said
        self.opened = opened

    def do(self, verb: str, *numbers: int) -> str:
        return _of_c(self._said(verb, *numbers))


def _of_c(line: str) -> str:
    match line.split(" ", 3):
        case ["refused", _, name, message]:
            return f"refused {name}: {message}"
        case ["lost", _, name, message] if name not in _LOCAL:
            return f"lost {name}: {message}"
        case ["lost", *_]:
            return "lost"
    return line


@contextmanager
def _in_c(programs: CPrograms, path: Path, role: str) -> Iterator[Player]:
    with conversation(programs / "c_driver", path, "session", role) as said:
        yield _InC(said.do, _of_c(said.end()))


KINDS: Final = ("for threads", "for trio", "in C")


def opener(kind: str, programs: CPrograms) -> Open:
    """Opens a client of this kind in a role: `vmm`, `vp` or `notifier`."""
    match kind:
        case "for threads":
            return _blocking
        case "for trio":
            return _trio
        case _:
            return lambda path, role: _in_c(programs, path, role)
