"""A report in a browser: Debian's chromium, headless."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from fakes import chromium
from fakes.chromium import Page
from fakes.recordings import REAL, Drawn, read, written
from intercept_protocol.outcomes import Answer
from intercept_protocol.recording import Records
from intercept_protocol.trace import Kind, kinds_of
from interceptctl.cli import main

pytestmark = pytest.mark.skipif(not chromium.found(), reason="needs Debian's chromium")

TIMELINE = "document.getElementById('timeline')"
TRACES = f"{TIMELINE}._fullData.filter((trace) => trace.meta == 'intercepts')"
HOSTILE = (
    "<b>b</b></script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium.page(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def show(page: Page, recording: Path) -> None:
    report = recording.with_suffix(".html")
    result = CliRunner().invoke(main, ["report", str(recording), "-o", str(report)])
    assert result.exit_code == 0, result.output
    page.complaints.clear()
    page.loads.clear()
    page.open(report)
    page.await_value("document.body.dataset.drawn")


def test_a_real_run_is_drawn_whole_and_names_in_its_recording_run_no_script(
    page: Page, tmp_path: Path
) -> None:
    header, chunks = read((REAL / "declared.rec").read_bytes())
    answers = ((HOSTILE, HOSTILE), *header.answers[1:])
    recording = tmp_path / "run.rec"
    recording.write_bytes(
        written(msgspec.structs.replace(header, name=HOSTILE, daemon=HOSTILE, answers=answers), chunks)
    )
    kinds = b"".join(kinds_of(chunk.stored) for chunk in chunks if isinstance(chunk, Records))
    show(page, recording)
    assert page.value_of(f"{TRACES}.reduce((sum, trace) => sum + trace.x.length, 0)") == kinds.count(
        Kind.INTERCEPT
    )
    x, y = page.value_of(
        f"""(() => {{
            const [trace] = {TRACES}, {{ xaxis, yaxis }} = {TIMELINE}._fullLayout, n = trace.x.length >> 1;
            const {{ x, y }} = {TIMELINE}.getBoundingClientRect();
            return [x + xaxis._offset + xaxis.d2p(trace.x[n]), y + yaxis._offset + yaxis.d2p(trace.y[n])];
        }})()"""
    )
    page.point_at(x, y)
    told = page.await_value(
        f"[...{TIMELINE}.querySelectorAll('.hovertext')].map((e) => e.textContent).join()"
    )
    assert re.search(r"gfn 0x[0-9a-f]+ [r-][w-][x-].*VP \d+, [\d,]+ ns.*record \d+", told), told
    assert page.value_of("document.title").startswith(f"interceptd: {HOSTILE}")
    assert page.value_of("document.images.length") == 0
    assert page.value_of(f"{TIMELINE}.querySelector('.legend').textContent").count(HOSTILE[:17])
    assert page.value_of("document.querySelector('a, [data-title*=Share]')") is None
    assert not page.complaints
    assert not [address for address in page.loads if not address.startswith(("file:", "data:"))]


@pytest.mark.verify
def test_zooming_names_the_gfns_in_view_and_dark_readers_see_a_dark_page(page: Page, tmp_path: Path) -> None:
    recording = tmp_path / "run.rec"
    recording.write_bytes(Drawn().region_added(0x1000, 64, 0).intercept(0x1020, Answer.MAPPED).end())
    show(page, recording)
    ticks = f"{TIMELINE}.layout.yaxis.ticktext"
    page.value_of(f"Plotly.relayout({TIMELINE}, {{'yaxis.range': [16, 20]}}).then(() => 1)")
    page.await_value(f"{ticks}.join() == '0x1010,0x1011,0x1012,0x1013'")
    paper = f"{TIMELINE}._fullLayout.paper_bgcolor"
    page.prefer("dark")
    page.await_value(f"{paper} == '#14171a'")
    page.prefer("light")
    page.await_value(f"{paper} == '#ffffff'")
    assert page.printed().startswith(b"%PDF")
    assert not page.complaints
