"""One conversation with the daemon, and every way it can fail as a sentence and an exit code.

Owns the wording of failures and the paging of lists; must not know commands or tables.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import click

from intercept_client import BlockingOperator, ConnectionLost
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.text import sentence as sentence_of
from intercept_protocol.text import visible_lines

ANSWER_TIMEOUT: Final = 10.0
"""Seconds to wait for an answer; the daemon answers an operator without waiting for anything."""


class Failure(click.ClickException):
    """A sentence, perhaps with notes in lines of their own. What it quotes from outside is made visible."""

    def __init__(self, message: str) -> None:
        super().__init__(visible_lines(message))


class Refused(Failure):
    """The daemon answered, with an error."""

    exit_code = 1


class Unreachable(Failure):
    """There is no conversation with the daemon. Exit code 2, wrong usage, is click's own."""

    exit_code = 3


@contextmanager
def operator(path: str, timeout: float = ANSWER_TIMEOUT) -> Iterator[BlockingOperator]:
    """A connected operator; whatever goes wrong, here or in the block, becomes `Refused` or `Unreachable`."""
    with _connect(path, timeout) as client:
        try:
            yield client
        except ProtocolViolation as violation:
            raise _unreachable(path, f"the daemon broke the protocol: {violation}") from violation
        except WireError as refusal:
            raise Refused(f"refused: {refusal}") from refusal
        except TimeoutError as error:
            raise _unreachable(path, f"no answer within {timeout:g} s") from error
        except ConnectionLost as error:
            raise _unreachable(path, str(error)) from error


def wait_ended(client: BlockingOperator) -> None:
    """Block until a daemon that drains closes the conversation, as it does once its partitions are gone."""
    with suppress(ConnectionLost):
        while True:
            client.next_events()


def _connect(path: str, timeout: float) -> BlockingOperator:
    try:
        return BlockingOperator.open(path, timeout=timeout)
    except ProtocolViolation as violation:
        raise _unreachable(path, f"not an operator socket: {violation}") from violation
    except WireError as refusal:
        if refusal.number == errno.EPROTONOSUPPORT:
            raise _unreachable(path, refusal.message) from refusal
        raise _unreachable(path, f"not an operator socket, or not for you: {refusal}") from refusal
    except ConnectionLost as error:
        raise _unreachable(path, f"not an operator socket: {error}") from error
    except TimeoutError as error:
        raise _unreachable(
            path, f"not an operator socket, or busy: no answer within {timeout:g} s"
        ) from error
    except OSError as error:
        raise _unreachable(path, _cause(error, "operator-socket")) from error


def sentence(error: BaseException, vmm_socket: str | None) -> str:
    """What went wrong; of the way to the VMMs' socket, with what to look for."""
    if vmm_socket is not None and isinstance(error, OSError) and error.filename == vmm_socket:
        return f"{vmm_socket}: {_cause(error, 'socket')}"
    return sentence_of(error)


def _cause(error: OSError, option: str) -> str:
    """`option` is the daemon's that says where the socket is."""
    match error:
        case FileNotFoundError():
            return f"no such file; is interceptd running, and is this its --{option}?"
        case ConnectionRefusedError():
            return "connection refused; nobody listens there"
        case PermissionError() if option == "socket":
            return "permission denied; socket_mode and socket_group say who may connect"
        case PermissionError():
            return "permission denied; the operator's socket is its owner's alone"
        case _:
            return (error.strerror or str(error)).lower()


def _unreachable(path: str, cause: str) -> Unreachable:
    return Unreachable(f"{path}: {cause}")
