"""What the kernel offers to the current user.

Owns the probes, each a function that returns its `Finding`. Must not know the daemon.
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

from .finding import Finding, Mode, State

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
"""Features that the daemon needs to watch guest memory, include/uapi/linux/userfaultfd.h."""
SO_PEERPIDFD: Final = 77
"""include/uapi/asm-generic/socket.h, Linux 6.5."""
KVM: Final = "/dev/kvm"
MISC_DEVICES: Final = "/proc/misc"
"""The kernel's own list of such devices, a number and a name each; the /dev of a container lacks some."""
KVM_GET_API_VERSION: Final = 0xAE00
KVM_API_VERSION: Final = 12
ENOUGH_DESCRIPTORS: Final = 4096
"""Some ten partitions with all their VPs; used if the limits of the daemon are unknown."""
DESCRIPTORS_PER_VMM: Final = 5
"""Its connection, its pidfd, and the maps, smaps and userfaultfd that it hands over."""
DESCRIPTORS_OF_WORKERS: Final = 12
"""A request and a reply descriptor for each of the six threads that query the kernel for a partition."""
_FIXES: Final = {
    Permission.SECCOMP: "allow userfaultfd in the seccomp profile",
    Permission.SYSCTL: "sysctl vm.unprivileged_userfaultfd=1",
    Permission.DEVICE_MODE: f"give the VMMs' group {USERFAULTFD_DEVICE}: chgrp kvm, chmod 0660",
    Permission.DEVICE_SECCOMP: f"allow {USERFAULTFD_DEVICE} in the device policy",
}


def procmap_query(maps: str = "/proc/self/maps") -> Finding:
    name, mode = "PROCMAP_QUERY", Mode.LIVE
    request = bytearray(struct.pack("<9Q4I2Q", PROCMAP_QUERY_BYTES, 0, id(name), *([0] * 12)))
    try:
        with Path(maps).open("rb") as file:
            fcntl.ioctl(file, PROCMAP_QUERY, request)
    except OSError as error:
        if error.errno != errno.ENOENT:  # ENOENT means supported: no VMA at that address
            lost = f"Linux {platform.release()}: maps are parsed as text, slower"
            return Finding(name, mode, State.LIMITED, lost, "Linux 6.11 or newer")
    return Finding(name, mode, State.OK, "finds a VMA in one call")


def userfaultfd() -> Finding:
    """Whether one can be created, by system call or device like `intercept_client`, and its features."""
    name, mode = "userfaultfd", Mode.LIVE
    try:
        descriptor = open_userfaultfd()
    except UserfaultfdNotPermitted as refused:
        fix = ", or ".join(_FIXES[permission] for permission in refused.missing)
        return Finding(name, mode, State.MISSING, str(refused.strerror), f"{fix}; or use begin/end")
    except UserfaultfdUnavailable as refused:
        fix = "a kernel with CONFIG_USERFAULTFD; or use begin/end"
        return Finding(name, mode, State.MISSING, str(refused.strerror), fix)
    request = bytearray(struct.pack("<3Q", UFFD_API, 0, 0))
    try:
        fcntl.ioctl(descriptor, UFFDIO_API, request)
    except OSError as error:
        found = f"UFFDIO_API: {error.strerror}"
        return Finding(name, mode, State.MISSING, found, "Linux 4.11 or newer; or use begin/end")
    finally:
        os.close(descriptor)
    _, features, _ = struct.unpack("<3Q", request)
    lacking = [feature for feature, bit in WATCHING.items() if not bit & features]
    if lacking:
        fix = "Linux 5.19 on x86-64, 6.10 on arm64, or newer; or use begin/end"
        return Finding(name, mode, State.MISSING, f"the kernel does not support {', '.join(lacking)}", fix)
    return Finding(name, mode, State.OK, "this user may create one, and it can watch memory")


def userfaultfd_device(path: str = USERFAULTFD_DEVICE, misc: str = MISC_DEVICES) -> Finding:
    name, mode = path, Mode.LIVE
    spare = "only needed where seccomp refuses the system call"
    try:
        permissions = f"mode {os.stat(path).st_mode & 0o7777:04o}"
    except FileNotFoundError:
        found, fix = _absent(path, misc, "Linux 6.1 or newer")
        return Finding(name, mode, State.LIMITED, f"{found}; {spare}", fix)
    except OSError as error:
        return Finding(
            name, mode, State.LIMITED, f"{error.strerror}; {spare}", _FIXES[Permission.DEVICE_MODE]
        )
    if not os.access(path, os.R_OK | os.W_OK):
        fix = _FIXES[Permission.DEVICE_MODE]
        return Finding(name, mode, State.LIMITED, f"{permissions}, no access for this user; {spare}", fix)
    return Finding(name, mode, State.OK, f"{permissions}, accessible to this user")


