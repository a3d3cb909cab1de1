"""`interceptctl watch`.

Owns its options, what they subscribe to, and how it ends; must not know how an event is worded.
"""

from __future__ import annotations

import json
import select
import shutil
import sys
import time
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
from interceptctl.output import ReaderGone

from .line import line, reconnected

LOOK_SECONDS: Final = 1.0
"""How long a closed output goes unnoticed while there are no events."""
_OF_A_VP: Final = (EventName.VP_ATTACHED, EventName.VP_DETACHED, EventName.INTERCEPT_ANSWERED)


@click.command("watch")
@click.option(
    "--event",
    "names",
    multiple=True,
    metavar="NAME",
    type=click.Choice([name.value for name in EventName]),
    help="Only events with this name; may be repeated  [default: all but intercept_answered].",
)
@click.option(
    "--partition",
    "partition_id",
    metavar="ID",
    type=click.IntRange(0, 2**64 - 1),
    shell_complete=partition_ids,
    help="Only events of this partition.",
)
@click.option(
    "--vp",
    "vp_index",
    metavar="INDEX",
    type=click.IntRange(0, 2**32 - 1),
    help="Only VPs with this index: attached, detached, and their intercepts.",
)
@click.option(
    "--outcome",
    "outcomes",
    multiple=True,
    type=click.Choice([outcome.value for outcome in Outcome]),
    help="Intercepts with this outcome; may be repeated.",
)
@click.option(
    "--reason",
    "reasons",
    multiple=True,
    metavar="REASON",
    type=click.Choice([reason.value for reason in Reason]),
    help="Intercepts with this reason; may be repeated.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object per line; keys are the field names of the protocol.",
)
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
    """Print the daemon's events as they happen, until Ctrl-C.

    Addresses are in bytes; ranges exclude their end. Regions and intercepts show guest-physical addresses;
    invalidations, and what follows `at`, are addresses in the VMM.

    Intercepts are shown only with --event intercept_answered, --vp, --outcome or --reason. Events that come
    faster than they can be printed are dropped; a line events_dropped says how many.

    When the daemon ends, waits for the next and goes on. Where events may be missing, there is a line
    "reconnected", which no daemon sends; JSON too has one.

    Exit code 0 after Ctrl-C or when the output is closed.
    """
    answered = [
        Reason(answer.reason) for answer in Answer if answer.outcome in outcomes or answer.reason in reasons
    ]
    events = _events(names, vp_index, answered)
    is_away = False

    def follow(operator: BlockingOperator) -> None:
        nonlocal is_away
        operator.subscribe(events, partition_id=partition_id, vp_index=vp_index, reasons=answered or None)
        if is_away:
            is_away = False
            print(reconnected(_now_ms(), as_json=as_json), flush=True)
        for event in _happening(operator):
            print(json.dumps(event.to_fields()) if as_json else _fitting(line(event)), flush=True)

    def wait(seconds: float) -> bool:
        nonlocal is_away
        if not is_away:
            is_away = True
            click.echo("daemon went away, waiting", err=True)
        time.sleep(seconds)
        return not _is_unread()

    with suppress(KeyboardInterrupt, ReaderGone):
        operator_client.outlast(lambda: operator_client.operator(path), follow, wait)


def _events(names: Sequence[str], vp_index: int | None, answered: Sequence[str]) -> list[EventName]:
    """The events named, or else those that the filters can match."""
    if names:
        if answered and EventName.INTERCEPT_ANSWERED not in names:
            raise click.UsageError(
                "--outcome and --reason filter intercept_answered, which --event does not include"
            )
        return [EventName(name) for name in names]
    if answered:
        return [EventName.INTERCEPT_ANSWERED]
    if vp_index is not None:
        return list(_OF_A_VP)
    return [name for name in EventName if name is not EventName.INTERCEPT_ANSWERED]


def _happening(operator: BlockingOperator) -> Iterator[Event]:
    """Events as they arrive. Raises `ReaderGone` once the output is closed."""
    operator.timeout = LOOK_SECONDS
    while True:
        try:
            yield from operator.next_events()
        except TimeoutError:
            if _is_unread():
                raise ReaderGone from None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _is_unread() -> bool:
    """Whether standard output is a pipe or socket whose other end was closed."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # poll always reports errors
    return any(what & (select.POLLERR | select.POLLHUP) for _, what in poll.poll(0))


def _fitting(text: str) -> str:
    """Truncate to the width of the terminal; do not truncate for anything else."""
    width = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or cell_len(text) <= width:
        return text
    return f"{set_cell_size(text, width - 1)}…"
