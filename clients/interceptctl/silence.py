"""Why nothing of a partition is mapped, or nothing can be learnt of it, in words.

Owns the sentences; must not know tables. A word that only a newer daemon knows is shown as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from intercept_protocol.errors import unwatched
from intercept_protocol.messages import (
    AddressSpaceKind,
    HypervisorKind,
    MemoryWatch,
    PartitionInspection,
    PartitionSummary,
    RestoreState,
)

NO_PID: Final = "-"
"""In place of a pid that the daemon cannot see."""
NO_PID_NOTE: Final = f"pid {NO_PID}: the process is in another pid namespace"
UNWATCHED: Final = (MemoryWatch.UNATTACHED, MemoryWatch.NONE)
"""While this is so, nothing is mapped."""
_WATCHES: Final[Mapping[str, str]] = {
    MemoryWatch.UNATTACHED: "nothing is mapped before the VMM calls attach_memory",
    MemoryWatch.NONE: "nothing is mapped without a userfaultfd or promise_begin_end",
    MemoryWatch.PROMISED: "the VMM announces each change of its memory",
    MemoryWatch.USERFAULTFD: "the kernel reports changes of the VMM's memory",
    MemoryWatch.DECLARED: "the VMM declares its memory and each change",
}
CAUSES: Final[Mapping[str, str]] = {
    "unattached": "the VMM had not called attach_memory",
    "unannounced": "neither a userfaultfd nor promise_begin_end",
    "unwatchable": "no userfaultfd can watch it: a file on disk, a device",
    "no_vma": "nothing is mapped there in the VMM",
    "held": "another userfaultfd holds it",
    "no_room": "no memory left, or the VMM is at vm.max_map_count",
    "no_descriptors": "the daemon had no descriptors left",
    "no_record": "the VMM's smaps did not show it",
    "changing": "it changed at every look",
    "smaps_ended": "the VMM's thread that opened smaps has ended",
    "no_answer": "the VMM's process did not answer in time",
    "mm_gone": "the VMM's process has exited or called exec",
    "image_error": "the image of its snapshot could not be read",
}
"""Of `unresolved`, for those that have more to say than their word."""


def pid(number: int) -> str:
    return str(number) if number else NO_PID


def owner(summary: PartitionSummary) -> str:
    if summary.pid:
        return f"uid {summary.uid}, pid {summary.pid}"
    return f"uid {summary.uid}, pid {NO_PID}: the process is in another pid namespace"


def watch(view: PartitionInspection) -> str | None:
    """How changes of the VMM's memory become known; None if an earlier daemon does not say it."""
    word = view.summary.watch
    if not word:
        return None
    text = f"{word}: {_WATCHES[word]}" if word in _WATCHES else word
    if view.userfaultfd_errno is not None:
        text += f"; the VMM was refused a userfaultfd ({unwatched(view.userfaultfd_errno)})"
    if word == MemoryWatch.PROMISED and view.notifiers == 0:
        text += ", but has no notifier connection to do it with"
    return text


def hypervisor(view: PartitionInspection) -> str:
    if view.summary.hypervisor == HypervisorKind.VMM and view.hypervisor_connected is False:
        return f"{view.summary.hypervisor}: not connected, so no region can be added"
    return view.summary.hypervisor


def notes(summaries: Sequence[PartitionSummary]) -> Iterator[str]:
    """What a line in a list of partitions has no room for."""
    for word in UNWATCHED:
        ids = [summary.partition_id for summary in summaries if summary.watch == word]
        if ids:
            yield f"watch {word}, {_WATCHES[word]}: {_some(ids)}"
    if waiting := [summary.partition_id for summary in summaries if waits_for_vmm(summary)]:
        yield f"waiting for a VMM, whose memory comes from a snapshot: {_some(waiting)}"
    if any(hides_pid(summary) for summary in summaries):
        yield NO_PID_NOTE


def waits_for_vmm(summary: PartitionSummary) -> bool:
    """It is a restore, and no partition yet."""
    return summary.restore == RestoreState.WAITING


def hides_pid(summary: PartitionSummary) -> bool:
    return not summary.pid and not waits_for_vmm(summary)


def is_unwatched(summary: PartitionSummary) -> bool:
    return summary.address_space == AddressSpaceKind.PROCESS and summary.watch in UNWATCHED


def _some(ids: Iterable[int], most: int = 8) -> str:
    listed = list(ids)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(map(str, listed[:most])) + more