def userfaultfd_sysctl(path: str = USERFAULTFD_SYSCTL) -> Finding:
    """0 is enough: the daemon handles no faults of kernel code, so it uses UFFD_USER_MODE_ONLY."""
    name, mode = "vm.unprivileged_userfaultfd", Mode.LIVE
    try:
        value = Path(path).read_text(encoding="ascii").strip()
    except OSError as error:
        found = f"unknown: {error.strerror}"
        return Finding(name, mode, State.LIMITED, found, "a kernel with CONFIG_USERFAULTFD")
    return Finding(name, mode, State.OK, f"{value}; either value works since Linux 5.11")


def kvm(path: str = KVM, misc: str = MISC_DEVICES) -> Finding:
    name, mode = path, Mode.GUESTS
    enable = "modprobe kvm_intel or kvm_amd; in a VM: enable nested virtualisation"
    try:
        with open(path, "r+b", buffering=0) as device:
            version = fcntl.ioctl(device, KVM_GET_API_VERSION)
    except PermissionError:
        return Finding(name, mode, State.MISSING, "permission denied", "add this user to the group kvm")
    except FileNotFoundError:
        return Finding(name, mode, State.MISSING, *_absent(path, misc, enable))
    except OSError as error:
        return Finding(name, mode, State.MISSING, error.strerror or str(error), enable)
    if version != KVM_API_VERSION:
        found = f"API version {version}"
        return Finding(name, mode, State.MISSING, found, f"a kernel with API version {KVM_API_VERSION}")
    return Finding(name, mode, State.OK, f"API version {version}")


def _absent(path: str, misc: str, enable: str) -> tuple[str, str]:
    """What is found and how to fix it where a device has no file; `enable` makes the kernel offer it."""
    try:
        offered = [line.split()[1] for line in Path(misc).read_text(encoding="ascii").splitlines()]
    except OSError:
        offered = []
    if Path(path).name in offered:
        return "no such file, though the kernel offers the device", f"in a container: --device {path}"
    return "no such device", enable


def descriptors(limits: Mapping[str, int] | None) -> Finding:
    """Whether one uid, at all of its `limits`, could exhaust the daemon's descriptors.

    `limits` are those that the daemon states, None if unknown. The hard limit counts: the daemon raises the
    soft limit to it."""
    name, mode = "RLIMIT_NOFILE", Mode.MODEL
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = ENOUGH_DESCRIPTORS if limits is None else descriptors_at(limits)
    if hard != resource.RLIM_INFINITY and hard < enough:
        found = f"{hard} at most; one uid at the daemon's limits needs {enough}"
        fix = (
            "LimitNOFILE= in the unit, --ulimit nofile= for a container, the limit of the node's container "
            "runtime for a pod, or ulimit -Hn; or lower the limits, connections_per_uid first"
        )
        return Finding(name, mode, State.LIMITED, found, fix)
    return Finding(name, mode, State.OK, f"{hard} at most, {enough} are enough")


def descriptors_at(limits: Mapping[str, int]) -> int:
    """How many descriptors one uid can occupy if it reaches all of these limits (as stated by `hello`)."""
    partitions = limits.get("partitions_per_uid", 0)
    joined = limits.get("vps_per_partition", 0) + limits.get("notifiers_per_partition", 0) + 1
    connections = partitions * joined
    return (
        min(connections, limits.get("connections_per_uid", connections))
        + partitions * DESCRIPTORS_OF_WORKERS
        + limits.get("vmms_per_uid", 0) * DESCRIPTORS_PER_VMM
        + limits.get("connections_without_hello", 0)
        + limits.get("operators", 0)
    )


def peer_pidfd() -> Finding:
    name, mode = "SO_PEERPIDFD", Mode.LIVE
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            os.close(ours.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError:
            lost = "a VMM's death is noticed only when its connection closes"
            return Finding(name, mode, State.LIMITED, lost, "Linux 6.5 or newer")
    return Finding(name, mode, State.OK, "a VMM's death is noticed directly")
