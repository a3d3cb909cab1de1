"""`interceptctl record`.

Owns its options, when a recording ends, and what is shown meanwhile; must not know the order of the chunks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Final

import click

from intercept_client import BlockingOperator, TraceRing
from intercept_protocol import messages
from intercept_protocol.recording import Header
from intercept_protocol.text import sentence
from intercept_protocol.trace import RECORDS_AT_LEAST, RECORDS_LIMIT
from interceptctl import operator_client, recordings, silence, units
from interceptctl.completion import partition_ids
from interceptctl.finite import Finite
from interceptctl.interrupts import interrupts

from .recorder import Progress, Recorder

SHOWN_SECONDS: Final = 0.25
"""Between two lines of progress."""
RING_RECORDS: Final = 1 << 18
"""16 MiB: some five seconds of a busy daemon."""


@click.command("record")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--partition",
    "partition_id",
    metavar="ID",
    type=click.IntRange(0, 2**64 - 1),
    shell_complete=partition_ids,
    help="Which partition  [default: the only one].",
)
@click.option("--seconds", type=Finite(0, min_open=True), help="Stop after so long.")
@click.option(
    "--max-size",
    metavar="MIB",
    type=Finite(0, min_open=True),
    help="Stop once FILE has this size.",
)
@click.option(
    "--ring",
    "records",
    metavar="RECORDS",
    default=RING_RECORDS,
    show_default=True,
    type=click.IntRange(RECORDS_AT_LEAST, RECORDS_LIMIT),
    help="How many records may wait to be written, a power of two; each takes 64 bytes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was recorded as JSON.")
@click.pass_obj
def record_command(
    path: str,
    *,
    file: Path,
    partition_id: int | None,
    seconds: float | None,
    max_size: float | None,
    records: int,
    as_json: bool,
) -> None:
    """Record what happens in a partition into FILE, until Ctrl-C or the partition's end.

    FILE is overwritten. It then holds the partition's regions, VMAs and mappings, and every intercept,
    invalidation, map and unmap after them, in order, with times. `interceptctl replay` repeats it;
    `interceptctl report` shows it.

    Recording never holds the daemon up: if this program is too slow, records are lost, and the file says how
    many and where. It then begins anew with the partition's state.

    Exit code 0 also if the daemon or the partition ends.
    """
    if records & (records - 1):
        raise click.UsageError(f"--ring: {records} is not a power of two")
    with operator_client.operator(path) as operator:
        partition = _partition(operator, partition_id)
        header = _header(operator, partition)
    stopping = _Stopping(seconds, max_size)
    with ExitStack() as opened, interrupts(stopping.interrupt):
        # Only once the daemon traces the partition is what FILE held before given up.
        recorder = Recorder(
            lambda: opened.enter_context(recordings.created(file)),
            header,
            lambda: stopping.why(recorder.progress),
        )

        def follow(operator: BlockingOperator) -> None:
            with closing(_ring(records)) as ring:
                recorder.record(operator, partition, ring)

        operator_client.outlast(
            lambda: operator_client.operator(path),
            follow,
            lambda seconds: stopping.wait(seconds, recorder.progress),
        )
        recorder.end("no successor of the daemon came")
    stopping.show_end(recorder.progress, file, as_json=as_json)


def _partition(operator: BlockingOperator, partition_id: int | None) -> messages.PartitionSummary:
    partitions = [each for each in operator.list_partitions() if not silence.waits_for_vmm(each)]
    chosen = [each for each in partitions if partition_id in {None, each.partition_id}]
    if len(chosen) == 1:
        return chosen[0]
    if partition_id is not None:
        raise operator_client.Refused(f"no partition {partition_id}")
    if not partitions:
        raise operator_client.Refused("there is no partition to record")
    ids = ", ".join(str(each.partition_id) for each in partitions[:8])
    raise click.UsageError(f"there are {len(partitions)} partitions ({ids}): choose one with --partition")


def _header(operator: BlockingOperator, partition: messages.PartitionSummary) -> Header:
    inspection = operator.inspect_partition(partition.partition_id)
    return Header(
        partition_id=partition.partition_id,
        name=partition.name,
        address_space=partition.address_space,
        hypervisor=partition.hypervisor,
        architecture=inspection.architecture,
        mmio_granularity=inspection.mmio_granularity,
        daemon=operator.hello.version,
        wall_clock_ns=time.time_ns(),
        monotonic_ns=time.monotonic_ns(),
    )


def _ring(records: int) -> TraceRing:
    try:
        return TraceRing(records)
    except OSError as error:
        raise operator_client.Failure(f"memory for {records} records: {sentence(error)}") from error


class _Stopping:
    """When a recording ends, and the line that shows how far it is."""

    def __init__(self, seconds: float | None, max_mib: float | None) -> None:
        self._seconds = seconds
        self._max_size = None if max_mib is None else int(max_mib * (1 << 20))
        self._interrupted = False
        self._began = self._shown = time.monotonic()

    def interrupt(self) -> None:
        self._interrupted = True

    def why(self, progress: Progress) -> str | None:
        """Why to stop now, if so; shows the progress at times."""
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown >= SHOWN_SECONDS:
            self._shown = now
            click.echo(f"\r\x1b[K{self._line(progress)}", err=True, nl=False)
        if self._interrupted:
            return "interrupted"
        if self._seconds is not None and now - self._began >= self._seconds:
            return f"{self._seconds:g} s are over"
        if self._max_size is not None and progress.size >= self._max_size:
            return "the file has its largest size"
        return None

    def wait(self, seconds: float, progress: Progress) -> bool:
        """Let the daemon's successor start; False to give up."""
        time.sleep(seconds)
        return self.why(progress) is None

    def show_end(self, progress: Progress, file: Path, *, as_json: bool) -> None:
        if sys.stderr.isatty():
            click.echo("\r\x1b[K", err=True, nl=False)
        if as_json:
            click.echo(json.dumps({"file": os.fsdecode(file), **asdict(progress)}))
        else:
            click.echo(f"{file}: {self._line(progress)}")

    def _line(self, progress: Progress) -> str:
        parts = [
            f"{time.monotonic() - self._began:.1f} s",
            units.of(progress.records, "record"),
            f"{progress.size / (1 << 20):,.1f} MiB",
        ]
        if progress.gaps:
            parts.append(f"{units.of(progress.gaps, 'gap')}, {units.of(progress.lost, 'record')} lost")
        return ", ".join(parts)
