"""Why a question about a VMM's memory got no answer, and whether asking again can help.

Owns the one table that sorts errnos and absences into permanent and transient causes. FORWARD, `EINVAL` and
`unbacked` are answers to permanent ones only (V-4 of the protocol). An errno that is not in the table is
transient. Must not know who asks, or how.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from enum import Enum
from typing import Final


class Permanence(Enum):
    PERMANENT = "permanent"
    """It holds until the memory changes."""
    TRANSIENT = "transient"
    """The same question may be answered a little later."""
    GONE = "gone"
    """The memory itself is gone, and the partition is about to end."""


class Call(Enum):
    """The system calls whose refusals are sorted."""

    UFFDIO_API = "UFFDIO_API"
    UFFDIO_REGISTER = "UFFDIO_REGISTER"
    READ_EVENTS = "preadv2(userfaultfd, RWF_NOWAIT)"
    PROCMAP_QUERY = "PROCMAP_QUERY"
    READ_PROC = "read(maps or smaps)"
    LOOK_AT = "readlink, fstat of a descriptor"


class Cause(Enum):
    """Why there is no answer: a text for people, and whether it is permanent."""

    def __init__(self, text: str, permanence: Permanence, number: int = errno.EAGAIN) -> None:
        self.text = text
        self.permanence = permanence
        self.number = number
        """The errno for a VMM's own call, unless the cause is permanent."""

    @property
    def word(self) -> str:
        """Its name on the wire (P-41)."""
        return self.name.lower()

    def with_detail(self, detail: str) -> str:
        return f"{self.text} ({detail})" if detail else self.text

    NO_VMA = "no VMA covers the page", Permanence.PERMANENT
    UNATTACHED = "the VMM has not called attach_memory", Permanence.PERMANENT
    UNWATCHABLE = "a userfaultfd cannot watch a VMA of this type", Permanence.PERMANENT
    UNANNOUNCED = "there is no userfaultfd and no promise to announce changes", Permanence.PERMANENT
    NOT_VIRGIN = "somebody has called UFFDIO_API before, or the kernel lacks a feature", Permanence.PERMANENT
    NOT_OFFERED = "this kernel does not offer the call", Permanence.PERMANENT
    LONG_NAME = "the VMA's name is longer than any that the kernel tells", Permanence.PERMANENT
    NOT_ALLOWED = "the daemon may not", Permanence.PERMANENT
    REFUSED_BY_ITS_FILE = "the file system that the file is on refuses", Permanence.PERMANENT

    HELD = "another userfaultfd still holds the VMA", Permanence.TRANSIENT
    NO_ROOM = "no memory left, or the process is at vm.max_map_count", Permanence.TRANSIENT
    NO_DESCRIPTORS = "no descriptors left", Permanence.TRANSIENT
    NO_RECORD = "smaps does not show the VMA, which is there", Permanence.TRANSIENT
    CHANGING = "the VMA changed at every look", Permanence.TRANSIENT
    SMAPS_ENDED = (
        "smaps reads nothing more: the thread that opened it has ended",
        Permanence.TRANSIENT,
        errno.EINVAL,
    )
    """The memory is there, so no fault is decided; the VMM must state the kind or hand over smaps again."""
    NO_ANSWER = (
        "no answer in time: the process's mmap lock is held, or other long searches come first",
        Permanence.TRANSIENT,
        errno.ETIMEDOUT,
    )
    IMAGE_ERROR = "the image cannot be read", Permanence.TRANSIENT, errno.EIO
    """What a restored guest's memory comes from: its content is not known, so no fault is decided."""
    OTHER = "the kernel refuses", Permanence.TRANSIENT
    """An errno that the table does not have."""

    MM_GONE = "the process has exited or called exec", Permanence.GONE, errno.EINVAL


REFUSALS: Final[Mapping[Call, Mapping[int, Cause]]] = {
    Call.UFFDIO_API: {errno.EINVAL: Cause.NOT_VIRGIN},
    Call.UFFDIO_REGISTER: {
        errno.EINVAL: Cause.UNWATCHABLE,
        errno.EPERM: Cause.UNWATCHABLE,  # a shared mapping of a file that was opened for reading alone
        errno.EBUSY: Cause.HELD,
        errno.ENOMEM: Cause.NO_ROOM,  # registering a part splits the VMA; the mm that is gone says so, too
    },
    Call.READ_EVENTS: {errno.EOPNOTSUPP: Cause.NOT_OFFERED},  # before Linux 6.10
    Call.PROCMAP_QUERY: {
        errno.ENOENT: Cause.NO_VMA,
        errno.ESRCH: Cause.MM_GONE,
        errno.ENOTTY: Cause.NOT_OFFERED,  # before Linux 6.11
        errno.ENAMETOOLONG: Cause.LONG_NAME,
        errno.ENOMEM: Cause.NO_ROOM,
    },
    Call.READ_PROC: {errno.ESRCH: Cause.MM_GONE, errno.ENOMEM: Cause.NO_ROOM},
    Call.LOOK_AT: {
        errno.EACCES: Cause.NOT_ALLOWED,
        errno.EPERM: Cause.NOT_ALLOWED,
        errno.ENAMETOOLONG: Cause.REFUSED_BY_ITS_FILE,
        errno.EIO: Cause.REFUSED_BY_ITS_FILE,
        errno.ENOTCONN: Cause.REFUSED_BY_ITS_FILE,
        errno.ESTALE: Cause.REFUSED_BY_ITS_FILE,
        errno.ENOMEM: Cause.NO_ROOM,
        errno.EMFILE: Cause.NO_DESCRIPTORS,
        errno.ENFILE: Cause.NO_DESCRIPTORS,
    },
}
"""From the manual pages ioctl_userfaultfd(2), proc(5), read(2), readlink(2) and stat(2), and, where
they are silent, from fs/userfaultfd.c and fs/proc/task_mmu.c."""


def cause_of(call: Call, error: OSError) -> Cause:
    """The cause of a refused call: `Cause.OTHER` for an errno that is not in the table."""
    return REFUSALS[call].get(error.errno or 0, Cause.OTHER)


def error_name(error: OSError) -> str:
    """As in EBUSY, for logs and messages."""
    return errno.errorcode.get(error.errno or 0, f"errno {error.errno}")
