"""What it means when the kernel refuses a question about a VMM's memory, or has nothing to say.

Owns the one table that sorts errnos and absences into what is decided and what passes: FORWARD, `EINVAL` and
`unbacked` are said only of what is decided (V-4 of the protocol). An errno that is not in the table passes.
Must not know who asks, or how.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from enum import Enum
from typing import Final


class Verdict(Enum):
    DECIDED = "decided"
    """It is about the memory, and stays true until the memory changes."""
    PASSING = "passing"
    """It is about the moment: the same question may be answered a little later."""
    GONE = "gone"
    """The memory itself is gone, and with it, in a moment, the partition."""


class Call(Enum):
    """The calls whose refusals are sorted."""

    UFFDIO_API = "UFFDIO_API"
    UFFDIO_REGISTER = "UFFDIO_REGISTER"
    READ_EVENTS = "preadv2(userfaultfd, RWF_NOWAIT)"
    PROCMAP_QUERY = "PROCMAP_QUERY"
    READ_PROC = "read(maps or smaps)"
    OPEN_SMAPS = "open(smaps)"
    LOOK_AT = "readlink, fstat of a descriptor"


class Meaning(Enum):
    """What came of a question, in words for people, and whether that decides it."""

    def __init__(self, text: str, verdict: Verdict, number: int = errno.EAGAIN) -> None:
        self.text = text
        self.verdict = verdict
        self.number = number
        """What a VMM's own call is refused with, unless it is decided."""

    NO_VMA = "no VMA covers the page", Verdict.DECIDED
    UNWATCHABLE = "a userfaultfd cannot watch a VMA of this type", Verdict.DECIDED
    UNANNOUNCED = "there is no userfaultfd and no promise to announce changes", Verdict.DECIDED
    NOT_VIRGIN = "somebody has called UFFDIO_API before, or the kernel lacks a feature", Verdict.DECIDED
    NOT_OFFERED = "this kernel does not offer the call", Verdict.DECIDED
    LONG_NAME = "the VMA's name is longer than any that the kernel tells", Verdict.DECIDED
    NOT_ALLOWED = "the daemon may not", Verdict.DECIDED
    REFUSED_BY_ITS_FILE = "the file system that the file is on refuses", Verdict.DECIDED

    HELD = "another userfaultfd still holds the VMA", Verdict.PASSING
    NO_ROOM = "no memory left, or the process is at vm.max_map_count", Verdict.PASSING
    NO_DESCRIPTORS = "no descriptors left", Verdict.PASSING
    NO_RECORD = "smaps does not show the VMA, which is there", Verdict.PASSING
    CHANGING = "the VMA changed at every look", Verdict.PASSING
    SMAPS_ENDED = (
        "smaps reads nothing more: the thread that opened it has ended",
        Verdict.PASSING,
        errno.EINVAL,
    )
    """The memory is there, so no fault is decided; the VMM must state the kind or hand over smaps anew."""
    NO_ANSWER = "the process does not answer: its mmap lock is held", Verdict.PASSING, errno.ETIMEDOUT
    OTHER = "the kernel refuses", Verdict.PASSING
    """What the table does not have."""

    MM_GONE = "the process has exited or called exec", Verdict.GONE, errno.EINVAL


_NO_RESOURCES: Final = {
    errno.ENOMEM: Meaning.NO_ROOM,
    errno.EMFILE: Meaning.NO_DESCRIPTORS,
    errno.ENFILE: Meaning.NO_DESCRIPTORS,
}
REFUSALS: Final[Mapping[Call, Mapping[int, Meaning]]] = {
    Call.UFFDIO_API: {errno.EINVAL: Meaning.NOT_VIRGIN},
    Call.UFFDIO_REGISTER: {
        errno.EINVAL: Meaning.UNWATCHABLE,
        errno.EPERM: Meaning.UNWATCHABLE,  # a shared mapping of a file that was opened for reading alone
        errno.EBUSY: Meaning.HELD,
        errno.ENOMEM: Meaning.NO_ROOM,  # registering a part splits the VMA; the mm that is gone says so, too
    },
    Call.READ_EVENTS: {errno.EOPNOTSUPP: Meaning.NOT_OFFERED},  # before Linux 6.10
    Call.PROCMAP_QUERY: {
        errno.ENOENT: Meaning.NO_VMA,
        errno.ESRCH: Meaning.MM_GONE,
        errno.ENOTTY: Meaning.NOT_OFFERED,  # before Linux 6.11
        errno.ENAMETOOLONG: Meaning.LONG_NAME,
        errno.ENOMEM: Meaning.NO_ROOM,
    },
    Call.READ_PROC: {errno.ESRCH: Meaning.MM_GONE, errno.ENOMEM: Meaning.NO_ROOM},
    Call.OPEN_SMAPS: {
        errno.EACCES: Meaning.NOT_ALLOWED,
        errno.EPERM: Meaning.NOT_ALLOWED,
        errno.ENOENT: Meaning.NOT_ALLOWED,  # procfs hides the pid (hidepid)
        errno.ESRCH: Meaning.MM_GONE,
        **_NO_RESOURCES,
    },
    Call.LOOK_AT: {
        errno.EACCES: Meaning.NOT_ALLOWED,
        errno.EPERM: Meaning.NOT_ALLOWED,
        errno.ENAMETOOLONG: Meaning.REFUSED_BY_ITS_FILE,
        errno.EIO: Meaning.REFUSED_BY_ITS_FILE,
        errno.ENOTCONN: Meaning.REFUSED_BY_ITS_FILE,
        errno.ESTALE: Meaning.REFUSED_BY_ITS_FILE,
        **_NO_RESOURCES,
    },
}
"""By the manual pages ioctl_userfaultfd(2), proc(5), read(2), open(2), readlink(2) and stat(2), and for what
they leave out by fs/userfaultfd.c and fs/proc/task_mmu.c."""


def meaning(call: Call, error: OSError) -> Meaning:
    """What the refusal of a call means; an errno that is not in the table is `Meaning.OTHER`, and passes."""
    return REFUSALS[call].get(error.errno or 0, Meaning.OTHER)


def error_name(error: OSError) -> str:
    """As in EBUSY, for logs and messages."""
    return errno.errorcode.get(error.errno or 0, f"errno {error.errno}")
