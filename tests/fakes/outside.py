"""A process's memory as anybody else sees it in /proc.

Owns reading the maps file and the files behind it. Shares no code with what is tested.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

PAGE = 4096
Frame = tuple[str, int]


class Truth(NamedTuple):
    """What a process has at a page: the shared file and its page, or memory of its own; and the rights, as in
    r 1, w 2, x 4."""

    frame: Frame
    rights: int


def truth_of(pid: int | str, pages: Collection[int]) -> dict[int, Truth]:
    """What the process has at those of `pages` where it has anything, all of one instant."""
    found = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, letters, offset, device, inode, *name = line.split()
        start, end = (int(bound, 16) // PAGE for bound in span.split("-"))
        rights = sum(bit for letter, bit in zip("rwx", (1, 2, 4), strict=True) if letter in letters)
        major, minor = (int(number, 16) for number in device.split(":"))
        for page in pages:
            if start <= page < end:
                of_file = int(offset, 16) // PAGE + page - start
                kind = _kind(letters, name)
                frame = (f"{kind} {major}:{minor}:{inode}", of_file) if kind else ("anonymous", page)
                found[page] = Truth(frame, rights)
    return found


def _kind(letters: str, name: list[str]) -> str | None:
    """Of what is shared and has a path; anything else is the process's own."""
    if not letters.endswith("s") or not name or not name[0].startswith("/"):
        return None
    return "sysv" if name[0].startswith("/SYSV") else "file"


def frame_at(pid: int, page: int) -> Frame | None:
    """The identity of what the process has mapped at one of its pages."""
    truth = truth_of(pid, [page]).get(page)
    return None if truth is None else truth.frame


def content_of(pid: int, frame: Frame) -> bytes:
    """The page that a file's frame names, read through a descriptor that the process has of that file."""
    for entry in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{entry}"
        status = os.stat(path)
        if f"file {os.major(status.st_dev)}:{os.minor(status.st_dev)}:{status.st_ino}" == frame[0]:
            with open(path, "rb") as file:
                return os.pread(file.fileno(), PAGE, frame[1] * PAGE)
    raise LookupError(f"process {pid} has no {frame[0]} open")


def descriptor_count(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
