"""`interceptctl replay`: recordings of real runs, edited ones, and such as nobody should write."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result
from trio.testing import MockClock

from exercise.running import WITHOUT_INVALIDATION
from fakes import recordings
from fakes.daemon_process import DaemonProcess
from fakes.recordings import REAL, Drawn, mapping, region, vma
from intercept_protocol.outcomes import Access, Answer
from intercept_protocol.recording import Gap, StateBegins, StateEnds, Vmas
from intercept_protocol.trace import Kind, Traced
from interceptctl.cli import main
from interceptctl.exercise.daemon_process import running_daemon
from interceptctl.page_map import PageMap
from interceptctl.replay import program
from interceptctl.replay.model import Vma
from interceptctl.replay.order import in_order

GFN, PAGE, PFN = 0x100, 0x700, 0x900
RECORDINGS = sorted(REAL.glob("*.rec"))
MAPPED, ALREADY = Answer.MAPPED, Answer.ALREADY_MAPPED


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("replay")) as daemon:
        yield daemon.wait_serving()


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


class Replayed:
    """Of a recording that is only in memory, against the module's daemon."""

    def __init__(self, daemon: DaemonProcess, data: bytes, directory: Path) -> None:
        file = directory / "a.rec"
        file.write_bytes(data)
        result = run(file, "--vmm-socket", daemon.socket, "--json")
        assert result.stdout, result.output
        self.report = json.loads(result.stdout)
        self.verdict = self.report["verdict"]
        self._again = (file, "--vmm-socket", daemon.socket)
        self.differences = [
            (each["record"], each["recorded"], each["replayed"]) for each in self.verdict["differences"]
        ]

    @property
    def text(self) -> str:
        return run(*self._again).stdout


Replay = Callable[[bytes], Replayed]


@pytest.fixture
def replayed(daemon: DaemonProcess, tmp_path: Path) -> Replay:
    return lambda data: Replayed(daemon, data, tmp_path)


def small_state() -> Drawn:
    """Eight pages of MMIO, of which the guest reaches none."""
    return Drawn().state([region(GFN, 8, PAGE)], [vma(PAGE, 8, PFN)])


def maps(drawn: Drawn, gfn: int = GFN, count: int = 8) -> Drawn:
    return drawn.record(Kind.GUEST_MAPPED, gfn, count, PAGE + gfn - GFN, PFN + gfn - GFN, 1, detail=3)


# ---------------------------------------------------------------- real runs


@pytest.mark.parametrize("file", RECORDINGS, ids=lambda file: file.stem)
def test_a_recording_of_a_real_run_is_answered_again_as_it_was(daemon: DaemonProcess, file: Path) -> None:
    result = run(file, "--vmm-socket", daemon.socket, "--quiet")
    assert result.exit_code == 0, run(file, "--vmm-socket", daemon.socket).output
    assert result.output.startswith("PASS: ")


def test_the_recordings_are_of_each_kind_of_memory_and_small() -> None:
    assert [file.stem for file in RECORDINGS] == ["declared", "guest", "live"]
    assert sum(file.stat().st_size for file in RECORDINGS) < 250 << 10


def test_without_one_invalidation_the_first_difference_is_named(replayed: Replay) -> None:
    data = (REAL / "declared.rec").read_bytes()
    edited = recordings.without(data, lambda record: record.number == 256)
    found = replayed(edited)
    assert found.differences == [(259, "resume mapped", "resume already_mapped")]
    assert (
        "record 256 takes the page away from the guest, but no invalidation since the state says why"
        in found.text
    )
    assert "FAIL: 1 difference" in found.text


def test_without_one_invalidation_of_live_memory_the_first_difference_is_named(replayed: Replay) -> None:
    data = (REAL / "live.rec").read_bytes()
    edited = recordings.without(data, lambda record: record.number in {185, 189, 190})
    found = replayed(edited)
    record, recorded, before = found.differences[0]
    assert (record, "of backing" in recorded, "since the state" in before) == (189, True, True)
    assert "nothing was invalidated in between" in found.text


def test_a_daemon_that_revokes_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "running_daemon", lambda _: running_daemon(WITHOUT_INVALIDATION))
    result = run(REAL / "declared.rec")
    assert result.exit_code == 1
    assert "replayed: resume already_mapped" in result.output


