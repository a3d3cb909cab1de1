"""What the kernel offers to the user who asks.

Owns one probe a feature, each a function that returns its `Finding`. Must not know the daemon.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import resource
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from intercept_client.memory import (
    USERFAULTFD_DEVICE,
    USERFAULTFD_SYSCTL,
    Permission,
    UserfaultfdNotPermitted,
    UserfaultfdUnavailable,
    open_userfaultfd,
)

from .finding import Finding, Setting, State

PROCMAP_QUERY: Final = 0xC0686611
"""_IOWR('f', 17, struct procmap_query), include/uapi/linux/fs.h, Linux 6.11."""
PROCMAP_QUERY_BYTES: Final = 104
UFFDIO_API: Final = 0xC018AA3F
UFFD_API: Final = 0xAA
WATCHING: Final[Mapping[str, int]] = {
    "UFFD_FEATURE_EVENT_UNMAP": 1 << 6,
    "UFFD_FEATURE_PAGEFAULT_FLAG_WP": 1 << 0,
    "UFFD_FEATURE_WP_HUGETLBFS_SHMEM": 1 << 12,
}
"""What the daemon watches guest memory with, include/uapi/linux/userfaultfd.h."""
SO_PEERPIDFD: Final = 77
"""include/uapi/asm-generic/socket.h, Linux 6.5."""
KVM: Final = "/dev/kvm"
KVM_GET_API_VERSION: Final = 0xAE00
KVM_API_VERSION: Final = 12
ENOUGH_DESCRIPTORS: Final = 4096
"""Some ten partitions with all their VPs: for a daemon whose limits are not known."""
DESCRIPTORS_A_VMM: Final = 5
"""Its connection, its pidfd, and what it hands over: maps, smaps and a userfaultfd."""
DESCRIPTORS_OF_WORKERS: Final = 12
"""One to ask and one to answer, of each of the six threads that put a partition's questions to the kernel."""
_MENDS: Final = {
    Permission.SECCOMP: "allow userfaultfd in the seccomp profile",
    Permission.SYSCTL: "sysctl vm.unprivileged_userfaultfd=1",
    Permission.DEVICE_MODE: f"give the VMMs' group {USERFAULTFD_DEVICE}: chgrp kvm, chmod 0660",
    Permission.DEVICE_SECCOMP: f"allow {USERFAULTFD_DEVICE} in the device policy",
}


def procmap_query(maps: str = "/proc/self/maps") -> Finding:
    name, setting = "PROCMAP_QUERY", Setting.LIVE
    request = bytearray(struct.pack("<9Q4I2Q", PROCMAP_QUERY_BYTES, 0, id(name), *([0] * 12)))
    try:
        with Path(maps).open("rb") as file:
            fcntl.ioctl(file, PROCMAP_QUERY, request)
    except OSError as error:
        if error.errno != errno.ENOENT:  # which would be an answer: no VMA there
            lost = f"Linux {platform.release()}: maps files are read as text, slower by their length"
            return Finding(name, setting, State.LIMITED, lost, "Linux 6.11 or newer")
    return Finding(name, setting, State.OK, "a VMA is found in one call")


def userfaultfd() -> Finding:
    """By the system call or else the device, as `intercept_client` does it, and what the kernel offers."""
    name, setting = "userfaultfd", Setting.LIVE
    try:
        descriptor = open_userfaultfd()
    except UserfaultfdNotPermitted as refused:
        mend = ", or ".join(_MENDS[permission] for permission in refused.missing)
        return Finding(name, setting, State.MISSING, str(refused.strerror), f"{mend}; or promise begin/end")
    except UserfaultfdUnavailable as refused:
        mend = "a kernel with CONFIG_USERFAULTFD; or promise begin/end"
        return Finding(name, setting, State.MISSING, str(refused.strerror), mend)
    request = bytearray(struct.pack("<3Q", UFFD_API, 0, 0))
    try:
        fcntl.ioctl(descriptor, UFFDIO_API, request)
    except OSError as error:
        found = f"UFFDIO_API: {error.strerror}"
        return Finding(name, setting, State.MISSING, found, "Linux 4.11 or newer; or promise begin/end")
    finally:
        os.close(descriptor)
    _, features, _ = struct.unpack("<3Q", request)
    lacking = [feature for feature, bit in WATCHING.items() if not bit & features]
    if lacking:
        mend = "Linux 5.19 on x86-64, 6.10 on arm64, or newer; or promise begin/end"
        return Finding(name, setting, State.MISSING, f"the kernel lacks {', '.join(lacking)}", mend)
    return Finding(
        name, setting, State.OK, "this user may create one, and the kernel can watch memory with it"
    )


