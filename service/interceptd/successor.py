"""Whether what is installed now could go on where this daemon ends.

Owns the command that finds out, and how long it may take. Must not know the daemon.
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
    """Ask the program that would be started whether it can use the configuration, and read the ledgers.

    `arguments` are those of `serve`.
    """
    check = ("check-config", "--ledger-format", str(LEDGER_FORMAT))
    return (sys.executable, "-m", "interceptd", *check, *arguments)


async def require_successor(command: Sequence[str]) -> None:
    """Run the check, for at most 30 s. Raises `WireError` EINVAL, with its last words, if it fails."""
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
