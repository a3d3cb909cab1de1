"""Whether the daemon's two sockets exist and accept the current user.

Owns the probes of their paths; must not know the protocol beyond whether the daemon answers.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Mapping

from intercept_client import LONGEST_SOCKET_PATH, BlockingVmm, ConnectionEnded
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.text import sentence
from interceptctl import operator_client, units

from .finding import Finding, Mode, State


def operator_socket(path: str) -> Finding:
    name, mode = "operator socket", Mode.MODEL
    trouble = _trouble(name, path, denied=State.LIMITED)  # VMMs do not need it
    if trouble is not None:
        return trouble
    try:
        with operator_client.operator(path) as operator:
            age = units.duration(operator.statistics().uptime_ms)
    except operator_client.Unreachable as error:
        return Finding(name, mode, State.MISSING, error.message, "restart the daemon; see its log")
    except operator_client.Refused as error:
        return Finding(name, mode, State.MISSING, error.message, "add this uid to allowed_uids")
    return Finding(name, mode, State.OK, f"{path} answers, up {age}")


def stated_limits(path: str) -> Mapping[str, int] | None:
    """The limits of the daemon behind this operator socket; None if it cannot be reached."""
    try:
        with operator_client.operator(path) as operator:
            return operator.hello.limits
    except (operator_client.Unreachable, operator_client.Refused):
        return None


def directory(path: str) -> Finding:
    """Anybody who may write to the directory of a socket can replace the socket."""
    name, mode, folder = "socket directory", Mode.MODEL, os.path.dirname(path) or "."
    try:
        permissions = stat.S_IMODE(os.stat(folder).st_mode)
    except OSError as error:
        found = f"{folder}: {(error.strerror or str(error)).lower()}"
        fix = "create it, owned by the daemon: RuntimeDirectory= in the unit, or install -d"
        return Finding(name, mode, State.LIMITED, found, fix)
    if permissions & stat.S_IWOTH and not permissions & stat.S_ISVTX:
        found = f"{folder}: mode {permissions:04o}, any user may replace the sockets in it"
        return Finding(name, mode, State.LIMITED, found, f"chmod o-w {folder}")
    return Finding(name, mode, State.OK, f"{folder}: mode {permissions:04o}")


def vmm_socket(path: str) -> Finding:
    name, mode = "VMM socket", Mode.MODEL
    trouble = _trouble(name, path, denied=State.MISSING)
    if trouble is not None:
        return trouble
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # the listen queue is full
            found = f"{path}: the queue of pending connections is full"
            return Finding(
                name, mode, State.LIMITED, found, "try again; if it stays full, restart the daemon"
            )
        except OSError as error:
            found = f"{path}: {error.strerror}"
            return Finding(name, mode, State.MISSING, found, "restart the daemon; see its log")
    try:
        with BlockingVmm.open(path, timeout=operator_client.ANSWER_TIMEOUT):
            return Finding(name, mode, State.OK, f"{path} accepts this user's VMMs, mode {_mode(path):04o}")
    except TimeoutError:
        found = f"{path}: no answer to a hello within {operator_client.ANSWER_TIMEOUT:g} s"
        return Finding(name, mode, State.LIMITED, found, "try again; if it stays so, see the daemon's log")
    except (WireError, ProtocolViolation, OSError) as error:
        return Finding(name, mode, State.MISSING, f"{path}: {sentence(error)}", _remedy(error))


def _remedy(error: WireError | ProtocolViolation | OSError) -> str:
    """For a connection that was refused, or ended."""
    refusal = error.error if isinstance(error, ConnectionEnded) else error
    if isinstance(refusal, WireError) and refusal.number == errno.EACCES:
        return "allowed_uids or allowed_gids in the daemon's configuration; or give another --vmm-socket"
    return "see the daemon's log"


def _trouble(name: str, path: str, denied: State) -> Finding | None:
    """What is wrong with a path, before connecting. `denied`: how bad it is if access is denied."""
    if (length := len(os.fsencode(path))) > LONGEST_SOCKET_PATH:
        found = f"{path}: {length} bytes; the path of a socket may have {LONGEST_SOCKET_PATH}"
        return Finding(name, Mode.MODEL, State.MISSING, found, "a shorter path")
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        fix = "start interceptd, or give its paths: --socket, --vmm-socket"
        return Finding(name, Mode.MODEL, State.LIMITED, f"{path}: does not exist", fix)
    except PermissionError as error:
        found = f"{path}: {error.strerror}"
        return Finding(name, Mode.MODEL, denied, found, "give this user access to its directory")
    except OSError as error:
        found = f"{path}: {error.strerror}"
        return Finding(name, Mode.MODEL, State.MISSING, found, "another path")
    if not is_socket:
        return Finding(name, Mode.MODEL, State.MISSING, f"{path}: not a socket", "another path")
    if not os.access(path, os.W_OK):
        found = f"{path}: mode {_mode(path):04o}, no access for this user"
        if denied is State.LIMITED:
            fix = "none for VMMs, which do not need it; operators: run as its owner"
        else:
            fix = "join its group, or see socket_mode and socket_group in the daemon's configuration"
        return Finding(name, Mode.MODEL, denied, found, fix)
    return None


def _mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)
