"""A partition is traced and recorded: a real daemon writes, other processes read."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import count
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.keeper_process import children
from fakes.raw_client import READ, RawConnection, Refused, request
from fakes.raw_vmm import GFN, PAGE, PFN, UADDR, RawVmm
from fakes.recordings import HEADER
from intercept_client import BlockingOperator, ConnectionLost, RecordsRead, TraceRing, WireError
from intercept_protocol.messages import PartitionInspection, PartitionSummary, TraceBegun
from intercept_protocol.recording import (
    Chunk,
    End,
    Gap,
    Mappings,
    RecordingReader,
    Records,
    Regions,
    StateBegins,
    StateEnds,
    Vmas,
)
from intercept_protocol.trace import RECORD_SIZE, RING_HEADER, Kind, Words, intercept_of, kinds_of, records_of
from interceptctl.cli import main
from interceptctl.record import command
from interceptctl.record.recorder import Progress, Recorder

SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
F_SEAL_FUTURE_WRITE = 0x10
RING = RING_HEADER + 256 * RECORD_SIZE


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("traces")) as daemon:
        yield daemon.wait_serving()


@pytest.fixture
def vmm(daemon: DaemonProcess) -> Iterator[RawVmm]:
    with RawVmm(daemon.socket) as vmm:
        yield vmm


@pytest.fixture
def operator(daemon: DaemonProcess) -> Iterator[BlockingOperator]:
    with BlockingOperator.open(daemon.operator_socket, timeout=PATIENCE) as operator:
        yield operator


@pytest.fixture
def ring() -> Iterator[TraceRing]:
    with closing(TraceRing(256)) as ring:
        yield ring


def kinds(ring: TraceRing) -> list[str]:
    return [Kind(kind).name.lower() for kind in kinds_of(ring.read().stored)]


def test_what_happens_in_a_partition_is_written_in_order(
    vmm: RawVmm, operator: BlockingOperator, ring: TraceRing
) -> None:
    begun = operator.trace(vmm.partition_id, ring)
    assert (begun.records, begun.record_size) == (256, RECORD_SIZE)
    vmm.map_vma(UADDR, 4, PFN)
    vmm.add_region(GFN, 4, UADDR, "mmio")
    vp = vmm.vp()
    vp.intercept(GFN)
    vp.intercept(GFN + 1)
    vp.intercept(0)
    vmm.ask("protect_vma", start_uaddr=UADDR, page_count=1, readable=True, writable=False, executable=False)
    vmm.ask("unmap_vma", start_uaddr=UADDR, page_count=4)
    lost, first, stored = ring.read()
    assert (lost, first) == (0, 0)
    records = records_of(first, stored)
    assert [Kind(record.kind).name.lower() for record in records] == [
        "vma_mapped", "region_added", "vp_attached",
        "guest_mapped", "intercept", "intercept", "intercept",
        "invalidation_begun", "vma_protected", "guest_unmapped", "invalidation_served", "invalidation_ended",
        "invalidation_begun", "vma_unmapped", "guest_unmapped", "invalidation_served", "invalidation_ended",
    ]  # fmt: skip
    words = Words(begun.answers, begun.sources, begun.region_kinds)
    answered = [intercept_of(record, words) for record in records if record.kind == Kind.INTERCEPT]
    assert [(each.gfn, each.reason) for each in answered] == [
        (GFN, "mapped"), (GFN + 1, "already_mapped"), (0, "no_region"),
    ]  # fmt: skip
    first_touch = answered[0]
    stages = (first_touch.decode_ns, first_touch.resolve_ns, first_touch.map_ns)
    assert first_touch.total_ns >= sum(stages)
    assert min(stages) > 0
    assert first_touch.wait_ns == 0
    assert answered[1].decode_ns == 0, "the look-up decided it"
    times = [record.time_ns for record in records]
    assert times == sorted(times)
    assert records[0].values[:3] == (UADDR // PAGE, 4, PFN)
    assert records[3].values[:4] == (GFN, 4, UADDR // PAGE, PFN)
    assert begun.sources[records[7].detail] == "protect_vma"


def test_the_end_of_the_connection_ends_the_trace_and_another_may_begin(
    daemon: DaemonProcess, vmm: RawVmm, operator: BlockingOperator, ring: TraceRing
) -> None:
    vp = vmm.vp()
    with BlockingOperator.open(daemon.operator_socket, timeout=PATIENCE) as first:
        first.trace(vmm.partition_id, ring)
        with pytest.raises(WireError) as twice, closing(TraceRing(256)) as other:
            operator.trace(vmm.partition_id, other)
        assert twice.value.name == "EBUSY"
        vp.intercept(0)
        assert kinds(ring) == ["intercept"]

    with closing(TraceRing(256)) as second:

        def traces() -> bool:
            try:
                operator.trace(vmm.partition_id, second)
            except WireError:
                return False
            return True

        eventually(traces, True)
        vp.intercept(0)
        assert kinds(second) == ["intercept"]
    assert kinds(ring) == []


def test_a_reader_that_is_too_slow_learns_how_many_records_it_lost(
    vmm: RawVmm, operator: BlockingOperator, ring: TraceRing
) -> None:
    vp = vmm.vp()
    operator.trace(vmm.partition_id, ring)
    for _ in range(1000):
        vp.intercept(0)
    lost, first, stored = ring.read()
    assert (lost, first, len(stored) // RECORD_SIZE) == (745, 745, 255), "the oldest may be overwritten now"
    vp.intercept(0)
    lost, first, stored = ring.read()
    assert (lost, first, len(stored) // RECORD_SIZE) == (0, 1000, 1)


def memfd(size: int, *, seals: int = SEALED, allocated: bool = True) -> int:
    descriptor = os.memfd_create("ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    if allocated:
        os.posix_fallocate(descriptor, 0, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def memfd_with_pages_behind_its_end() -> int:
    """As many as it lacks."""
    descriptor = memfd(RING, seals=0, allocated=False)
    fallocate(descriptor, "--keep-size", f"--offset={RING}", f"--length={RING}")
    assert os.fstat(descriptor).st_blocks * 512 == RING
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALED)
    return descriptor


def fallocate(descriptor: int, *options: str) -> None:
    subprocess.run(
        ["fallocate", *options, f"/proc/self/fd/{descriptor}"],
        pass_fds=[descriptor],
        check=False,
        capture_output=True,
    )


def unfit() -> list[tuple[str, Sequence[int]]]:
    return [
        ("takes one descriptor, not 0", []),
        ("takes one descriptor, not 2", [memfd(RING), memfd(RING)]),
        ("not a memfd", [os.open("/dev/null", os.O_RDWR)]),
        ("not a memfd", [os.pipe()[0]]),
        ("sealed", [memfd(RING, seals=0)]),
        ("sealed", [memfd(RING, seals=fcntl.F_SEAL_GROW)]),
        ("allocated", [memfd(RING, allocated=False)]),
        ("allocated", [memfd_with_pages_behind_its_end()]),
        ("power of two", [memfd(RING_HEADER)]),
        ("power of two", [memfd(RING + RECORD_SIZE)]),
        ("power of two", [memfd(RING - 1)]),
        ("Operation not permitted", [memfd(RING, seals=SEALED | fcntl.F_SEAL_WRITE)]),
        ("Operation not permitted", [memfd(RING, seals=SEALED | fcntl.F_SEAL_SEAL)]),
        ("Operation not permitted", [memfd(RING, seals=SEALED | F_SEAL_FUTURE_WRITE)]),
    ]


def test_memory_that_could_fail_under_the_daemon_is_refused(daemon: DaemonProcess, vmm: RawVmm) -> None:
    before = daemon.footprint().descriptors
    with RawConnection(daemon.operator_socket) as operator:
        operator.say_hello("operator")
        for why, descriptors in unfit():
            operator.send(request("trace", {"partition_id": vmm.partition_id}), descriptors)
            with pytest.raises(Refused) as caught:
                operator.answer()
            refusal = caught.value.refusal
            assert (refusal.name, why in refusal.message) == ("EINVAL", True), refusal.message
            for descriptor in descriptors:
                os.close(descriptor)
        assert vmm.vp().intercept(0, READ) == ["forward", "no_region"]
    eventually(lambda: daemon.footprint().descriptors <= before + 1, True)


def test_nobody_else_can_take_the_memory_back_or_write_it(
    vmm: RawVmm, operator: BlockingOperator, ring: TraceRing
) -> None:
    operator.trace(vmm.partition_id, ring)
    for change in (
        lambda: os.ftruncate(ring.descriptor, 0),
        lambda: os.pwrite(ring.descriptor, b"x", 0),
        lambda: punch_hole(ring.descriptor),
    ):
        with pytest.raises(PermissionError):
            change()
    vmm.vp().intercept(0)
    assert ring.written


def punch_hole(descriptor: int) -> None:
    fallocate(descriptor, "--punch-hole", "--offset=0", f"--length={PAGE}")
    if os.fstat(descriptor).st_blocks * 512 >= RING:
        raise PermissionError("its pages are still there")


# ---------------------------------------------------------------- recordings


def going_on(happens: Callable[[], object]) -> Callable[[], str | None]:
    """For a recorder: the state takes three looks; then something happens, once; then it is enough."""
    looks = count(1)

    def proceed() -> str | None:
        look = next(looks)
        if look == 10:
            happens()
        return "enough" if look == 20 else None

    return proceed


def summary(operator: BlockingOperator, vmm: RawVmm) -> PartitionSummary:
    return operator.inspect_partition(vmm.partition_id).summary


def chunks_of(data: bytes) -> list[Chunk]:
    reader = RecordingReader()
    chunks = list(reader.feed(data))
    reader.close()
    return chunks


def test_a_recording_has_the_state_and_then_what_happens(
    vmm: RawVmm, operator: BlockingOperator, ring: TraceRing
) -> None:
    vmm.map_vma(UADDR, 4, PFN)
    vmm.add_region(GFN, 4, UADDR, "mmio")
    vp = vmm.vp()
    vp.intercept(GFN)
    out = io.BytesIO()
    recorder = Recorder(lambda: out, HEADER, going_on(lambda: vp.intercept(0)))
    recorder.record(operator, summary(operator, vmm), ring)
    written = chunks_of(out.getvalue())
    match written:
        case [
            StateBegins(0), Regions([region]), Vmas([vma]), Mappings([mapping]), StateEnds(0),
            Records(0, stored), End("enough"),
        ]:  # fmt: skip
            assert (region.start_gfn, vma.start_pfn, mapping.frame) == (GFN, PFN, ("host", PFN))
            assert list(kinds_of(stored)) == [Kind.INTERCEPT]
        case _:
            pytest.fail(f"{written}")
    assert (recorder.progress.records, recorder.progress.gaps) == (1, 0)


def test_after_a_gap_the_state_is_recorded_again(
    vmm: RawVmm, operator: BlockingOperator, ring: TraceRing
) -> None:
    vp = vmm.vp()
    out = io.BytesIO()
    recorder = Recorder(lambda: out, HEADER, going_on(lambda: [vp.intercept(0) for _ in range(300)]))
    recorder.record(operator, summary(operator, vmm), ring)
    written = [type(chunk).__name__ for chunk in chunks_of(out.getvalue())]
    assert written.count("StateBegins") == 2
    assert written.index("Gap") < written.index("Records") < len(written)
    assert (recorder.progress.lost, recorder.progress.records) == (45, 255)


def test_the_command_records_until_it_is_interrupted(
    daemon: DaemonProcess, vmm: RawVmm, tmp_path: Path
) -> None:
    file = tmp_path / "a.rec"
    with subprocess.Popen(
        [
            sys.executable, "-m", "interceptctl", "--socket", str(daemon.operator_socket),
            "record", str(file), "--json", "--partition", str(vmm.partition_id),
        ],
        stdout=subprocess.PIPE,
        text=True,
    ) as command:  # fmt: skip
        vp = vmm.vp()

        def is_recorded() -> bool:
            vp.intercept(0)
            return file.exists() and file.stat().st_size > 2000

        try:
            eventually(is_recorded, True)
            command.send_signal(signal.SIGINT)
            told, _ = command.communicate(timeout=PATIENCE)
        finally:
            command.kill()
    assert command.returncode == 0
    summary = json.loads(told)
    assert (summary["file"], summary["lost"], summary["size"]) == (str(file), 0, file.stat().st_size)
    assert chunks_of(file.read_bytes())[-1] == End("interrupted")


def test_a_recording_ends_though_ever_more_is_written(vmm: RawVmm, operator: BlockingOperator) -> None:
    vp = vmm.vp()

    class Busy(TraceRing):
        reads = 0

        def read(self) -> RecordsRead:
            self.reads += 1
            assert self.reads < 500, "nobody asked whether to go on"
            found = super().read()
            vp.intercept(0)
            return found

    looks = iter([None] * 20)

    def proceed() -> str | None:
        vp.intercept(0)
        return next(looks, "enough")

    out = io.BytesIO()
    with closing(Busy(256)) as ring:
        recorder = Recorder(lambda: out, HEADER, proceed)
        recorder.record(operator, summary(operator, vmm), ring)
    assert chunks_of(out.getvalue())[-1] == End("enough")


def test_a_recording_has_the_words_of_the_daemon(daemon: DaemonProcess, vmm: RawVmm, ring: TraceRing) -> None:
    with OfAnotherVersion.open(daemon.operator_socket, timeout=PATIENCE) as operator:
        out = io.BytesIO()
        recorder = Recorder(lambda: out, HEADER, lambda: "enough")
        recorder.record(operator, summary(operator, vmm), ring)
    reader = RecordingReader()
    list(reader.feed(out.getvalue()))
    assert reader.header is not None
    assert reader.header.words.sources[-1] == "a later one"


class OfAnotherVersion(BlockingOperator):
    """Of a daemon that has taken the partition over from another."""

    def trace(self, partition_id: int, ring: TraceRing) -> TraceBegun:
        begun = super().trace(partition_id, ring)
        return msgspec.structs.replace(begun, sources=(*begun.sources, "a later one"))

    def inspect_partition(self, partition_id: int) -> PartitionInspection:
        found = super().inspect_partition(partition_id)
        return msgspec.structs.replace(
            found, statistics=msgspec.structs.replace(found.statistics, restarts=1)
        )


@pytest.mark.parametrize(
    ("successor", "why"),
    [(BlockingOperator, "the partition ended"), (OfAnotherVersion, "the daemon records in other words now")],
)
def test_a_recording_does_not_go_on_with_what_is_not_its_own(
    daemon: DaemonProcess, vmm: RawVmm, successor: type[BlockingOperator], why: str
) -> None:
    """A daemon that began anew counts its partitions from 1 again."""
    out = io.BytesIO()

    def lose() -> None:
        raise ConnectionLost("no word")

    recorder = Recorder(lambda: out, HEADER, going_on(lose))
    with BlockingOperator.open(daemon.operator_socket, timeout=PATIENCE) as operator:
        partition = summary(operator, vmm)
        with pytest.raises(ConnectionLost), closing(TraceRing(256)) as ring:
            recorder.record(operator, partition, ring)
    with (
        successor.open(daemon.operator_socket, timeout=PATIENCE) as operator,
        closing(TraceRing(256)) as ring,
    ):

        def goes_on() -> bool:
            try:
                recorder.record(operator, partition, ring)
            except WireError as refusal:  # the first connection's end was not noticed yet
                return refusal.name != "EBUSY"
            return True

        eventually(goes_on, True)
    assert chunks_of(out.getvalue())[-2:] == [StateEnds(0), End(why)]


def record(daemon: DaemonProcess, *arguments: str | Path) -> Result:
    command = ["--socket", str(daemon.operator_socket), "record", *map(str, arguments)]
    return CliRunner().invoke(main, command)


def test_a_recording_that_is_refused_leaves_the_file_as_it_was(
    daemon: DaemonProcess, vmm: RawVmm, operator: BlockingOperator, ring: TraceRing, tmp_path: Path
) -> None:
    """It may be the file of the other recording, which goes on."""
    file = tmp_path / "a.rec"
    file.write_bytes(b"the first one")
    operator.trace(vmm.partition_id, ring)
    result = record(daemon, file, "--partition", str(vmm.partition_id))
    assert (result.exit_code, "traced already" in result.output) == (1, True), result.output
    assert file.read_bytes() == b"the first one"


def test_a_file_that_cannot_be_written_is_said(daemon: DaemonProcess, vmm: RawVmm, tmp_path: Path) -> None:
    for file, why in ((tmp_path / "none" / "a.rec", "No such file"), (Path("/dev/full"), "No space left")):
        result = record(daemon, file, "--partition", str(vmm.partition_id))
        assert (result.exit_code, result.exception.__class__) == (1, SystemExit)
        assert result.output.startswith(f"Error: {file}: "), result.output
        assert why in result.output
        assert len(result.output.splitlines()) == 1


def test_a_ring_for_which_there_is_no_memory_is_said(
    daemon: DaemonProcess, vmm: RawVmm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "posix_fallocate", lacks)
    result = record(daemon, tmp_path / "a.rec", "--partition", str(vmm.partition_id), "--ring", "256")
    assert (result.exit_code, result.output) == (1, "Error: memory for 256 records: Cannot allocate memory\n")


def test_a_recording_that_is_given_up_while_no_daemon_is_there_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.rec"
    why = command._Stopping.why
    with DaemonProcess(tmp_path) as daemon, RawVmm(daemon.wait_serving().socket):

        def kill_and_interrupt() -> None:
            daemon.signal(signal.SIGKILL)
            daemon.wait_ended()
            signal.raise_signal(signal.SIGINT)

        look = going_on(kill_and_interrupt)

        def and_look(stopping: command._Stopping, progress: Progress) -> str | None:
            told = why(stopping, progress)
            look()
            return told

        monkeypatch.setattr(command._Stopping, "why", and_look)
        result = record(daemon, file)
    assert result.exit_code == 0, result.output
    assert isinstance(chunks_of(file.read_bytes())[-1], End)


def test_a_recording_goes_on_with_the_daemon_that_follows_a_killed_one(tmp_path: Path) -> None:
    keep = (sys.executable, "-m", "interceptd", "keep", "--patience", "60", "--")
    with DaemonProcess(tmp_path, launch=keep) as keeper:
        keeper.wait_serving()
        out = io.BytesIO()
        try:
            with RawVmm(keeper.socket) as vmm:
                vp = vmm.vp()

                def last_words() -> None:
                    vp.intercept(0)
                    os.kill(children(keeper.pid)[0], signal.SIGKILL)

                recorder = Recorder(lambda: out, HEADER, going_on(last_words))
                for _ in range(2):
                    with (
                        suppress(ConnectionLost),
                        closing(TraceRing(256)) as ring,
                        BlockingOperator.open(keeper.operator_socket, timeout=PATIENCE) as operator,
                    ):
                        recorder.record(operator, summary(operator, vmm), ring)
        finally:
            for child in children(keeper.pid):
                os.kill(child, signal.SIGKILL)
    written = chunks_of(out.getvalue())
    gap = written.index(Gap(1, None))
    assert [type(chunk) for chunk in written[gap - 1 : gap + 2]] == [Records, Gap, StateBegins]
    assert written[-1] == End("enough")
