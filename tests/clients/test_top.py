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

import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len
from rich.console import Console

from fakes.scripted_daemon import Hear, Refuse, ScriptedDaemon, Step, hello, replies
from intercept_protocol.errors import WireError
from intercept_protocol.messages import (
    Architecture,
    DaemonStatistics,
    MmioGranularity,
    PartitionInspection,
    PartitionList,
    PartitionStatistics,
    PartitionSummary,
)
from interceptctl.cli import main
from interceptctl.top.frame import BARS, frame, rate, sparkline
from interceptctl.top.rates import HISTORY, Counted, Rate, Rates, Sample


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


def second_of(*samples: Sample) -> Sequence[Rate]:
    rates = Rates()
    return [rates.take(taken) for taken in samples][-1]


def drawn(rates: Sequence[Rate], height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(frame(daemon(1000), rates, height))
    return capture.get().splitlines()


# ------------------------------------------------ rates


def test_a_rate_is_what_was_counted_by_the_daemons_own_time() -> None:
    (line,) = second_of(sample(1000, summary(1, 100)), sample(3000, summary(1, 500)))
    assert (line.intercepts, line.invalidations) == (200.0, 20.0)
    assert line.outcomes == {"resume": 200.0, "retry": 0.0, "forward": 0.0, "fail": 0.0}


def test_a_partition_that_is_new_has_no_rate_yet() -> None:
    (line,) = second_of(sample(1000), sample(2000, summary(1, 500)))
    assert (line.intercepts, line.history) == (0.0, [0.0])


def test_the_busiest_partition_is_first() -> None:
    first, second = sample(0, summary(1), summary(2)), sample(1000, summary(1, 5), summary(2, 50))
    assert [line.summary.partition_id for line in second_of(first, second)] == [2, 1]


def test_the_history_is_short_and_ends_with_the_partition() -> None:
    samples = [sample(second * 1000, summary(1, second)) for second in range(HISTORY + 5)]
    (line,) = second_of(*samples)
    assert line.history == [1.0] * HISTORY
    (again,) = second_of(*samples, sample(99_000), sample(100_000, summary(1, 99)))
    assert again.history == [0.0]


def test_no_time_between_two_samples_is_no_rate() -> None:
    (line,) = second_of(sample(1000, summary(1, 1)), sample(1000, summary(1, 9)))
    assert line.intercepts == 0.0


# ------------------------------------------------ the frame


def test_a_frame_of_many_partitions_fits_80_columns_and_24_lines() -> None:
    huge = [summary(10**6 + number, 10**12 * number, "名" * 64) for number in range(60)]
    lines = drawn(
        second_of(sample(0), sample(1, *huge), sample(2, *(summary(10**6 + n, 10**15) for n in range(60)))),
        24,
    )
    assert (len(lines) <= 24, max(map(cell_len, lines)) <= 80) == (True, True)
    assert lines[-1] == "and 41 more, with less to do"
    assert "1000000" in "".join(lines)


def test_a_name_that_would_steer_the_terminal_is_shown_escaped() -> None:
    text = "\n".join(drawn(second_of(sample(0, summary(1, 0, "\x1b[2J"))), 24))
    assert (r"\x1b[2J" in text, "\x1b" in text) == (True, False)


def test_no_partitions_are_said_to_be_none() -> None:
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
    assert result.stdout.splitlines()[-1].split() == [
        *("1", "guest", "4", "512", "250", "250", "0", "0", "0", "25", "▁█")
    ]


def test_top_once_json_has_the_rates_by_outcome(socket_path: Path) -> None:
    steps = asked(1000, 100) + asked(2000, 350)
    result = run(socket_path, steps, "top", "--once", "--interval", "0.1", "--json")
    (line,) = json.loads(result.stdout)["partitions"]
    assert (line["summary"]["partition_id"], line["outcomes"]["resume"]) == (1, 250.0)


def test_another_refusal_than_an_ended_partition_is_told(socket_path: Path) -> None:
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
            command, stdout=terminal, stderr=subprocess.PIPE, env=dumb, timeout=20, check=False
        )
    assert (ended.returncode, b"--once" in ended.stderr) == (2, True)


def test_health_of_a_daemon_that_answers_is_0(socket_path: Path) -> None:
    result = run(socket_path, replies(daemon(1)), "health")
    assert (result.exit_code, result.stdout) == (0, "serving 1 partitions, 4 VPs\n")


def test_health_of_a_daemon_that_is_not_there_is_3(socket_path: Path) -> None:
    assert CliRunner().invoke(main, ["--socket", str(socket_path), "health"]).exit_code == 3


def test_top_on_a_terminal_shows_a_frame_and_ends_when_interrupted(socket_path: Path) -> None:
    ours, theirs = pty.openpty()
    steps = [*hello(), *asked(1000, 100)]
    command = [sys.executable, "-m", "interceptctl", "--socket", str(socket_path), "top", "--interval", "60"]
    with open(ours, "rb", buffering=0) as screen, ScriptedDaemon(socket_path, (steps,)):
        process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"}
        )
        os.close(theirs)
        seen = b""
        while b"INT/s WAS" not in seen:
            seen += screen.read(4096)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # EIO: the other end is closed
            while more := screen.read(4096):
                seen += more
        assert process.wait(20) == 0
    assert seen.index(b"\x1b[?1049h") < seen.index(b"\x1b[?1049l")  # its own screen, and back
    assert seen.rindex(b"\x1b[?25l") < seen.rindex(b"\x1b[?25h")  # the cursor is there again
    assert b"Traceback" not in seen
