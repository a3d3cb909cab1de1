"""`interceptctl top` and `health`: rates from two samples, in 80 columns."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len
from rich.console import Console

from fakes.eventually import PATIENCE
from fakes.scripted_daemon import HangUp, Hear, Look, Refuse, ScriptedDaemon, Step, hello, replies
from intercept_protocol.errors import WireError
from intercept_protocol.messages import (
    LATENCY_BUCKETS,
    Architecture,
    DaemonStatistics,
    HistogramPage,
    MmioGranularity,
    PartitionInspection,
    PartitionList,
    PartitionStatistics,
    PartitionSummary,
    VpHistogram,
)
from interceptctl import units
from interceptctl.cli import main
from interceptctl.quantiles import Quantiles, quantiles
from interceptctl.top.frame import BARS, frame, rate, sparkline, vp_frame
from interceptctl.top.rates import HISTORY, Counted, Rate, Rates, Sample, Sort, VpCounted, in_order


def summary(number: int, intercepts: int = 0, name: str = "guest") -> PartitionSummary:
    return PartitionSummary(
        partition_id=number, name=name, uid=1, pid=2, address_space="declared", hypervisor="software",
        vps=4, regions=1, mapped_gfns=512, intercepts=intercepts, invalidations=intercepts // 10, age_ms=1,
    )  # fmt: skip


def daemon(uptime_ms: int) -> DaemonStatistics:
    return DaemonStatistics(
        uptime_ms=uptime_ms, partitions=1, vps=4, connections=9, connections_without_hello=0, tasks=9,
        partitions_created=1, partitions_lost=0, connections_refused=0, intercepts={}, invalidations=0,
    )  # fmt: skip


def sample(uptime_ms: int, *summaries: PartitionSummary) -> Sample:
    counted = {
        item.partition_id: Counted(item, {"resume": {"mapped": item.intercepts - 1}, "fail": {"x": 1}})
        for item in summaries
    }
    return Sample(daemon(uptime_ms), counted)


def inspection(number: int, intercepts: int) -> PartitionInspection:
    statistics = PartitionStatistics(
        regions=1, vmas=1, vps=4, open_invalidations=0, mapped_gfns=512, no_access_gfns=0, slat_extents=1,
        map_calls=1, unmap_calls=0, deposits=0, invalidations=0, stale_attempts=0,
        intercepts={"resume": {"mapped": intercepts}},
    )  # fmt: skip
    return PartitionInspection(
        summary=summary(number, intercepts),
        architecture=Architecture.X86_64,
        mmio_granularity=MmioGranularity.VMA,
        statistics=statistics,
        regions=[],
        virtual_processors=[],
    )


def second_of(*samples: Sample, sort: Sort = Sort.RATE) -> Sequence[Rate]:
    rates = Rates()
    return in_order([rates.take(taken) for taken in samples][-1], sort)


def drawn(rates: Sequence[Rate], height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(frame(daemon(1000), rates, height))
    return capture.get().splitlines()


# ------------------------------------------------ rates


def test_a_rate_uses_the_time_of_the_daemon() -> None:
    (line,) = second_of(sample(1000, summary(1, 100)), sample(3000, summary(1, 500)))
    assert (line.intercepts, line.invalidations) == (200.0, 20.0)
    assert line.outcomes == {"resume": 200.0, "retry": 0.0, "forward": 0.0, "fail": 0.0}


def test_a_partition_that_is_new_has_no_rate_yet() -> None:
    (line,) = second_of(sample(1000), sample(2000, summary(1, 500)))
    assert (line.intercepts, line.history) == (0.0, [0.0])


def test_the_summary_says_how_much_is_restored_per_second() -> None:
    def counted(pages: int | None) -> Counted:
        return Counted(summary(1), {}, pages)

    first, second = (Sample(daemon(at), {1: counted(at)}) for at in (1000, 3000))
    (line,) = second_of(first, second)
    assert line.restored_pages == 1000
    assert drawn([line], 10)[1] == "per second: 0 intercepts, 0 invalidations, 3.906 MiB restored"
    (other,) = second_of(sample(1000, summary(1)), sample(2000, summary(1)))
    assert "restored" not in drawn([other], 10)[1]


def test_the_busiest_partition_is_first() -> None:
    first, second = sample(0, summary(1), summary(2)), sample(1000, summary(1, 5), summary(2, 50))
    assert [line.summary.partition_id for line in second_of(first, second)] == [2, 1]


def test_the_history_is_short_and_ends_with_the_partition() -> None:
    samples = [sample(second * 1000, summary(1, second)) for second in range(HISTORY + 5)]
    (line,) = second_of(*samples)
    assert line.history == [1.0] * HISTORY
    (again,) = second_of(*samples, sample(99_000), sample(100_000, summary(1, 99)))
    assert again.history == [0.0]


def test_a_frame_counts_the_partitions_that_are_not_watched() -> None:
    silent = [
        msgspec.structs.replace(summary(number), address_space="process", watch=watch)
        for number, watch in enumerate(("none", "unattached", "promised", "userfaultfd"), start=1)
    ]
    _, doing, *_ = drawn(second_of(sample(1000, *silent), sample(2000, *silent)), 24)
    assert doing == "per second: 0 intercepts, 0 invalidations; 2 not watched"
    _, doing, *_ = drawn(second_of(sample(1000, *silent[2:]), sample(2000, *silent[2:])), 24)
    assert doing == "per second: 0 intercepts, 0 invalidations"


def test_samples_without_time_between_have_rate_zero() -> None:
    (line,) = second_of(sample(1000, summary(1, 1)), sample(1000, summary(1, 9)))
    assert line.intercepts == 0.0


def buckets(**counts: int) -> tuple[int, ...]:
    """Counts by bucket: b0 is below 2 us, b1 below 4 us, and so on."""
    return tuple(counts.get(f"b{bucket}", 0) for bucket in range(LATENCY_BUCKETS))


@pytest.mark.parametrize(
    ("now", "half", "most"),
    [
        (buckets(), None, None),
        (buckets(b0=1), 2_000, 2_000),
        (buckets(b1=99, b9=1), 4_000, 4_000),
        (buckets(b1=98, b9=2), 4_000, 1_024_000),
        (buckets(b1=1, b2=1), 4_000, 8_000),
        (buckets(b23=1), 2**24 * 1000, 2**24 * 1000),
    ],
)
def test_a_quantile_is_the_upper_end_of_its_bucket(
    now: tuple[int, ...], half: int | None, most: int | None
) -> None:
    assert quantiles((), now) == Quantiles(half, most)


def test_a_quantile_covers_only_the_interval_between_samples() -> None:
    before, now = buckets(b0=1000, b5=1), buckets(b0=1000, b5=4)
    assert quantiles(before, now) == Quantiles(64_000, 64_000)


def test_a_daemon_that_was_replaced_and_counts_less_has_no_quantile() -> None:
    assert quantiles(buckets(b0=9), buckets(b0=3)) == Quantiles()


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (None, ""), (2_000, "2us"), (512_000, "512us"), (1_024_000, "1.0ms"), (16_384_000, "16ms"),
        (2**22 * 1000, "4.19s"), (2**24 * 1000, "16.8s"), (999_600, "1.0ms"),
    ],
)  # fmt: skip
def test_a_time_takes_five_characters_at_most(nanoseconds: int | None, text: str) -> None:
    assert units.latency(nanoseconds) == text


def test_quantiles_of_a_partition_are_of_the_last_interval() -> None:
    first = msgspec.structs.replace(summary(1, 10), latency=buckets(b0=10))
    second = msgspec.structs.replace(summary(1, 20), latency=buckets(b0=10, b4=10))
    (line,) = second_of(sample(1000, first), sample(2000, second))
    assert (line.at_once, line.waited) == (Quantiles(32_000, 32_000), Quantiles())


def test_intercepts_that_waited_are_excluded_from_answered_at_once() -> None:
    first = msgspec.structs.replace(summary(1, 10), latency=buckets(b0=5, b9=5), latency_waited=buckets(b9=5))
    second = msgspec.structs.replace(
        summary(1, 20), latency=buckets(b0=6, b9=5, b12=9), latency_waited=buckets(b9=5, b12=9)
    )
    (line,) = second_of(sample(1000, first), sample(2000, second))
    assert (line.at_once.p99_ns, line.waited.p50_ns) == (2_000, 2**13 * 1000)


def test_a_partition_that_is_new_has_no_quantiles_yet() -> None:
    now = msgspec.structs.replace(summary(1, 10), latency=buckets(b0=10))
    (line,) = second_of(sample(1000), sample(2000, now))
    assert (line.at_once, line.waited) == (Quantiles(), Quantiles())


def vp_sample(uptime_ms: int, *counts: int, each_ns: int = 3_000, waited: int = 0) -> Sample:
    """VPs 0, 1, ... of partition 1 that have answered so many intercepts of 2 to 4 us, and others that waited
    for a millisecond each."""
    vps = {
        (1, index): VpCounted(
            summary(1),
            VpHistogram(
                vp_index=index,
                intercepts=count + waited,
                total_ns=count * each_ns + waited * 1_000_000,
                buckets=buckets(b1=count, b9=waited),
                waited_ns=waited * 1_000_000,
                waited_buckets=buckets(b9=waited),
            ),
        )
        for index, count in enumerate(counts)
    }
    return Sample(daemon(uptime_ms), vps=vps)


def test_a_vps_line_has_its_rate_its_mean_and_its_quantiles() -> None:
    rates = Rates()
    rates.take_vps(vp_sample(1000, 10, 0))
    busy, idle = rates.take_vps(vp_sample(3000, 510, 0))
    assert (busy.vp_index, busy.intercepts, busy.mean_ns, busy.at_once.p99_ns) == (0, 250.0, 3000.0, 4000)
    assert (idle.intercepts, idle.mean_ns, idle.at_once) == (0.0, None, Quantiles())


def test_the_mean_of_a_vp_covers_intercepts_answered_at_once() -> None:
    rates = Rates()
    rates.take_vps(vp_sample(1000, 10))
    (line,) = rates.take_vps(vp_sample(2000, 110, waited=50))
    assert (line.intercepts, line.mean_ns, line.waited.p50_ns) == (150.0, 3000.0, 2**10 * 1000)


def test_lines_are_in_the_requested_order() -> None:
    def counted(number: int, intercepts: int, bucket: str) -> PartitionSummary:
        latency = buckets(**{bucket: intercepts})
        return msgspec.structs.replace(summary(number, intercepts), latency=latency)

    then = sample(0, *(counted(number, 0, "b0") for number in (3, 1, 2)))
    now = sample(1000, counted(3, 7, "b0"), counted(1, 5, "b9"), counted(2, 9, "b4"))
    orders = {
        sort.value: [line.summary.partition_id for line in second_of(then, now, sort=sort)] for sort in Sort
    }
    assert orders == {"rate": [2, 3, 1], "p99": [1, 2, 3], "retry": [1, 2, 3], "id": [1, 2, 3]}


def test_the_partition_with_most_retries_is_first_though_others_are_busier() -> None:
    def retried(uptime_ms: int, *retries: int) -> Sample:
        counted = {
            number: Counted(summary(number, 9), {"retry": {"contended": count}})
            for number, count in enumerate(retries, start=1)
        }
        return Sample(daemon(uptime_ms), counted)

    lines = second_of(retried(0, 8, 0), retried(1000, 9, 5), sort=Sort.RETRY)
    assert [(line.summary.partition_id, line.outcomes["retry"]) for line in lines] == [(2, 5.0), (1, 1.0)]


def test_a_rate_after_the_daemons_end_begins_at_0_however_long_the_successor_runs() -> None:
    rates = Rates()
    rates.take(sample(1000, summary(1, 100)))
    rates.forget()
    (partition,) = rates.take(sample(2000, summary(1, 350)))
    assert (partition.intercepts, partition.history) == (0.0, [0.0, 0.0])
    (partition,) = rates.take(sample(3000, summary(1, 370)))
    assert partition.intercepts == 20.0


# ------------------------------------------------ the frame


def test_a_frame_of_many_vps_fits_80_columns_and_24_lines() -> None:
    rates = Rates()
    rates.take_vps(vp_sample(0, *[0] * 256))
    lines = rates.take_vps(vp_sample(1, *[10**12] * 256, each_ns=10**9))
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(vp_frame(daemon(1000), lines, 24, Sort.P99))
    drawn_lines = capture.get().splitlines()
    assert (len(drawn_lines), max(map(cell_len, drawn_lines)) <= 80) == (24, True)
    assert drawn_lines[-2:] == ["and 239 more", "q quit  p partitions  s sort: p99"]


def test_a_frame_of_many_partitions_fits_80_columns_and_24_lines() -> None:
    huge = [summary(10**6 + number, 10**12 * number, "名" * 64) for number in range(60)]
    lines = drawn(
        second_of(sample(0), sample(1, *huge), sample(2, *(summary(10**6 + n, 10**15) for n in range(60)))),
        24,
    )
    assert (len(lines) <= 24, max(map(cell_len, lines)) <= 80) == (True, True)
    assert lines[-1] == "and 43 more"
    assert "1000000" in "".join(lines)


def test_a_name_that_would_steer_the_terminal_is_shown_escaped() -> None:
    text = "\n".join(drawn(second_of(sample(0, summary(1, 0, "\x1b[2J"))), 24))
    assert (r"\x1b[2J" in text, "\x1b" in text) == (True, False)


def test_without_partitions_the_frame_says_so() -> None:
    assert drawn([], 24)[-1] == "no partitions"


@pytest.mark.parametrize(
    ("history", "bars"), [([], ""), ([0, 0], "▁▁"), ([0, 7], "▁█"), ([1, 2, 3, 4, 5, 6, 7], BARS[1:])]
)
def test_a_sparkline_is_scaled_to_its_highest(history: list[float], bars: str) -> None:
    assert sparkline(history) == bars


@pytest.mark.parametrize(("value", "shown"), [(0, "0"), (0.25, "0.25"), (9.96, "10"), (1234567, "1234k")])
def test_a_rate_takes_six_characters_at_most(value: float, shown: str) -> None:
    assert rate(value) == shown


# ------------------------------------------------ the commands


def run(path: Path, steps: list[Step], *arguments: str) -> Result:
    with ScriptedDaemon(path, ([*hello(), *steps],)):
        return CliRunner().invoke(main, ["--socket", str(path), *arguments])


def asked(uptime_ms: int, intercepts: int) -> list[Step]:
    """What one sample asks for, with partition 1 that counts and partition 2 that ends in between."""
    listed = PartitionList(partitions=[summary(1, intercepts), summary(2)], more=False)
    return [
        *replies(daemon(uptime_ms), listed, inspection(1, intercepts)),
        Hear(),
        Refuse(WireError(errno.ENOENT, "no partition 2")),
    ]


def test_top_once_prints_the_rates_of_one_interval(socket_path: Path) -> None:
    steps = asked(1000, 100) + asked(2000, 350)
    result = run(socket_path, steps, "top", "--once", "--interval", "0.1")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1] == "per second: 250 intercepts, 25 invalidations"
    assert result.stdout.splitlines()[-1].split() == [*("1", "guest", "4", "250", "0", "0", "0", "▁█")]


def test_top_once_json_has_the_rates_by_outcome(socket_path: Path) -> None:
    steps = asked(1000, 100) + asked(2000, 350)
    result = run(socket_path, steps, "top", "--once", "--interval", "0.1", "--json")
    (line,) = json.loads(result.stdout)["partitions"]
    assert (line["summary"]["partition_id"], line["outcomes"]["resume"]) == (1, 250.0)


def asked_of_vps(uptime_ms: int, intercepts: int) -> list[Step]:
    """What one sample of VPs asks for: two pages of partition 1, and partition 2 that ends in between."""
    listed = PartitionList(partitions=[summary(1), summary(2)], more=False)
    histograms = [
        VpHistogram(vp_index=index, intercepts=intercepts, total_ns=9, buckets=buckets(b3=intercepts))
        for index in (0, 5)
    ]
    pages = [
        HistogramPage(boundaries_ns=(2000,), virtual_processors=[histogram], more=histogram.vp_index == 0)
        for histogram in histograms
    ]
    return [
        *replies(daemon(uptime_ms), listed, *pages),
        Hear(),
        Refuse(WireError(errno.ENOENT, "no partition 2")),
    ]


def test_top_of_vps_fetches_every_page_and_prints_one_line_per_vp(socket_path: Path) -> None:
    steps = asked_of_vps(1000, 100) + asked_of_vps(2000, 350)
    result = run(socket_path, steps, "top", "--vps", "--once", "--interval", "0.1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.split() for line in result.stdout.splitlines()[-2:]] == [
        ["1", "guest", "0", "250", "0us", "16us", "16us", "▁█"],
        ["1", "guest", "5", "250", "0us", "16us", "16us", "▁█"],
    ]


def test_top_of_vps_json_has_them_by_name(socket_path: Path) -> None:
    steps = asked_of_vps(1000, 100) + asked_of_vps(2000, 350)
    result = run(socket_path, steps, "top", "--vps", "--once", "--interval", "0.1", "--json")
    lines = json.loads(result.stdout)["virtual_processors"]
    assert [(line["vp_index"], line["at_once"]["p99_ns"]) for line in lines] == [(0, 16_000), (5, 16_000)]


def test_a_refusal_other_than_an_ended_partition_is_reported(socket_path: Path) -> None:
    listed = PartitionList(partitions=[summary(2)], more=False)
    steps = [*replies(daemon(1), listed), Hear(), Refuse(WireError(errno.EIO, "broken"))]
    result = run(socket_path, steps, "top", "--once", "--interval", "0.1")
    assert (result.exit_code, "broken" in result.stderr) == (1, True)


@pytest.mark.parametrize("arguments", [["top"], ["top", "--json"]])
def test_top_without_a_terminal_needs_once(socket_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["--socket", str(socket_path), *arguments])
    assert (result.exit_code, "--once" in result.stderr) == (2, True)


def test_top_on_a_terminal_that_cannot_move_its_cursor_needs_once(socket_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "interceptctl", "--socket", str(socket_path), "top"]
    dumb = os.environ | {"TERM": "dumb"}
    with open(ours, "rb"), open(theirs, "wb") as terminal:
        ended = subprocess.run(
            command, stdout=terminal, stderr=subprocess.PIPE, env=dumb, timeout=PATIENCE, check=False
        )
    assert (ended.returncode, b"--once" in ended.stderr) == (2, True)


def test_health_of_a_daemon_that_answers_is_0(socket_path: Path) -> None:
    result = run(socket_path, replies(daemon(1)), "health")
    assert (result.exit_code, result.stdout) == (0, "serving 1 partition, 4 VPs\n")


def test_health_of_a_daemon_that_is_not_there_is_3(socket_path: Path) -> None:
    assert CliRunner().invoke(main, ["--socket", str(socket_path), "health"]).exit_code == 3


class Terminal:
    """`interceptctl top` in a terminal, and what it showed until now."""

    def __init__(self, socket_path: Path) -> None:
        ours, theirs = pty.openpty()
        self._descriptor = ours
        self.process = subprocess.Popen(
            [sys.executable, "-m", "interceptctl", "--socket", str(socket_path), "top", "--interval", "60"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        )
        os.close(theirs)
        self.seen = b""

    def wait_shown(self, text: bytes) -> None:
        while text not in self.seen:
            self.seen += os.read(self._descriptor, 4096)

    def press(self, key: bytes) -> None:
        os.write(self._descriptor, key)

    def wait_ended(self) -> int:
        with suppress(OSError):  # EIO: the other end is closed
            while more := os.read(self._descriptor, 4096):
                self.seen += more
        os.close(self._descriptor)
        return self.process.wait(20)


def test_keys_switch_the_view_sort_and_quit(socket_path: Path) -> None:
    steps = [*hello(), *asked(1000, 100), *asked_of_vps(1100, 5), *asked(1200, 120)]
    with ScriptedDaemon(socket_path, (steps,)):
        terminal = Terminal(socket_path)
        terminal.wait_shown(b"sort: rate")
        terminal.press(b"s")
        terminal.wait_shown(b"sort: p99")
        terminal.press(b"v")
        terminal.wait_shown(b"MEAN")
        terminal.seen = b""
        terminal.press(b"p")
        terminal.wait_shown(b"FORWARD")
        terminal.press(b"q")
        assert terminal.wait_ended() == 0
    assert b"Traceback" not in terminal.seen


def test_top_goes_on_with_the_successor_whose_rates_begin_anew(socket_path: Path) -> None:
    before: list[Step] = [*hello(), *asked(1000, 100), HangUp()]
    after = [*hello(), *asked_of_vps(1900, 5), *asked(2000, 350)]
    with ScriptedDaemon(socket_path, (before, after)):
        terminal = Terminal(socket_path)
        terminal.wait_shown(b"TREND")
        terminal.press(b"v")
        terminal.wait_shown(b"daemon went away, waiting")
        terminal.wait_shown(b"MEAN")
        terminal.seen = b""
        terminal.press(b"p")
        terminal.wait_shown(b"FORWARD")
        terminal.press(b"q")
        assert terminal.wait_ended() == 0
    assert b"per second: 0 intercepts" in terminal.seen


def test_q_ends_top_while_there_is_no_daemon(socket_path: Path) -> None:
    steps: list[Step] = [*hello(), *asked(1000, 100), Look(socket_path.unlink), HangUp()]
    with ScriptedDaemon(socket_path, (steps,)):
        terminal = Terminal(socket_path)
        terminal.wait_shown(b"TREND")
        terminal.press(b"v")
        terminal.wait_shown(b"daemon went away, waiting")
        terminal.press(b"q")
        assert terminal.wait_ended() == 0
    assert terminal.seen.rindex(b"\x1b[?25l") < terminal.seen.rindex(b"\x1b[?25h")


def test_top_on_a_terminal_shows_a_frame_and_ends_when_interrupted(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, ([*hello(), *asked(1000, 100)],)):
        terminal = Terminal(socket_path)
        terminal.wait_shown(b"TREND")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.wait_ended() == 0
    seen = terminal.seen
    assert seen.index(b"\x1b[?1049h") < seen.index(b"\x1b[?1049l")  # its own screen, and back
    assert seen.rindex(b"\x1b[?25l") < seen.rindex(b"\x1b[?25h")  # the cursor is there again
    assert b"Traceback" not in seen
