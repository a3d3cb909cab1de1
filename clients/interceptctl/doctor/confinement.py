"""What confines the current user: namespaces, and access to other processes' memory.

Owns the probes, each a function that returns its `Finding`. Must not know the daemon.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from .finding import Finding, Mode, State

OWN_NAMESPACES: Final = "/proc/self/ns"
INITIAL_PID_NAMESPACE: Final = 0xEFFFFFFC
"""PROC_PID_INIT_INO, include/linux/proc_ns.h."""
ALL_UIDS: Final = 2**32 - 1
"""The length of the initial user namespace's map (user_namespaces(7))."""


def user_namespace(uid_map: str = "/proc/self/uid_map") -> Finding:
    """Unmapped uids all appear as the overflow uid, which is refused unless configured."""
    name, mode = "user namespace", Mode.MODEL
    try:
        named = sum(int(line.split()[2]) for line in Path(uid_map).read_text(encoding="ascii").splitlines())
    except OSError as error:
        found = f"unknown: {error.strerror}"
        return Finding(name, mode, State.LIMITED, found, "CONFIG_USER_NS, if user namespaces are used")
    if named >= ALL_UIDS:
        return Finding(name, mode, State.OK, "every uid is mapped")
    found = f"only {named} uids are mapped: VMMs of any other appear as the overflow uid, and are refused"
    fix = "map the VMMs' uids; or, with a single tenant, add the overflow uid to allowed_uids"
    return Finding(name, mode, State.LIMITED, found, fix)


def pid_namespace(namespaces: str = OWN_NAMESPACES) -> Finding:
    name, mode = "pid namespace", Mode.LIVE
    try:
        inode = os.stat(f"{namespaces}/pid").st_ino
    except OSError as error:
        return Finding(name, mode, State.LIMITED, f"unknown: {error.strerror}", "mount /proc")
    if inode == INITIAL_PID_NAMESPACE:
        return Finding(name, mode, State.OK, "the initial one")
    found = "not the initial one: the daemon cannot verify the maps of a VMM outside it"
    return Finding(name, mode, State.LIMITED, found, "share it with the VMMs, or run one daemon per tenant")


def ptrace_scope(path: str = "/proc/sys/kernel/yama/ptrace_scope") -> Finding:
    """Reported because it is the first suspect when one process may not access another."""
    name, mode = "kernel.yama.ptrace_scope", Mode.LIVE
    try:
        value = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return Finding(name, mode, State.OK, "no Yama; not needed")
    return Finding(name, mode, State.OK, f"{value}; any value works: VMMs hand over files that they opened")
