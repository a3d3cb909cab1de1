"""What confines the user who asks: namespaces, and who may look into whose memory.

Owns one probe a thing, each a function that returns its `Finding`. Must not know the daemon.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from .finding import Finding, Setting, State

OWN_NAMESPACES: Final = "/proc/self/ns"
INITIAL_PID_NAMESPACE: Final = 0xEFFFFFFC
"""PROC_PID_INIT_INO, include/linux/proc_ns.h."""
ALL_UIDS: Final = 2**32 - 1
"""The length of the initial user namespace's map (user_namespaces(7))."""


def user_namespace(uid_map: str = "/proc/self/uid_map") -> Finding:
    """Uids that have no name here all look like one, which owns nothing and is refused unless configured."""
    name, setting = "user namespace", Setting.MODEL
    try:
        named = sum(int(line.split()[2]) for line in Path(uid_map).read_text(encoding="ascii").splitlines())
    except OSError as error:
        found = f"cannot be told: {error.strerror}"
        return Finding(name, setting, State.LIMITED, found, "a kernel with CONFIG_USER_NS, or none is needed")
    if named >= ALL_UIDS:
        return Finding(name, setting, State.OK, "every uid has a name here")
    found = f"{named} uids have a name here: VMMs of all others come as the overflow uid, and are refused"
    mend = "map the VMMs' uids too; or for one tenant alone: the overflow uid in allowed_uids"
    return Finding(name, setting, State.LIMITED, found, mend)


def pid_namespace(namespaces: str = OWN_NAMESPACES) -> Finding:
    name, setting = "pid namespace", Setting.LIVE
    try:
        inode = os.stat(f"{namespaces}/pid").st_ino
    except OSError as error:
        return Finding(name, setting, State.LIMITED, f"cannot be told: {error.strerror}", "mount /proc")
    if inode == INITIAL_PID_NAMESPACE:
        return Finding(name, setting, State.OK, "the machine's own")
    found = "one of its own: whose maps a VMM outside it handed over cannot be told"
    return Finding(name, setting, State.LIMITED, found, "share it with the VMMs, or one tenant a daemon")


def ptrace_scope(path: str = "/proc/sys/kernel/yama/ptrace_scope") -> Finding:
    """Said because who debugs other processes looks here first."""
    name, setting = "kernel.yama.ptrace_scope", Setting.LIVE
    try:
        value = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return Finding(name, setting, State.OK, "no Yama here; nothing would change with it")
    return Finding(name, setting, State.OK, f"{value}; any value will do: VMMs hand over what they opened")