# ---------------------------------------------------------------- what is compared


def test_each_answer_is_compared_and_at_most_ten_differences_are_listed(replayed: Replay) -> None:
    drawn = small_state()
    for _ in range(12):
        drawn.intercept(GFN - 1, Answer.UNBACKED, vp_index=3)
    found = replayed(drawn.end())
    verdict = found.verdict
    assert (verdict["compared"], verdict["equal"], verdict["difference_count"]) == (12, 0, 12)
    assert found.differences == [(n, "forward unbacked", "forward no_region") for n in range(10)]
    assert "record 0, 0.000000 s, VP 3, gpa 0xff000: r-- of gfn 0xff" in found.text
    assert "2 more differences" in found.text


def test_answers_that_depend_on_time_are_counted_and_not_compared(replayed: Replay) -> None:
    drawn = small_state().intercept(GFN, Answer.KICKED).intercept(GFN, Answer.INVALIDATING)
    found = replayed(drawn.end())
    assert found.verdict["not_repeatable"] == {"kicked": 1, "invalidating": 1}
    assert found.verdict["compared"] == 0


def test_a_range_that_is_held_open_is_held_open_again(replayed: Replay) -> None:
    drawn = maps(small_state()).intercept(GFN, MAPPED)
    drawn.invalidation(Kind.INVALIDATION_BEGUN, PAGE, 8).record(Kind.GUEST_UNMAPPED, GFN, 8)
    drawn.intercept(GFN, Answer.INVALIDATING).invalidation(Kind.INVALIDATION_ENDED, PAGE, 8)
    maps(drawn).intercept(GFN, MAPPED)
    found = replayed(drawn.end())
    assert (found.verdict["equal"], found.differences) == (3, [])


def test_an_invalidation_that_was_open_in_a_state_cuts_what_a_fault_maps(
    replayed: Replay,
) -> None:
    drawn = maps(small_state(), GFN, 4).intercept(GFN, MAPPED)
    drawn.invalidation(Kind.INVALIDATION_ENDED, PAGE + 4, 4)
    maps(drawn, GFN + 4, 4).intercept(GFN + 4, MAPPED)
    assert replayed(drawn.end()).differences == []


def test_of_two_that_want_one_page_either_may_be_answered_first(replayed: Replay) -> None:
    drawn = maps(small_state()).intercept(GFN, ALREADY, vp_index=1).intercept(GFN + 1, MAPPED)
    found = replayed(drawn.end())
    assert (found.verdict["equal"], found.verdict["reordered"]) == (2, 2)
    drawn = maps(small_state()).intercept(GFN, MAPPED).intercept(GFN + 1, MAPPED)
    assert replayed(drawn.end()).differences == [(2, "resume mapped", "resume already_mapped")]


def test_an_intercept_is_sent_where_it_was_decided(replayed: Replay) -> None:
    drawn = maps(small_state()).intercept(GFN, MAPPED)
    drawn.invalidation(Kind.RANGE_INVALIDATED, PAGE, 8).record(Kind.GUEST_UNMAPPED, GFN, 8)
    drawn.intercept(GFN, ALREADY, vp_index=1, earlier=2)
    assert replayed(drawn.end()).differences == []


def test_a_state_is_made_exactly_as_it_was(replayed: Replay) -> None:
    """Pieces of a region, and a pinned one that lost some of its memory, are what one fault would not map."""
    host = [("host", PFN + n) for n in range(32)]
    drawn = Drawn().state(
        [
            region(GFN, 8, PAGE),
            region(GFN + 16, 4, PAGE + 16, "pinned", "dangling"),
            region(GFN + 32, 8, PAGE, "movable"),
        ],
        [vma(PAGE, 8, PFN), vma(PAGE + 16, 2, PFN + 16)],
        [
            mapping(GFN + 2, 2, PAGE + 2, host[2]),
            mapping(GFN + 16, 1, PAGE + 16, host[16]),
            mapping(GFN + 37, 1, PAGE + 5, host[5]),
        ],
    )
    drawn.intercept(GFN + 2, ALREADY).intercept(GFN + 3, ALREADY).intercept(GFN + 16, ALREADY)
    drawn.intercept(GFN + 17, Answer.UNBACKED).intercept(GFN + 18, Answer.UNBACKED)
    drawn.intercept(GFN + 37, ALREADY)
    maps(drawn, GFN, 2)
    drawn.intercept(GFN, MAPPED)
    drawn.record(Kind.GUEST_MAPPED, GFN + 32, 5, PAGE, PFN, 1, detail=3).intercept(GFN + 32, MAPPED)
    found = replayed(drawn.end())
    assert (found.verdict["equal"], found.differences) == (8, [])


