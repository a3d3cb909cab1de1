"""Hands a restore over to the daemon, and stays until it ends if that is wanted.

Owns what goes along with the request, and how the command ends. Must not know options, nor what the daemon
does.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Final, NamedTuple

import click
import msgspec

from intercept_client import (
    BlockingVmm,
    OnImageError,
    RestoreReply,
    RestoreState,
    RestoreStatistics,
    WireError,
)
from intercept_protocol.text import visible
from interceptctl import operator_client
from interceptctl.interrupts import interrupts
from interceptctl.operator_client import Failure

from . import shown
from .following import Following
from .image import Image, opened, prefetch_list, read_working_set
from .listening import Listening
from .recording import Recorded, Recording
from .shown import Shown

NAME_LENGTH: Final = 64
_OPTIONS: Final = {"image": "--image", "listener": "--listen", "prefetch": "--prefetch", "trace": "--record"}
"""By what an error of the daemon names."""


class Wish(NamedTuple):
    """What the command line asks for."""

    vmm_socket: str
    listen: Path
    image: Path
    around: int
    prefetch: Path | None
    record: Path | None
    on_image_error: OnImageError
    wait_seconds: float


def detach(wish: Wish, *, as_json: bool) -> None:
    """Return once the daemon has taken over. Raises `Failure`."""
    with opened(wish.image) as image, closing(Listening(wish.listen)) as listening:
        prefetched = None if wish.prefetch is None else read_working_set(wish.prefetch, image)
        reply = _hand_over(wish, image, listening, prefetched, None)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(reply)))
    else:
        click.echo(f"partition {reply.partition_id}: waiting for a VMM at {visible(str(wish.listen))}")


def stay(wish: Wish, *, as_json: bool) -> None:
    """Show the progress until the restore ends, or until Ctrl-C. Raises `Failure`, also for a bad end."""
    with ExitStack() as stack:
        image = stack.enter_context(opened(wish.image))
        prefetched = None if wish.prefetch is None else read_working_set(wish.prefetch, image)
        recording = None
        if wish.record is not None:
            recording = stack.enter_context(closing(Recording(wish.record, image, prefetched or b"")))
        with closing(Listening(wish.listen)) as listening:
            reply = _hand_over(wish, image, listening, prefetched, recording)
        progress = Shown(reply.partition_id, wish.listen)

        def show(now: RestoreStatistics) -> None:
            if now.state != RestoreState.WAITING:
                listening.remove()
            progress.show(now)

        following = Following(reply.partition_id, recording, show, progress.say)
        try:
            with progress, interrupts(following.interrupt):
                operator_client.outlast(lambda: _connected(wish), following.follow, following.wait)
        except Failure:
            if recording is not None:
                for line in recording.finish(restarted=True).sentences():
                    click.echo(line, err=True)
            raise
        recorded = None if recording is None else recording.finish(restarted=following.restarted)
        _conclude(wish, reply.partition_id, following, recorded, as_json=as_json)


def _hand_over(
    wish: Wish, image: Image, listening: Listening, prefetched: bytes | None, recording: Recording | None
) -> RestoreReply:
    """Have the daemon take the restore over. The path of the socket is removed if it does not."""
    try:
        with ExitStack() as stack:
            pages = None if prefetched is None else stack.enter_context(prefetch_list(prefetched))
            vmm = stack.enter_context(_connected(wish))
            try:
                return vmm.restore(
                    image,
                    listening,
                    around_pages=wish.around,
                    on_image_error=wish.on_image_error,
                    connect_timeout=wish.wait_seconds,
                    prefetch=pages,
                    trace=None if recording is None else recording.ring,
                )
            except WireError as refusal:
                raise _refused(refusal, vmm.hello.version) from refusal
    except BaseException:
        listening.remove()
        raise


def _connected(wish: Wish) -> AbstractContextManager[BlockingVmm]:
    name = visible(os.fsdecode(wish.listen.name))[:NAME_LENGTH]
    return operator_client.vmm(wish.vmm_socket, name)


def _refused(refusal: WireError, version: str) -> operator_client.Refused:
    if refusal.number == errno.ENOSYS:
        return operator_client.Refused(f"the daemon is of version {version}, which cannot restore snapshots")
    option = _OPTIONS.get(str(refusal.details.get("field")))
    return operator_client.Refused(f"refused: {refusal}{f' ({option})' if option else ''}")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What is printed as JSON at the end."""

    partition_id: int
    interrupted: bool
    """Whether the VM may go on."""
    restore: RestoreStatistics | None
    """As of the last answer of the daemon."""
    recorded: Recorded | None


def _conclude(
    wish: Wish, partition_id: int, following: Following, recorded: Recorded | None, *, as_json: bool
) -> None:
    last = following.last
    ended = last is not None and last.state == RestoreState.ENDED
    if as_json:
        outcome = Outcome(partition_id=partition_id, interrupted=not ended, restore=last, recorded=recorded)
        click.echo(json.dumps(msgspec.to_builtins(outcome)))
    else:
        for line in shown.end(last, wish.listen, interrupted=not ended, away=following.away):
            click.echo(line)
        for line in () if recorded is None else recorded.sentences():
            click.echo(line)
    if last is not None and ended and last.error:
        raise Failure("\n".join(shown.failure(last, wish.listen)))
