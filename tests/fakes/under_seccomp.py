"""Puts itself under a seccomp filter that refuses userfaultfd, as container runtimes do, and tries for one.

Owns the filter (seccomp(2)); the command's argument is the errno that it answers with. Prints "opened", or
the names of the permissions that are missing.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
from typing import Final

from intercept_client.memory import UserfaultfdNotPermitted, open_userfaultfd

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
FIRST_ARGUMENT, ARGUMENT_BYTES = 16, 8
"""Of struct seccomp_data; the low half comes first on both machines."""
RET_ALLOW, RET_ERRNO = 0x7FFF0000, 0x00050000
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBERS: Final = {"x86_64": 323, "aarch64": 282}


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse(system_call: int, number: int, where: tuple[int, int] | None = None) -> None:
    """Let every system call through but one, or but those whose argument `where[0]` is `where[1]`."""
    index, value = where or (0, 0)
    condition = (
        (LOAD_WORD, 0, 0, FIRST_ARGUMENT + index * ARGUMENT_BYTES),
        (JUMP_IF_EQUAL, 0, 1, value),
    )
    checked = condition if where is not None else ()
    steps = (
        (LOAD_WORD, 0, 0, 0),  # the system call's number
        (JUMP_IF_EQUAL, 0, 1 + len(checked), system_call),
        *checked,
        (RETURN, 0, 0, RET_ERRNO | number),
        (RETURN, 0, 0, RET_ALLOW),
    )
    code = b"".join(struct.pack("<HBBI", *step) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(Program(len(steps), code))) == 0


if __name__ == "__main__":
    refuse(NUMBERS[platform.machine()], int(sys.argv[1]))
    try:
        open_userfaultfd()
        print("opened")
    except UserfaultfdNotPermitted as refused:
        print(*(permission.name for permission in refused.missing))