def test_a_pinned_region_is_added_when_it_is_whole(replayed: Replay) -> None:
    drawn = Drawn().state([], [vma(PAGE, 4, PFN), vma(PAGE + 4, 4, PFN + 64)])
    drawn.record(Kind.REGION_ADDED, GFN, 8, PAGE, 3, detail=2).intercept(GFN, Answer.PERMISSION)
    drawn = maps(maps(drawn, GFN, 4).intercept(0, Answer.NO_REGION), GFN + 4, 4)
    drawn.intercept(GFN + 7, ALREADY)
    found = replayed(drawn.end())
    assert found.verdict["not_repeatable"] == {"region being added": 1}
    assert (found.verdict["equal"], found.differences) == (2, [])


def test_a_request_that_is_refused_now_is_a_difference(replayed: Replay) -> None:
    drawn = small_state().record(Kind.VMA_MAPPED, PAGE + 7, 2, 1, detail=3)
    found = replayed(drawn.end())
    assert [(record, recorded) for record, recorded, _ in found.differences] == [(0, "carried out")]
    assert "overlaps" in found.differences[0][2]


def test_after_a_gap_and_a_restart_the_next_state_holds(replayed: Replay) -> None:
    drawn = maps(small_state()).intercept(GFN, MAPPED)
    drawn.chunk(Gap(2, 5))
    drawn.count = 7
    drawn.intercept(GFN, Answer.NO_REGION)
    drawn.state([region(GFN, 8, PAGE)]).intercept(GFN, Answer.UNBACKED)
    drawn.chunk(Gap(9, None)).state().intercept(GFN, Answer.NO_REGION)
    verdict = replayed(drawn.end()).verdict
    assert (verdict["states"], verdict["gaps"], verdict["unplaced"]) == (3, 2, 1)
    assert (verdict["compared"], verdict["equal"]) == (3, 3)


def test_what_happens_while_a_state_is_read_belongs_to_it(replayed: Replay) -> None:
    """The lists may have its effect already, and some of it may be stored behind them."""
    drawn = Drawn().chunk(StateBegins(0)).record(Kind.VMA_MAPPED, PAGE, 4, PFN, detail=3)
    drawn.chunk(Vmas([vma(PAGE, 4, PFN), vma(PAGE + 4, 4, PFN + 4)]), StateEnds(2))
    drawn.record(Kind.VMA_MAPPED, PAGE + 4, 4, PFN + 4, detail=3)
    drawn.record(Kind.REGION_ADDED, GFN, 8, PAGE, 3, detail=0)
    maps(drawn, GFN, 4).intercept(GFN, MAPPED)
    found = replayed(drawn.end())
    assert (found.verdict["equal"], found.differences) == (1, [])


# ---------------------------------------------------------------- live memory


def live() -> Drawn:
    return Drawn(address_space="process").state([region(GFN, 8, PAGE, "movable")])


def backed(drawn: Drawn, first: int, count: int, page: int, backing: int = 7) -> Drawn:
    """A fault that found it, and mapped it."""
    drawn.record(Kind.BACKED, PAGE + first, count, page, backing, detail=3)
    drawn.record(Kind.GUEST_MAPPED, GFN + first, count, PAGE + first, page, backing, detail=3)
    return drawn.intercept(GFN + first, MAPPED)


def test_live_memory_is_learned_and_forgotten(replayed: Replay) -> None:
    drawn = backed(live().intercept(GFN, Answer.UNBACKED), 0, 8, 50).intercept(GFN + 1, ALREADY)
    drawn.invalidation(Kind.RANGE_INVALIDATED, PAGE, 8, "userfaultfd")
    drawn.record(Kind.GUEST_UNMAPPED, GFN, 8).intercept(GFN, Answer.UNBACKED)
    found = replayed(backed(drawn, 0, 4, 90).end())
    assert (found.verdict["equal"], found.differences) == (5, [])


