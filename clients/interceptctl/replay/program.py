"""Runs one replay: with a private daemon or a given one.

Owns the two readings of the file, the pace, and that every failure becomes an error message and an exit code.
Must not know options.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import trio

from intercept_client import ClientMisuse, ConnectionLost
from intercept_protocol.addresses import RangeError
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.recording import Chunk
from interceptctl import operator_client
from interceptctl.exercise.daemon_process import UNKEPT_DAEMON, DaemonFailed, running_daemon
from interceptctl.recordings import RecordingFile

from .explain import explanation
from .order import in_order
from .player import playing
from .survey import survey_of
from .verdict import Verdict

_UNREACHABLE: Final = (ConnectionLost, ProtocolViolation, DaemonFailed, OSError)

Progress = Callable[[Verdict], None]
"""Called often, with what was found so far."""


class Report(msgspec.Struct, kw_only=True):
    """What a replay found, and why the first difference may be there."""

    passed: bool
    records: int
    verdict: Verdict
    before: list[str]
    """What the recording says of the page of the first difference, until then."""
    striking: str


def run(path: str | None, recording: RecordingFile, speed: float | None, progress: Progress) -> Report:
    """Replay against the daemon at `path`, or a private one for None; `speed` times as fast as recorded, or
    as fast as it goes.

    Raises `Failure` if the recording is damaged, or `Refused` or `Unreachable` if the replay broke off.
    """
    try:
        return trio.run(_replay, path, recording, speed, progress)
    except ClientMisuse as error:
        raise operator_client.Failure(f"the recording says what cannot be: {error}") from error
    except WireError as error:
        raise operator_client.Refused(f"refused: {operator_client.sentence(error, path)}") from error
    except _UNREACHABLE as error:
        notes = getattr(error, "__notes__", ())
        text = "\n".join((operator_client.sentence(error, path), *notes))
        raise operator_client.Unreachable(text) from error


async def _replay(
    path: str | None, recording: RecordingFile, speed: float | None, progress: Progress
) -> Report:
    header = recording.header
    try:
        survey = survey_of(recording.chunks(), header.words)
    except RangeError as error:
        raise operator_client.Failure(f"the recording says what cannot be: {error}") from error
    pace = _Pace(speed)
    async with _daemon(path) as vmm_socket, playing(vmm_socket, header, survey, pace.wait) as player:

        def shown() -> Iterator[Chunk]:
            for chunk in recording.chunks():
                progress(player.verdict)
                yield chunk

        await player.play(in_order(shown()))
    verdict = player.verdict
    before: list[str] = []
    striking = ""
    if verdict.differences:
        before, striking = explanation(header, recording.chunks(), verdict.differences[0])
    return Report(
        passed=not verdict.difference_count,
        records=survey.records,
        verdict=verdict,
        before=before,
        striking=striking,
    )


@asynccontextmanager
async def _daemon(path: str | None) -> AsyncIterator[str]:
    if path is not None:
        yield path
        return
    async with running_daemon(UNKEPT_DAEMON) as own:
        yield own.path


class _Pace:
    """Waits until a recorded time has come."""

    def __init__(self, speed: float | None) -> None:
        self._speed = speed
        self._began: tuple[float, int] | None = None

    async def wait(self, time_ns: int) -> None:
        if self._speed is None:
            return
        if self._began is None:
            self._began = trio.current_time(), time_ns
        began, first_ns = self._began
        await trio.sleep_until(began + (time_ns - first_ns) / 1e9 / self._speed)
