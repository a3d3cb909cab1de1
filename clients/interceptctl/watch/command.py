"""`interceptctl watch`.

Owns its options, what they ask for, and how it ends; must not know how an event is worded.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

import click
from rich.cells import cell_len, set_cell_size

from intercept_client import BlockingOperator
from intercept_protocol.events import Event, EventName, Reason
from intercept_protocol.outcomes import Answer, Outcome
from interceptctl import operator_client
from interceptctl.completion import partition_ids

from .line import line

LOOK_SECONDS: Final = 1.0
"""How long a reader of ours that went away goes unnoticed while nothing happens."""
_OF_A_VP: Final = (EventName.VP_ATTACHED, EventName.VP_DETACHED, EventName.INTERCEPT_ANSWERED)


@click.command("watch")
@click.option(
    "--event",
    "names",
    multiple=True,
    metavar="NAME",
    type=click.Choice([name.value for name in EventName]),
    help="Only events of this name; may be repeated  [default: all but intercept_answered].",
)
@click.option(
    "--partition",
    "partition_id",
    metavar="ID",
    type=click.IntRange(0, 2**64 - 1),
    shell_complete=partition_ids,
    help="Only what happens in this partition.",
)
@click.option(
    "--vp",
    "vp_index",
    metavar="INDEX",
    type=click.IntRange(0, 2**32 - 1),
    help="Only VPs of this index: their coming, going and intercepts.",
)
@click.option(
    "--outcome",
    "outcomes",
    multiple=True,
    type=click.Choice([outcome.value for outcome in Outcome]),
    help="Intercepts that were answered so; may be repeated.",
)
@click.option(
    "--reason",
    "reasons",
    multiple=True,
    metavar="REASON",
    type=click.Choice([reason.value for reason in Reason]),
    help="Intercepts that were answered for this reason; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="For scripts: an object a line, the wire's names.")
@click.pass_obj
def watch_command(
    path: str,
    *,
    names: Sequence[str],
    partition_id: int | None,
    vp_index: int | None,
    outcomes: Sequence[str],
    reasons: Sequence[str],
    as_json: bool,
) -> None:
    """Print what happens in the daemon, as it happens, until Ctrl-C.

    Addresses are in bytes, and the end of a range is not in it: of regions and intercepts they are the
    guest's, behind `at` and of invalidations the VMM's.

    Intercepts are asked for by --event intercept_answered, --vp, --outcome or --reason. What comes
    faster than it is read is left out, and a line events_dropped says how much.

    Exit code 0 after Ctrl-C, and when the reader of its output is gone; 3 when the daemon ends.
    """
    answered = [
        Reason(answer.reason) for answer in Answer if answer.outcome in outcomes or answer.reason in reasons
    ]
    events = _events(names, vp_index, answered)
    with suppress(KeyboardInterrupt), operator_client.operator(path) as operator:
        operator.subscribe(events, partition_id=partition_id, vp_index=vp_index, reasons=answered or None)
        try:
            for event in _happening(operator):
                print(json.dumps(event.to_fields()) if as_json else _fitting(line(event)), flush=True)
        except BrokenPipeError:
            _forget_output()


def _events(names: Sequence[str], vp_index: int | None, answered: Sequence[str]) -> list[EventName]:
    """What is named, or else what the filters can be about."""
    if names:
        if answered and EventName.INTERCEPT_ANSWERED not in names:
            raise click.UsageError("--outcome and --reason are of intercept_answered, which --event left out")
        return [EventName(name) for name in names]
    if answered:
        return [EventName.INTERCEPT_ANSWERED]
    if vp_index is not None:
        return list(_OF_A_VP)
    return [name for name in EventName if name is not EventName.INTERCEPT_ANSWERED]


def _happening(operator: BlockingOperator) -> Iterator[Event]:
    """Events as they come. Raises BrokenPipeError once nobody can read them any more."""
    operator.timeout = LOOK_SECONDS
    while True:
        try:
            yield from operator.next_events()
        except TimeoutError:
            if _is_unread():
                raise BrokenPipeError from None


def _forget_output() -> None:
    """What is still in the buffer goes nowhere: at its exit the interpreter would try again, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _is_unread() -> bool:
    """Whether standard output is a pipe or socket that was closed at its other end."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are told unasked
    return any(what & (select.POLLERR | select.POLLHUP) for _, what in poll.poll(0))


def _fitting(text: str) -> str:
    """Cut to a terminal's width; whole for everything else."""
    width = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or cell_len(text) <= width:
        return text
    return f"{set_cell_size(text, width - 1)}…"
