"""Recognises the descriptors that a VMM hands over: a maps file, an smaps file, a userfaultfd.

Owns the recognition and its errors, which name anything else. Must not know how the descriptors are used.

Opens no file of another process: a root daemon may open what the VMM may not, such as the smaps of a set-uid
program that the VMM has called exec on. The numbers of a file's process and inode tell whose it is
(`_is_of`); stat(2) shows them without opening anything.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import stat
from contextlib import ExitStack, suppress
from enum import Enum

from intercept_protocol.errors import WireError
from interceptd.address_space import Undecided
from interceptd.address_space.attachment import Attachment
from interceptd.address_space.mm_proof import NotOfThisMm, prove
from interceptd.address_space.proc_text import MmGone
from interceptd.address_space.procmaps import ProcMaps
from interceptd.address_space.refusals import Call, Cause, Permanence, cause_of
from interceptd.address_space.smaps import Smaps
from interceptd.address_space.userfaultfd import LINK as USERFAULTFD_LINK
from interceptd.address_space.userfaultfd import AlreadyInitialised, FeaturesMissing, NotReadable, Userfaultfd
from interceptd.connections.closer import Closer
from interceptd.connections.peer import Peer

PROC_SUPER_MAGIC = 0x9FA0
"""f_type of procfs, statfs(2)."""
_PROCESS_FILE = re.compile(r"(/(?P<id>\d+)(/task/\d+)?)?/(?P<name>maps|smaps)( \(deleted\))?\Z")
"""The end of the /proc/self/fd link of a process's file, wherever its procfs is mounted. If it is not mounted
(fsopen, MNT_DETACH), the link is `/ID/maps`; if only the process's directory is, the link has no id."""


class DescriptorKind(Enum):
    MAPS = "/proc/self/maps"
    SMAPS = "/proc/self/smaps"
    USERFAULTFD = "userfaultfd"


_TAKEN = "an open /proc/self/maps, and optionally /proc/self/smaps and a userfaultfd"


def recognise(descriptor: int, peer: Peer) -> DescriptorKind:
    """The kind of a descriptor. Raises EINVAL, which describes any other, or another process's proc file.

    The owner of a file of another procfs instance cannot be determined: its ids may be of another pid
    namespace. But the peer was allowed to open it, and only the peer gets answers from it.
    """
    link = os.readlink(f"/proc/self/fd/{descriptor}")
    if link == USERFAULTFD_LINK and is_readable(descriptor):
        return DescriptorKind.USERFAULTFD
    file = _PROCESS_FILE.search(link)
    if file is None or not _is_procfs(descriptor) or not is_readable(descriptor):
        raise WireError(
            errno.EINVAL,
            f"attach_memory takes {_TAKEN}, not {_describe(descriptor, link)}",
        )
    if _is_of_our_procfs(descriptor) and not _is_of(peer, descriptor, file):
        raise WireError(
            errno.EINVAL,
            f"{link} belongs to another process than the one connected, "
            + (f"pid {peer.pid}" if peer.pid else "which is in another pid namespace"),
        )
    return DescriptorKind.MAPS if file["name"] == "maps" else DescriptorKind.SMAPS


def attach(
    descriptors: list[int], received: int, peer: Peer, *, promised: bool, closer: Closer
) -> Attachment:
    """Build an attachment of the peer's descriptors, in any order. Takes ownership of all of them.

    `received` is how many were sent, of which `descriptors` were kept. Raises EINVAL, which says what is
    missing, surplus or wrong, or `Undecided`, and then has `closer` close them, as the attachment will.
    """
    with ExitStack() as unwanted:
        unwanted.callback(closer.close, descriptors)
        try:
            found = _sort(descriptors, received, peer)
            if DescriptorKind.MAPS not in found:
                raise WireError(errno.EINVAL, f"attach_memory takes {_TAKEN}: the first is missing")
            userfaultfd = _negotiate(found.get(DescriptorKind.USERFAULTFD))
            maps, smaps = ProcMaps(found[DescriptorKind.MAPS]), found.get(DescriptorKind.SMAPS)
            if userfaultfd is not None:
                _prove(userfaultfd, maps)
        except OSError as error:
            raise _unseen(error) from None
        unwanted.pop_all()
    flags = None if smaps is None else Smaps(smaps)
    return Attachment(maps, flags, userfaultfd, promised=promised, closer=closer)


def adopt(descriptors: list[int], *, promised: bool, closer: Closer) -> Attachment:
    """Build an attachment of descriptors that a predecessor examined. Raises `KeyError` without a maps file,
    and `OSError`."""
    found: dict[DescriptorKind, int] = {}
    for descriptor in descriptors:
        link = os.readlink(f"/proc/self/fd/{descriptor}")
        file = _PROCESS_FILE.search(link)
        if file is not None:
            found[DescriptorKind.MAPS if file["name"] == "maps" else DescriptorKind.SMAPS] = descriptor
        else:
            found[DescriptorKind.USERFAULTFD] = descriptor
    maps, smaps = ProcMaps(found[DescriptorKind.MAPS]), found.get(DescriptorKind.SMAPS)
    userfaultfd = found.get(DescriptorKind.USERFAULTFD)
    return Attachment(
        maps,
        None if smaps is None else Smaps(smaps),
        None if userfaultfd is None else Userfaultfd(userfaultfd, negotiated=True),
        promised=promised,
        closer=closer,
    )


