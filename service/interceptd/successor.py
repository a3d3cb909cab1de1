"""Checks whether the installed version could take over from this daemon.

Owns the command that checks, and how long it may take. Must not know the daemon.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from subprocess import DEVNULL

import trio

from intercept_protocol.errors import WireError
from intercept_protocol.text import sentence
from interceptd.ledger.ledger_format import LEDGER_FORMAT

CHECK_SECONDS = 30.0


def check_command(arguments: Sequence[str]) -> tuple[str, ...]:
    """The command that checks whether the installed program accepts the configuration and reads the ledgers.

    `arguments` are those of `serve`.
    """
    check = ("check-config", "--ledger-format", str(LEDGER_FORMAT))
    return (sys.executable, "-m", "interceptd", *check, *arguments)


async def require_successor(command: Sequence[str]) -> None:
    """Run the check, for at most 30 s. If it fails, raises `WireError` EINVAL with the last line it
    printed."""
    try:
        with trio.fail_after(CHECK_SECONDS):
            check = await trio.run_process(
                command, stdin=b"", stdout=DEVNULL, capture_stderr=True, check=False, deliver_cancel=_kill
            )
    except trio.TooSlowError:
        raise _refusal(f"no answer within {CHECK_SECONDS:g} s") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: the system refuses a thread
        raise _refusal(sentence(error)) from error
    if check.returncode:
        said = os.fsdecode(check.stderr).strip() or f"exit status {check.returncode}"
        raise _refusal(said.splitlines()[-1].removeprefix("Error: "))


async def _kill(process: trio.Process) -> None:
    process.kill()


def _refusal(why: str) -> WireError:
    return WireError(errno.EINVAL, f"a daemon started now could not go on: {why:.2000}")