def userfaultfd_device(path: str = USERFAULTFD_DEVICE) -> Finding:
    name, setting = path, Setting.LIVE
    spare = "only needed where seccomp refuses the system call"
    try:
        mode = f"mode {os.stat(path).st_mode & 0o7777:04o}"
    except OSError as error:
        return Finding(name, setting, State.LIMITED, f"{error.strerror}; {spare}", "Linux 6.1 or newer")
    if not os.access(path, os.R_OK | os.W_OK):
        mend = _MENDS[Permission.DEVICE_MODE]
        return Finding(name, setting, State.LIMITED, f"{mode}, not for this user; {spare}", mend)
    return Finding(name, setting, State.OK, f"{mode}, for this user")


def userfaultfd_sysctl(path: str = USERFAULTFD_SYSCTL) -> Finding:
    """0 is enough: the daemon needs no faults of the kernel's own, so UFFD_USER_MODE_ONLY is asked for."""
    name, setting = "vm.unprivileged_userfaultfd", Setting.LIVE
    try:
        value = Path(path).read_text(encoding="ascii").strip()
    except OSError as error:
        found = f"cannot be read: {error.strerror}"
        return Finding(name, setting, State.LIMITED, found, "a kernel with CONFIG_USERFAULTFD")
    return Finding(name, setting, State.OK, f"{value}; either value will do since Linux 5.11")


def kvm(path: str = KVM) -> Finding:
    name, setting = path, Setting.GUESTS
    try:
        with open(path, "r+b", buffering=0) as device:
            version = fcntl.ioctl(device, KVM_GET_API_VERSION)
    except PermissionError:
        return Finding(name, setting, State.MISSING, "permission denied", "put this user into the group kvm")
    except OSError as error:
        mend = "modprobe kvm_intel or kvm_amd; in a guest: nested virtualisation"
        return Finding(name, setting, State.MISSING, error.strerror or str(error), mend)
    if version != KVM_API_VERSION:
        found = f"API version {version}"
        return Finding(name, setting, State.MISSING, found, f"a kernel with API version {KVM_API_VERSION}")
    return Finding(name, setting, State.OK, f"API version {version}")


def descriptors(limits: Mapping[str, int] | None) -> Finding:
    """The hard limit counts: the daemon raises the soft one to it. `limits` are those that the daemon states,
    None if it is not known: would one uid, at all of its limits, leave it without descriptors?"""
    name, setting = "RLIMIT_NOFILE", Setting.MODEL
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = ENOUGH_DESCRIPTORS if limits is None else descriptors_at(limits)
    if hard != resource.RLIM_INFINITY and hard < enough:
        found = f"{hard} at most here; one uid at the daemon's limits takes {enough}"
        mend = "LimitNOFILE= in the unit, or ulimit -Hn; or lower limits, vps_per_partition first"
        return Finding(name, setting, State.LIMITED, found, mend)
    return Finding(name, setting, State.OK, f"{hard} at most here, {enough} would do")


def descriptors_at(limits: Mapping[str, int]) -> int:
    """What a daemon needs for one uid that is at each of these limits, as `hello` states them."""
    connections = limits.get("vps_per_partition", 0) + limits.get("notifiers_per_partition", 0) + 1
    return (
        limits.get("partitions_per_uid", 0) * (connections + DESCRIPTORS_OF_WORKERS)
        + limits.get("vmms_per_uid", 0) * DESCRIPTORS_A_VMM
        + limits.get("connections_without_hello", 0)
        + limits.get("operators", 0)
    )


def peer_pidfd() -> Finding:
    name, setting = "SO_PEERPIDFD", Setting.LIVE
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            os.close(ours.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError:
            lost = "a VMM's death is seen by its connection only"
            return Finding(name, setting, State.LIMITED, lost, "Linux 6.5 or newer")
    return Finding(name, setting, State.OK, "a VMM's death is seen as such")