def _sort(descriptors: list[int], received: int, peer: Peer) -> dict[DescriptorKind, int]:
    if received > len(DescriptorKind):
        raise WireError(errno.EINVAL, f"attach_memory takes {_TAKEN}, not {received} descriptors")
    found: dict[DescriptorKind, int] = {}
    for descriptor in descriptors:
        kind = recognise(descriptor, peer)
        if kind in found:
            raise WireError(errno.EINVAL, f"attach_memory takes one {kind.value}, not two")
        found[kind] = descriptor
    return found


def _negotiate(descriptor: int | None) -> Userfaultfd | None:
    if descriptor is None:
        return None
    try:
        return Userfaultfd(descriptor)
    except NotReadable:
        raise WireError(
            errno.EINVAL,
            "this kernel cannot read a userfaultfd without blocking (needs Linux 6.10): do not hand one over",
        ) from None
    except AlreadyInitialised:
        raise WireError(
            errno.EINVAL, "the userfaultfd is already initialised: leave UFFDIO_API to the daemon"
        ) from None
    except FeaturesMissing as lacking:
        raise WireError(
            errno.EINVAL,
            f"this kernel's userfaultfd cannot watch guest memory, it lacks {lacking}: do not hand one over",
        ) from None
    except OSError as error:
        raise Undecided.because(cause_of(Call.UFFDIO_API, error), f"userfaultfd: {error.strerror}") from None


def _prove(userfaultfd: Userfaultfd, maps: ProcMaps) -> None:
    try:
        prove(userfaultfd, maps)
    except MmGone:
        raise Undecided.because(Cause.MM_GONE) from None
    except NotOfThisMm:
        raise WireError(
            errno.EINVAL,
            "the userfaultfd does not watch the memory that the maps file shows: it belongs to the process"
            " that created it, even if another one inherited it",
        ) from None


def _unseen(error: OSError) -> WireError | Undecided:
    """The error for a descriptor that could not be examined."""
    refusal = cause_of(Call.LOOK_AT, error)
    if refusal.permanence is not Permanence.PERMANENT:
        return Undecided.because(refusal, f"examining a descriptor: {error.strerror}")
    return WireError(errno.EINVAL, f"attach_memory takes {_TAKEN}; one cannot be examined: {error.strerror}")


def _is_of_our_procfs(descriptor: int) -> bool:
    """Whether a proc file is of the procfs instance mounted here, and that one uses our pid namespace."""
    ours = os.readlink("/proc/self") == str(os.getpid())  # else it is of another pid namespace
    return ours and os.fstat(descriptor).st_dev == os.stat("/proc").st_dev


def _is_of(peer: Peer, descriptor: int, file: re.Match[str]) -> bool:
    """Whether a file of our procfs is the peer's: by the id in its link, which may be of a thread, or if the
    link has no id, by comparing the files."""
    process = f"/proc/{peer.pid}"
    if file["id"] is not None and int(file["id"]) == peer.pid:
        return True
    with suppress(FileNotFoundError, PermissionError, ProcessLookupError):  # hidden (hidepid), or exited
        if file["id"] is not None:
            os.stat(f"{process}/task/{file['id']}")
            return True
        return os.path.samestat(os.stat(f"{process}/{file['name']}"), os.fstat(descriptor))
    return False


def is_readable(descriptor: int) -> bool:
    """Whether it was opened for reading: not with O_PATH, and not write-only."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    return not flags & os.O_PATH and flags & os.O_ACCMODE != os.O_WRONLY


def _is_procfs(descriptor: int) -> bool:
    buffer = (ctypes.c_long * 32)()  # struct statfs is 120 bytes, f_type its first long
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.fstatfs(descriptor, buffer) == 0 and buffer[0] == PROC_SUPER_MAGIC


def _describe(descriptor: int, link: str) -> str:
    noun = _noun(descriptor, link)
    if is_readable(descriptor):
        return noun
    path_only = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_PATH
    return f"{noun} opened {'with O_PATH' if path_only else 'write-only'}"


def _noun(descriptor: int, link: str) -> str:
    mode = os.fstat(descriptor).st_mode
    for test, noun in (
        (stat.S_ISREG, "the file"),
        (stat.S_ISDIR, "the directory"),
        (stat.S_ISSOCK, "the socket"),
        (stat.S_ISFIFO, "the pipe"),
        (stat.S_ISCHR, "the device"),
    ):
        if test(mode):
            return f"{noun} {link}"
    return link