def test_memory_that_changed_though_nothing_was_invalidated_is_a_difference(replayed: Replay) -> None:
    drawn = backed(live(), 0, 4, 50).record(Kind.BACKED, PAGE, 8, 60, 7, detail=3)
    found = replayed(drawn.end())
    assert found.differences == [
        (3, "page 0x3c of backing 0x7, rw-", "page 0x32 of backing 0x7, rw-, since record 0")
    ]
    drawn.invalidation(Kind.RANGE_INVALIDATED, PAGE, 1, "userfaultfd")
    found = replayed(drawn.end())
    assert (found.verdict["told_late"], found.differences) == (1, [])


def test_what_the_guest_reaches_of_live_memory_is_made_as_it_was(replayed: Replay) -> None:
    """A fault maps as much as the kernel says is one VMA, which may be more than what is known."""
    drawn = backed(backed(live(), 0, 2, 50), 4, 2, 54)
    drawn.invalidation(Kind.RANGE_INVALIDATED, PAGE + 1, 1).record(Kind.GUEST_UNMAPPED, GFN + 1, 1)
    drawn.record(Kind.BACKED, PAGE, 8, 50, 7, detail=3)
    for first, count in ((1, 3), (6, 2)):
        drawn.record(Kind.GUEST_MAPPED, GFN + first, count, PAGE + first, 50 + first, 7, detail=3)
    drawn.intercept(GFN + 3, MAPPED).intercept(GFN + 7, ALREADY).intercept(GFN + 1, ALREADY)
    assert replayed(drawn.end()).differences == []


# ---------------------------------------------------------------- files


