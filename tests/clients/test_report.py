"""`interceptctl report`: what it reads from a recording, and the files that it writes."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent

from fakes.recordings import Drawn
from intercept_protocol.outcomes import Answer
from intercept_protocol.recording import RecordingReader
from intercept_protocol.trace import ANSWERS, Kind
from interceptctl.cli import main
from interceptctl.report import command
from interceptctl.report.gfn_axis import GfnAxis
from interceptctl.report.history import Box, History
from interceptctl.report.history_reader import history_of
from interceptctl.report.shares import mapped_shares

STEP = 1000
"""ns between two records."""
HOSTILE = "</script><script>document.title='taken'</script><b>\x1b[2J%{x}"


def history(recording: Drawn) -> History:
    reader = RecordingReader()
    chunks = list(reader.feed(recording.end()))
    assert reader.header is not None
    return history_of(reader.header, chunks)


def report(tmp_path: Path, stored: bytes, *options: str) -> Result:
    file = tmp_path / "guest.rec"
    file.write_bytes(stored)
    return CliRunner().invoke(main, ["report", str(file), *options])


def page(tmp_path: Path, stored: bytes, *options: str) -> str:
    out = tmp_path / "report.html"
    result = report(tmp_path, stored, "-o", str(out), *options)
    assert result.exit_code == 0, result.output
    return out.read_text()


def figures(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def perfetto(tmp_path: Path, stored: bytes) -> Trace:
    out = tmp_path / "guest.perfetto"
    result = report(tmp_path, stored, "--perfetto", str(out))
    assert result.exit_code == 0, result.output
    trace = Trace()
    trace.ParseFromString(out.read_bytes())
    return trace


def busy() -> Drawn:
    """Some of everything that is drawn."""
    return (
        Drawn()
        .region_added(0x100, 16, 0x7000)
        .mapped(0x100, 4)
        .intercept(0x102, Answer.MAPPED, vp_index=1)
        .intercept(0x900, Answer.NO_REGION, total_ns=500)
        .intercept(None, Answer.NOT_MEMORY)
        .invalidation(Kind.INVALIDATION_BEGUN, 0x7001, 2)
        .unmapped(0x101, 2)
        .record(Kind.INVALIDATION_SERVED, STEP)
        .invalidation(Kind.INVALIDATION_ENDED, 0x7001, 2)
        .intercept(0x102, Answer.MAPPED, vp_index=1)
    )


# ------------------------------------------------ what held from when to when


def test_a_mapping_is_a_box_until_it_goes_and_its_rest_goes_on() -> None:
    found = history(Drawn().mapped(0x10, 4).unmapped(0x11, 1).intercept(0x10, Answer.MAPPED))
    assert sorted(found.mapped) == [
        Box(0x10, 0x11, 0, 2 * STEP, ""),
        Box(0x11, 0x12, 0, STEP, ""),
        Box(0x12, 0x14, 0, 2 * STEP, ""),
    ]


def test_an_invalidation_lasts_from_begin_to_end_at_the_gfns_of_every_region_that_has_its_pages() -> None:
    found = history(
        Drawn()
        .region_added(0x100, 16, 0x7000)
        .region_added(0x800, 2, 0x7004)
        .invalidation(Kind.INVALIDATION_BEGUN, 0x7003, 2)
        .intercept(0x103, Answer.INVALIDATING)
        .invalidation(Kind.INVALIDATION_ENDED, 0x7003, 2)
        .invalidation(Kind.RANGE_INVALIDATED, 0x9000, 1, "userfaultfd")
    )
    drawn = [(each.since, each.until, each.source, set(each.gfns)) for each in found.invalidations]
    assert drawn == [
        (2 * STEP, 4 * STEP, "notifier", {(0x103, 0x105), (0x800, 0x801)}),
        (5 * STEP, 5 * STEP, "userfaultfd", set()),
    ]


def test_nothing_is_known_behind_a_gap_until_the_state_is_there() -> None:
    found = history(
        Drawn().mapped(0x10, 4).intercept(0x10, Answer.MAPPED).gap(5).intercept(0x10, Answer.MAPPED)
    )
    assert found.mapped == [Box(0x10, 0x14, 0, STEP, "")]
    assert [(hole.number, hole.lost, hole.since, hole.until) for hole in found.holes] == [
        (2, 5, STEP, 7 * STEP)
    ]
    assert found.intercepts.number.tolist() == [1, 7]


def test_the_grid_has_the_share_that_is_mapped_in_each_cell() -> None:
    found = history(
        Drawn().record(Kind.VP_ATTACHED).mapped(0x10, 3).unmapped(0x11, 1).record(Kind.VP_ATTACHED)
    )
    shares = mapped_shares(found, GfnAxis(found))
    assert shares is not None
    pages_ns = sum((box.end - box.start) * (box.until - box.since) for box in found.mapped)
    assert float(shares.share.sum()) * shares.width * shares.height == pytest.approx(pages_ns, rel=1e-5)
    assert shares.share[0, -1] == shares.share[2, -1] == 1
    assert shares.share[1, -1] == shares.share[0, 0] == 0


def test_the_axis_leaves_out_what_is_empty_and_keeps_distances_elsewhere() -> None:
    axis = GfnAxis(
        history(
            Drawn()
            .region_added(0, 1024, 0)
            .intercept(2**40, Answer.MAPPED)
            .intercept(2**40 + 1, Answer.MAPPED)
        )
    )
    places = axis.place(np.array([0.0, 1023.0, 2.0**40, 2.0**40 + 1]))
    assert places[:2].tolist() == [0, 1023]
    assert places[3] - places[2] == 1
    assert 1024 < places[2] < 1100


# ------------------------------------------------ the page


def test_the_page_has_a_point_for_every_intercept_and_loads_nothing(tmp_path: Path) -> None:
    text = page(tmp_path, busy().end())
    traces = [trace for trace in figures(text)["timeline"]["data"] if trace.get("meta") == "intercepts"]
    named = Counter[str]()
    for trace in traces:
        named[trace["name"]] += int(trace["customdata"]["shape"].split(",")[0])
    assert named == {"resume mapped": 2, "forward no_region": 1, "forward not_memory": 1}
    assert "default-src 'none'" in text
    assert not re.search(r"""<(script|link|img|iframe)[^>]*\b(src|href)=""", text)


def test_text_of_a_recording_is_shown_and_never_read_as_html(tmp_path: Path) -> None:
    answers = ((HOSTILE, HOSTILE), *ANSWERS[1:])
    text = page(
        tmp_path, Drawn(name=HOSTILE, answers=answers, daemon=HOSTILE).intercept(1, Answer.MAPPED).end()
    )
    assert text.count("</script>") == 3
    assert "<b>" not in text.split("<script", 1)[0]
    (trace,) = (each for each in figures(text)["timeline"]["data"] if each.get("meta") == "intercepts")
    assert not set("<>%") & set(trace["name"])


def test_gaps_are_listed_and_a_recording_without_any_says_so(tmp_path: Path) -> None:
    assert "No record is missing." in page(tmp_path, busy().end())
    text = page(
        tmp_path, busy().gap(1234).intercept(1, Answer.MAPPED).gap(None).intercept(1, Answer.MAPPED).end()
    )
    assert "<td>1,234</td>" in text
    assert "unknown: another daemon took over" in text


def test_of_a_restored_guest_it_says_what_came_in_and_for_what(tmp_path: Path) -> None:
    recording = Drawn(address_space="image", hypervisor="userfaultfd")
    recording.mapped(0, 64, "image").intercept(3, Answer.MAPPED)
    recording.mapped(512, 256, "image")
    recording.mapped(64, 2, "zero").mapped(66, 62, "image").intercept(65, Answer.CONTENDED)
    recording.intercept(65, Answer.MAPPED).intercept(65, Answer.ALREADY_MAPPED)
    told = json.loads(report(tmp_path, recording.end(), "--json").output)
    assert told["restore"] == {
        "image_pages": 64 + 256 + 62,
        "zero_pages": 2,
        "touched_pages": 2,
        "first_fault_ns": STEP,
        "quiet_ns": 6 * STEP,
    }
    text = page(tmp_path, recording.end())
    assert "<dt>from the image</dt><dd>1.492 MiB</dd>" in text
    assert "<dt>zero, given back before</dt><dd>8 KiB</dd>" in text
    assert "<dt>touched</dt><dd>2 pages</dd>" in text


def test_of_another_guest_it_says_nothing_of_an_image(tmp_path: Path) -> None:
    assert json.loads(report(tmp_path, busy().end(), "--json").output)["restore"] is None
    assert "from the image" not in page(tmp_path, busy().end())


def test_a_recording_of_nothing_is_a_page_too(tmp_path: Path) -> None:
    assert "<td>total</td>" in page(tmp_path, Drawn().end())


def test_the_counts_and_percentiles_are_there_as_json(tmp_path: Path) -> None:
    recording = Drawn()
    for took in range(1, 1001):
        recording.intercept(took, Answer.MAPPED, total_ns=took)
    told = json.loads(report(tmp_path, recording.gap(3).intercept(1, Answer.UNBACKED).end(), "--json").output)
    assert told["intercepts"] == told["records"] == 1001
    assert told["gaps"] == [{"number": 1000, "lost": 3, "since": 999_000, "until": 1_003_000}]
    assert told["answers"]["resume mapped"] == {
        "intercepts": 1000,
        "latency_ns": {"p50": 500, "p90": 900, "p99": 990, "p99.9": 999, "max": 1000},
    }
    assert told["answers"]["forward unbacked"]["latency_ns"]["p50"] == 1


# ------------------------------------------------ the trace


def test_the_trace_has_a_slice_for_every_intercept_on_its_vp_and_its_other_tracks(tmp_path: Path) -> None:
    trace = perfetto(tmp_path, busy().end())
    tracks = {
        packet.track_descriptor.uuid: packet.track_descriptor.name
        for packet in trace.packet if packet.HasField("track_descriptor")
    }  # fmt: skip
    begun = Counter[tuple[str, str]]()
    for packet in trace.packet:
        if packet.track_event.type in {TrackEvent.TYPE_SLICE_BEGIN, TrackEvent.TYPE_INSTANT}:
            begun[tracks[packet.track_event.track_uuid], packet.track_event.name] += 1
    assert begun == {
        ("VP 0", "forward no_region"): 1,
        ("VP 0", "forward not_memory"): 1,
        ("VP 1", "resume mapped"): 2,
        ("region lock", "map"): 1,
        ("region lock", "unmap"): 1,
        ("region lock: taking away", "invalidated until no longer reached"): 1,
        ("invalidations", "notifier"): 1,
    }
    first = next(packet for packet in trace.packet if packet.track_event.name == "forward no_region")
    assert first.timestamp == 3 * STEP - 500
    facts = {each.name: each.string_value or each.uint_value for each in first.track_event.debug_annotations}
    assert facts == {"record": 3, "gfn": "0x900", "access": "r--"}


def test_slices_that_would_cross_are_on_tracks_of_one_name(tmp_path: Path) -> None:
    recording = Drawn()
    recording.invalidation(Kind.INVALIDATION_BEGUN, 1, 1).invalidation(Kind.INVALIDATION_BEGUN, 2, 1)
    recording.invalidation(Kind.INVALIDATION_ENDED, 1, 1).invalidation(Kind.INVALIDATION_BEGUN, 3, 1)
    recording.invalidation(Kind.INVALIDATION_ENDED, 2, 1).invalidation(Kind.INVALIDATION_ENDED, 3, 1)
    trace = perfetto(tmp_path, recording.end())
    names = [p.track_descriptor.name for p in trace.packet if p.HasField("track_descriptor")]
    assert names.count("invalidations") == 2
    open_on = Counter[int]()
    events = [packet for packet in trace.packet if packet.HasField("track_event")]
    for packet in sorted(events, key=lambda packet: packet.timestamp):
        step = 1 if packet.track_event.type == TrackEvent.TYPE_SLICE_BEGIN else -1
        open_on[packet.track_event.track_uuid] += step
        assert open_on[packet.track_event.track_uuid] in {0, 1}


# ------------------------------------------------ what cannot be shown


def test_a_truncated_recording_is_an_error_and_with_partial_what_comes_before_is_shown(
    tmp_path: Path,
) -> None:
    stored = busy().end()[:-20]
    result = report(tmp_path, stored, "-o", str(tmp_path / "report.html"))
    assert result.exit_code == 1
    assert re.search(r"guest\.rec: at byte \d+: the file ends within a chunk\n$", result.output)
    text = page(tmp_path, stored, "--partial")
    assert "The recording is damaged" in text
    assert "it was cut off" in text


@pytest.mark.parametrize(
    ("stored", "why"),
    [
        (b"", "the file is empty"),
        (b"\x7fELF\x02\x01\x01\0" * 8, "this is not a recording"),
        (
            Drawn().record(Kind.INTERCEPT, detail=200).end(),
            "record 0 has an answer without a name",
        ),
        (Drawn().record(Kind.REGION_ADDED, 1, 1, detail=9).end(), "record 0 has number 9"),
        (Drawn().record(Kind.RANGE_INVALIDATED, 1, 1, detail=9).end(), "record 0 has number 9"),
    ],
)
def test_a_foreign_recording_is_one_sentence(tmp_path: Path, stored: bytes, why: str) -> None:
    result = report(tmp_path, stored, "-o", str(tmp_path / "report.html"), "--partial")
    assert result.exit_code == 1
    assert why in result.output
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("kind", [*Kind, 1000])
def test_numbers_that_cannot_be_are_drawn_somewhere(tmp_path: Path, kind: int) -> None:
    huge = (2**64 - 1,) * 6
    recording = (
        Drawn().region_added(0, 4, 0).mapped(0, 2).record(kind, *huge, vp_index=9).record(kind, 0, *huge[1:])
    )
    recording.invalidation(Kind.RANGE_INVALIDATED, 0, 2)
    stored = recording.intercept(1, Answer.MAPPED).end()
    counted = 3 if kind == Kind.INTERCEPT else 1
    assert f"<dt>intercepts</dt><dd>{counted}</dd>" in page(tmp_path, stored)
    assert perfetto(tmp_path, stored).packet


def test_a_missing_extra_and_a_missing_option_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "-o HTML, --perfetto OUT, --json" in report(tmp_path, busy().end()).output
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "plotly" else find_spec(name))
    result = report(tmp_path, busy().end(), "-o", str(tmp_path / "report.html"))
    assert result.exit_code == 1
    assert "report needs plotly: run pip install 'interceptd[report]'" in result.output
