"""The page: one file with everything in it, which loads nothing.

Owns the HTML, the tables and what the page may do; must not know how a figure is made. Text from a recording
is escaped. A content security policy names the page's own scripts by their hashes, and forbids every load.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from html import escape
from importlib.resources import files
from typing import Final

import numpy as np
import plotly.io
from plotly.offline import get_plotlyjs

from intercept_protocol.text import visible
from interceptctl import units

from .charts import busiest, latency
from .history import STAGES, History, Whole
from .style import colour
from .summary import PERCENTILES, answered, percentiles, restored
from .timeline import timeline

TABLE_LIMIT: Final = 100
"""Gaps in the table."""
_POLICY: Final = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-eval' {hashes}"
)
"""WebGL's programs are made by plotly with `eval`."""


def page(history: History, damage: str | None) -> Iterator[str]:
    """The parts of the page. `damage` says why the recording ends early."""
    header = history.header
    title = f"interceptd: {_text(header.name) or 'partition'} ({header.partition_id})"
    scripts = [get_plotlyjs(), _resource("page.js")]
    yield f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">\n'
    yield '<meta name="viewport" content="width=device-width">\n'
    yield f"<style>\n{_resource('page.css')}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    if damage is not None:
        yield f'<p class="warning">The recording is damaged; this is what comes before: {_text(damage)}</p>\n'
    yield _facts(history)
    yield from _sections(history)
    yield '<script type="application/json" id="figures">{'
    for separator, figure in (("", timeline), (",", latency), (",", busiest)):
        yield f'{separator}\n"{figure.__name__}": '
        yield plotly.io.to_json(figure(history), validate=False).replace("<", "\\u003c")
    yield "}</script>\n"
    for script in scripts:
        yield f"<script>{script}</script>\n"
    yield "</body>\n</html>\n"


def _sections(history: History) -> Iterator[str]:
    yield '<section>\n<h2>What happened</h2>\n<div id="timeline"></div>\n'
    yield "<p>Drag to zoom, double-click to see everything; a click in the legend hides.</p>\n"
    elsewhere = sum(1 for each in history.invalidations if not each.gfns)
    if elsewhere:
        yield f"<p>Not drawn, because they touched no region: {units.of(elsewhere, 'invalidation')}.</p>\n"
    yield "</section>\n<section>\n<h2>Gaps</h2>\n"
    yield _gaps(history)
    yield "</section>\n<section>\n<h2>Answers</h2>\n"
    yield _answers(history)
    yield '</section>\n<section>\n<h2>How long intercepts took in the daemon</h2>\n<div id="latency"></div>\n'
    yield _stages(history)
    yield '</section>\n<section>\n<h2>The busiest pages</h2>\n<div id="busiest"></div>\n</section>\n'


def _facts(history: History) -> str:
    header = history.header
    facts = [
        ("recorded", _began(header.wall_clock_ns)),
        ("for", f"{history.until / 1e9:.3f} s"),
        ("until", _text(history.end) if history.end is not None else "it was cut off"),
        ("intercepts", f"{len(history.intercepts.number):,}"),
        ("VPs", f"{len(np.unique(history.intercepts.vp)):,}"),
        ("invalidations", f"{len(history.invalidations):,}"),
        ("records", f"{history.records:,}"),
        ("memory", _text(header.address_space)),
        ("hypervisor", f"{_text(header.hypervisor)}, {_text(header.architecture)}"),
        ("daemon", _text(header.daemon)),
        *_restored(history),
    ]
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in facts)}</dl>\n"


def _restored(history: History) -> Iterator[tuple[str, str]]:
    found = restored(history)
    if found is None:
        return
    yield "from the image", units.pages(found["image_pages"])
    yield "zero, given back before", units.pages(found["zero_pages"])
    yield "touched", units.of(found["touched_pages"], "page")
    if "quiet_ns" in found:
        first, last = (f"{found[name] / 1e9:.3f} s" for name in ("first_fault_ns", "quiet_ns"))
        yield "first and last fault", f"{first}, {last}"


def _began(wall_clock_ns: int) -> str:
    try:
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=wall_clock_ns // 1000)
    except OverflowError:
        return "at no time that a calendar has"
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _gaps(history: History) -> str:
    if not history.holes:
        return "<p>No record is missing.</p>\n"
    rows = [
        (
            f"{hole.since / 1e9:.6f} s",
            f"{(hole.until - hole.since) / 1e9:.6f} s",
            f"{hole.number:,}",
            f"{hole.lost:,}" if hole.lost is not None else "unknown: another daemon took over",
        )
        for hole in history.holes[:TABLE_LIMIT]
    ]
    more = len(history.holes) - TABLE_LIMIT
    note = f"<p>and {units.of(more, 'more gap')}</p>\n" if more > 0 else ""
    return _table(("at", "for", "from record", "records lost"), rows) + note


def _answers(history: History) -> str:
    rows = []
    for code, took in answered(history).items():
        swatch = f'<span class="swatch" style="background:{colour(history, code)}"></span>'
        share = f"{100 * len(took) / len(history.intercepts.answer):.2f} %"
        name = f"{swatch}{_text(history.answer(code))}"
        rows.append((name, f"{len(took):,}", share, *_percentiles(took)))
    return _table(("answer", "intercepts", "share", *PERCENTILES), rows)


def _stages(history: History) -> str:
    rows = [(stage, *_percentiles(history.intercepts.stages[stage])) for stage in STAGES]
    return _table(("stage", *PERCENTILES), rows)


def _percentiles(took: Whole) -> Iterable[str]:
    found = percentiles(took)
    return [f"{found[name]:,} ns" if found else "" for name in PERCENTILES]


def _table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Of cells that are HTML."""
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>\n'


def _text(text: str) -> str:
    return escape(visible(text[:200]))


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _policy(scripts: Iterable[str]) -> str:
    hashes = (base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts)
    return _POLICY.format(hashes=" ".join(f"'sha256-{each}'" for each in hashes))
