"""Whether the daemon's two sockets are there, and for us.

Owns the reading of what is at their paths; must not know what is said on them beyond that it is answered.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping

from intercept_client import LONGEST_SOCKET_PATH
from interceptctl import operator_client, units

from .finding import Finding, Setting, State


def operator_socket(path: str) -> Finding:
    name, setting = "operator socket", Setting.MODEL
    trouble = _trouble(name, path, denied=State.LIMITED)  # VMMs do without
    if trouble is not None:
        return trouble
    try:
        with operator_client.operator(path) as operator:
            age = units.duration(operator.statistics().uptime_ms)
    except operator_client.Unreachable as error:
        return Finding(name, setting, State.MISSING, error.message, "restart the daemon, and read its log")
    except operator_client.Refused as error:
        return Finding(name, setting, State.MISSING, error.message, "name this uid in allowed_uids")
    return Finding(name, setting, State.OK, f"{path} answers, up {age}")


def stated_limits(path: str) -> Mapping[str, int] | None:
    """The limits of the daemon whose operator socket this is; None if it cannot be asked."""
    try:
        with operator_client.operator(path) as operator:
            return operator.hello.limits
    except (operator_client.Unreachable, operator_client.Refused):
        return None


def directory(path: str) -> Finding:
    """Whoever may write to a socket's directory may put a socket of his own in its place."""
    name, setting, folder = "socket directory", Setting.MODEL, os.path.dirname(path) or "."
    try:
        mode = stat.S_IMODE(os.stat(folder).st_mode)
    except OSError as error:
        found = f"{folder}: {(error.strerror or str(error)).lower()}"
        mend = "make it, the daemon's own: RuntimeDirectory= in the unit, or install -d"
        return Finding(name, setting, State.LIMITED, found, mend)
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        found = f"{folder}: mode {mode:04o}, anybody may replace the sockets in it"
        return Finding(name, setting, State.LIMITED, found, f"chmod o-w {folder}")
    return Finding(name, setting, State.OK, f"{folder}: mode {mode:04o}")


def vmm_socket(path: str) -> Finding:
    name, setting = "VMM socket", Setting.MODEL
    trouble = _trouble(name, path, denied=State.MISSING)
    if trouble is not None:
        return trouble
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # somebody listens there, and is busy
            found = f"{path}: no room for one more connection that waits to be taken"
            return Finding(
                name, setting, State.LIMITED, found, "try again; should it stay so, restart the daemon"
            )
        except OSError as error:
            found = f"{path}: {error.strerror}"
            return Finding(name, setting, State.MISSING, found, "restart the daemon, and read its log")
    return Finding(name, setting, State.OK, f"{path} takes connections, mode {_mode(path):04o}")


def _trouble(name: str, path: str, denied: State) -> Finding | None:
    """What is wrong with a path before anybody is asked; `denied`: how bad it is not to be let in."""
    if (length := len(os.fsencode(path))) > LONGEST_SOCKET_PATH:
        found = f"{path}: has {length} bytes, and the path of a socket at most {LONGEST_SOCKET_PATH}"
        return Finding(name, Setting.MODEL, State.MISSING, found, "a shorter path")
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        mend = "start interceptd, or say where: --socket, --vmm-socket"
        return Finding(name, Setting.MODEL, State.LIMITED, f"{path}: not there", mend)
    except PermissionError as error:
        found = f"{path}: {error.strerror}"
        return Finding(name, Setting.MODEL, denied, found, "let this user into its directory")
    except OSError as error:
        found = f"{path}: {error.strerror}"
        return Finding(name, Setting.MODEL, State.MISSING, found, "another path")
    if not is_socket:
        return Finding(name, Setting.MODEL, State.MISSING, f"{path}: is no socket", "another path")
    if not os.access(path, os.W_OK):
        found = f"{path}: mode {_mode(path):04o}, not for this user"
        mend = "become its owner, or for VMMs: join its group"
        return Finding(name, Setting.MODEL, denied, found, mend)
    return None


def _mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)
