"""Connections to the daemon; every way one can fail becomes an error message and an exit code.

Owns the wording of errors, and connecting again to the daemon's successor; must not know commands or tables.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Final, NamedTuple, TypeVar

import click

from intercept_client import BlockingOperator, BlockingVmm, ConnectionEnded, ConnectionLost
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.text import sentence as sentence_of
from intercept_protocol.text import visible_lines

ANSWER_TIMEOUT: Final = 10.0
"""Seconds to wait for an answer. The daemon answers operators without waiting for anything."""
SHORTEST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 2.0
"""Seconds between two attempts to reach a successor; each pause is twice as long as the last."""

SUCCESSOR_ATTEMPTS: Final = 100
SUCCESSOR_PAUSE: Final = 0.2
"""Seconds between two of them. A keeper waits 10 s for its daemon, unless told otherwise."""

_ClientT = TypeVar("_ClientT", BlockingOperator, BlockingVmm)


class Failure(click.ClickException):
    """An error message of one or more lines. Control characters in text from outside are escaped."""

    def __init__(self, message: str) -> None:
        super().__init__(visible_lines(message))


class Refused(Failure):
    """The daemon answered with an error."""

    exit_code = 1


class Unreachable(Failure):
    """The daemon cannot be reached. (Exit code 2, wrong usage, is click's.)"""

    exit_code = 3


class Gone(Unreachable):
    """The daemon went away, or is not there: it, or a successor, may come."""


class _Socket(NamedTuple):
    """What the user calls it, and the daemon's option that sets its path."""

    kind: str
    option: str


_OPERATORS: Final = _Socket("an operator socket", "operator-socket")
_VMMS: Final = _Socket("a VMM socket", "socket")


def operator(path: str, timeout: float = ANSWER_TIMEOUT) -> AbstractContextManager[BlockingOperator]:
    """A connected operator. Errors, here or in the block, become `Refused` or `Unreachable`."""
    return _connected(path, timeout, lambda: BlockingOperator.open(path, timeout=timeout), _OPERATORS)


def vmm(path: str, name: str, timeout: float = ANSWER_TIMEOUT) -> AbstractContextManager[BlockingVmm]:
    """A connection to the VMMs' socket, which operators see as `name`. Errors as of `operator`."""
    return _connected(path, timeout, lambda: BlockingVmm.open(path, name=name, timeout=timeout), _VMMS)


@contextmanager
def _connected(
    path: str, timeout: float, connect: Callable[[], _ClientT], what: _Socket
) -> Iterator[_ClientT]:
    with _connect(path, timeout, connect, what) as client:
        try:
            yield client
        except ProtocolViolation as violation:
            raise _unreachable(path, f"the daemon violated the protocol: {violation}") from violation
        except WireError as refusal:
            raise Refused(f"refused: {refusal}") from refusal
        except TimeoutError as error:
            raise _unreachable(path, f"no answer within {timeout:g} s") from error
        except ConnectionEnded as error:
            raise _unreachable(path, str(error)) from error
        except ConnectionLost as error:
            raise _gone(path, str(error)) from error


def outlast(
    connected: Callable[[], AbstractContextManager[_ClientT]],
    use: Callable[[_ClientT], None],
    wait: Callable[[float], bool],
) -> None:
    """Run `use` with a client of `connected` until it returns; begin again with another whenever the daemon
    goes away.

    The first connection must succeed. `wait` is called with the seconds to let pass between two attempts, of
    which there is no limit; it returns False to give up. Raises as `operator` does, but not `Gone`.
    """
    used = False
    pause = SHORTEST_PAUSE
    while True:
        try:
            with connected() as client:
                used, pause = True, SHORTEST_PAUSE
                use(client)
                return
        except Gone:
            if not used:
                raise
        if not wait(pause):
            return
        pause = min(2 * pause, LONGEST_PAUSE)


def wait_ended(client: BlockingOperator) -> None:
    """Block until a daemon that drains, or is about to be restarted, closes the connection."""
    with suppress(ConnectionLost):
        while True:
            client.next_events()


def wait_successor(path: str) -> None:
    """Block until a daemon answers that was started after another went away; at most some 20 s.

    Raises as `operator` does.
    """
    for _ in range(SUCCESSOR_ATTEMPTS):
        with suppress(Gone), operator(path):
            return
        time.sleep(SUCCESSOR_PAUSE)
    with operator(path):
        return


def _connect(path: str, timeout: float, connect: Callable[[], _ClientT], what: _Socket) -> _ClientT:
    try:
        return connect()
    except ProtocolViolation as violation:
        raise _unreachable(path, f"not {what.kind}: {violation}") from violation
    except WireError as refusal:
        if refusal.number == errno.EPROTONOSUPPORT:
            raise _unreachable(path, refusal.message) from refusal
        raise _unreachable(path, f"not {what.kind}, or access denied: {refusal}") from refusal
    except ConnectionLost as error:
        raise _gone(path, f"not {what.kind}: {error}") from error
    except TimeoutError as error:
        raise _gone(path, f"not {what.kind}, or busy: no answer within {timeout:g} s") from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise _gone(path, _cause(error, what.option)) from error
    except OSError as error:
        raise _unreachable(path, _cause(error, what.option)) from error


def sentence(error: BaseException, vmm_socket: str | None) -> str:
    """What went wrong; if the VMM socket could not be reached, also what to check."""
    if vmm_socket is not None and isinstance(error, OSError) and error.filename == vmm_socket:
        return f"{vmm_socket}: {_cause(error, 'socket')}"
    return sentence_of(error)


def _cause(error: OSError, option: str) -> str:
    """`option` is the daemon's option that sets the path of the socket."""
    match error:
        case FileNotFoundError() if option == "socket":
            return "no such file; is interceptd running with --socket set to this path?"
        case FileNotFoundError():
            return (
                f"no such file; is interceptd running with --{option} set to this path? "
                "--socket or INTERCEPTCTL_SOCKET names another"
            )
        case ConnectionRefusedError():
            return "connection refused; no process is listening on it"
        case PermissionError() if option == "socket":
            return "permission denied; see socket_mode and socket_group in the daemon's configuration"
        case PermissionError():
            return "permission denied; only the owner of the operator socket may connect"
        case _:
            return (error.strerror or str(error)).lower()


def _unreachable(path: str, cause: str) -> Unreachable:
    return Unreachable(f"{path}: {cause}")


def _gone(path: str, cause: str) -> Gone:
    return Gone(f"{path}: {cause}")