def foreign(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    def file(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    real = (REAL / "guest.rec").read_bytes()
    yield tmp_path / "missing", "No such file"
    yield file("empty", b""), "the file is empty"
    yield file("elf", Path(sys.executable).read_bytes()[:100_000]), "this is not a recording"
    yield file("text", b"hello, world\n"), "this is not a recording"
    header, chunks = recordings.read(real)
    yield file("cut", recordings.written(header, chunks[:-1])), "the end is missing"
    yield file("torn", real[:-1]), "the file ends within a chunk"
    yield file("damaged", recordings.written(header, chunks[:9]) + b"\xc1"), "damaged"
    yield file("more", real + real), "something follows the end"
    yield file("architecture", Drawn(architecture="vax\x1b[2J").end()), r"'vax\x1b[2J'"
    yield file("kind", Drawn().state([region(GFN, 1, PAGE, "\x1b[2Jodd")]).end()), r"'\x1b[2Jodd'"
    yield file("range", Drawn().state([region(2**63, 2**63, PAGE)]).end()), "what cannot be"
    wrapping = Drawn().state().record(Kind.VMA_MAPPED, 2**64 - 1, 2**64 - 1, 2**64 - 1)
    yield file("wrapping", wrapping.end()), "record 0 says what cannot be"
    everything = Drawn().state().invalidation(Kind.INVALIDATION_BEGUN, 0, 2**52)
    yield file("everything", everything.end()), "what cannot be: invalidate_begin"
    already = Drawn().state().invalidation(Kind.INVALIDATION_ENDED, 0, 2**52)
    yield file("already", already.end()), "what cannot be: invalidate_begin"
    huge = Drawn().state().record(Kind.REGION_ADDED, 1, 2, 3, 4, detail=77)
    yield file("word", huge.end()), "number 77 for one of 3 words"


def test_a_file_that_is_no_whole_recording_is_refused_in_one_sentence(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    for path, why in foreign(tmp_path):
        result = run(path, "--vmm-socket", daemon.socket)
        assert (result.exit_code, result.exception.__class__) == (1, SystemExit), path
        assert why in result.output, (path, result.output)
        assert "\x1b" not in result.output
        assert len(result.output.splitlines()) == 1, result.output
    assert run(tmp_path).exit_code == 2
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDWR)
    assert "not a file on disk" in run(fifo).output
    os.close(held)


def test_names_from_a_recording_are_escaped(replayed: Replay) -> None:
    answers = (("resume\x1b[2J", "mapped"), ("resume", "later\x1b[2J"))
    drawn = Drawn(answers=answers).state()
    found = replayed(
        drawn.record(Kind.INTERCEPT, GFN, detail=0x100, vp_index=0)
        .record(Kind.INTERCEPT, GFN, detail=0x101)
        .end()
    )
    assert r"recorded: resume\x1b[2J mapped" in found.text
    assert r"not repeatable: later\x1b[2J 1" in found.text
    assert "\x1b" not in found.text


# ---------------------------------------------------------------- ends


def test_a_daemon_that_goes_away_is_status_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DaemonProcess(tmp_path) as daemon:
        daemon.wait_serving()
        chunks = 0

        def progress(_shown: object, _verdict: object) -> None:
            nonlocal chunks
            chunks += 1
            if chunks == 12:
                daemon.signal(signal.SIGKILL)
                daemon.wait_ended()

        monkeypatch.setattr("interceptctl.replay.command._Shown.show", progress)
        result = run(REAL / "declared.rec", "--vmm-socket", daemon.socket)
    assert result.exit_code == 3
    assert result.output.startswith("Error: ")


def test_ctrl_c_ends_the_private_daemon_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    chunks = 0

    def interrupt(_shown: object, _verdict: object) -> None:
        nonlocal chunks
        chunks += 1
        if chunks == 12:
            assert list(tmp_path.iterdir()), "the daemon's directory"
            raise KeyboardInterrupt

    monkeypatch.setattr("interceptctl.replay.command._Shown.show", interrupt)
    result = run(REAL / "declared.rec")
    assert (result.exit_code, result.output.split()) == (1, ["Aborted!"])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said(daemon: DaemonProcess) -> None:
    arguments = ["replay", str(REAL / "guest.rec"), "--vmm-socket", str(daemon.socket)]
    command = [sys.executable, "-m", "interceptctl", *arguments]
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "Error: standard output: No space left on device\n")


# ---------------------------------------------------------------- parts


def test_the_recorded_pace_is_kept_so_many_times_faster(autojump_clock: MockClock) -> None:  # noqa: ARG001
    async def waits() -> list[float]:
        pace, began = program._Pace(4), trio.current_time()
        times = []
        for time_ns in (5_000_000_000, 6_000_000_000, 9_000_000_000):
            await pace.wait(time_ns)
            times.append(trio.current_time() - began)
        return times

    assert trio.run(waits, clock=MockClock(autojump_threshold=0)) == pytest.approx([0, 0.25, 1])


def test_records_come_in_the_order_of_decisions_and_no_state_is_overtaken() -> None:
    drawn = Drawn().state().record(Kind.POLICY_SET).intercept(1, MAPPED).intercept(2, MAPPED, earlier=2)
    drawn.record(Kind.POLICY_SET).chunk(Gap(4, 0)).intercept(3, MAPPED, earlier=4)
    _, chunks = recordings.read(drawn.end())
    found = [what.number if isinstance(what, Traced) else type(what).__name__ for what in in_order(chunks)]
    assert found[:5] == ["StateBegins", "Regions", "Vmas", "Mappings", "StateEnds"]
    assert found[5:] == [2, 0, 1, 3, "Gap", "End", 4]


def test_a_page_map_agrees_with_a_list_of_pages() -> None:
    rng = random.Random(20)
    found: PageMap[Vma] = PageMap()
    pages: list[int | None] = [None] * 64

    def shown(items: Sequence[Vma]) -> list[tuple[int, int]]:
        return [
            (page, item.page + page - item.start) for item in items for page in range(item.start, item.end)
        ]

    for step in range(500):
        start = rng.randrange(63)
        end = rng.randint(start + 1, 64)
        if rng.random() < 0.6:
            found.put(Vma(start, end, step * 100, Access.READ, False))
            pages[start:end] = range(step * 100, step * 100 + end - start)
        else:
            found.carve(start, end)
            pages[start:end] = [None] * (end - start)
        assert shown(list(found)) == [(n, page) for n, page in enumerate(pages) if page is not None]
        assert shown(found.clipped(start, end)) == [
            (n, page) for n, page in enumerate(pages) if page is not None and start <= n < end
        ]
        empty = [n for first, behind in found.gaps(start, end) for n in range(first, behind)]
        assert empty == [n for n in range(start, end) if pages[n] is None]
        at = found.at(start)
        assert (None if at is None else at.page + start - at.start) == pages[start]
