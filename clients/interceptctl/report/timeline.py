"""The timeline: intercepts, invalidations, regions and mappings over time.

Owns what is drawn there. An intercept is one point of a trace whose `meta` is `INTERCEPTS`; points are typed
arrays, drawn by WebGL. Must not know the page around it, nor files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from intercept_protocol.outcomes import Access, spelled

from .gfn_axis import GfnAxis
from .history import Box, History
from .shares import mapped_shares
from .style import HEX, INVALIDATION, REGION, REGIONS, colour, literal, small, together

MANY: Final = 100_000
"""More intercepts than that have smaller points."""
INTERCEPTS: Final = "intercepts"
STEPS: Final = 2000
"""Of a line of page counts."""
HOLES: Final = 200
"""Gaps that are marked."""


def timeline(history: History) -> go.Figure:
    axis = GfnAxis(history)
    figure = make_subplots(
        rows=3,
        shared_xaxes=True,
        vertical_spacing=0.05,
        row_heights=[0.5, 0.3, 0.2],
        subplot_titles=("intercepts and invalidations", "regions, and what the guest reaches", "pages"),
    )
    _add_mapped(figure, history, axis)
    for kind in sorted({box.what for box in history.regions}):
        boxes = [box for box in history.regions if box.what == kind]
        shade = REGIONS.get(kind.split()[0], REGION)
        figure.add_trace(_outlines(boxes, axis, f"region {literal(kind)}", shade), row=2, col=1)
    _add_invalidations(figure, history, axis)
    for trace in _intercept_traces(history, axis):
        figure.add_trace(trace, row=1, col=1)
    for name, steps, shade in (
        ("pages in regions", history.region_pages, REGION),
        ("pages mapped", history.mapped_pages, "#0072b2"),
    ):
        figure.add_trace(_steps(name, steps, shade, history.until), row=3, col=1)
    for hole in history.holes[:HOLES]:
        figure.add_vrect(
            x0=hole.since / 1e9, x1=hole.until / 1e9, fillcolor="#d62728", opacity=0.25, line_width=1
        )
    figure.update_layout(
        height=900, hovermode="closest", dragmode="zoom", legend_y=-0.11, legend_groupclick="togglegroup"
    )
    shown = [-0.08 * axis.length, 1.02 * axis.length]
    figure.update_yaxes(title_text="gfn", title_standoff=30, range=shown, row=1, col=1)
    figure.update_yaxes(title_text="gfn", title_standoff=30, range=shown, matches="y", row=2, col=1)
    figure.update_layout(meta={"parts": axis.parts})
    figure.update_yaxes(rangemode="tozero", row=3, col=1)
    figure.update_xaxes(range=[0, history.until / 1e9])
    figure.update_xaxes(title_text="seconds since the recording began", row=3, col=1)
    return figure


def _intercept_traces(history: History, axis: GfnAxis) -> Iterable[go.Scattergl]:
    """One for each answer and access: what is the same for many points is said once."""
    found = history.intercepts
    key = (found.answer << 4) | (found.access << 1) | found.memory
    named: set[int] = set()
    size = 2 if len(key) > MANY else 4
    for value in np.unique(key).tolist():
        chosen = np.nonzero(key == value)[0]
        code, access, memory = value >> 4, Access(value >> 1 & 7), bool(value & 1)
        name = literal(history.answer(code))
        place = f"gfn %{{customdata[0]:{HEX}}} {spelled(access)}" if memory else "no memory access"
        gfns = found.gfn[chosen]
        below = np.full(len(chosen), -max(1, axis.length // 20))
        yield go.Scattergl(
            x=found.time[chosen] / 1e9,
            y=small(axis.place(gfns.astype(np.float64)).astype(np.int64) if memory else below),
            customdata=together(gfns, found.vp[chosen], found.stages["total"][chosen], found.number[chosen]),
            mode="markers",
            marker={"size": size, "color": colour(history, code)},
            name=name,
            legendgroup=name,
            showlegend=code not in named,
            meta=INTERCEPTS,
            hovertemplate=f"{name}<br>{place}<br>VP %{{customdata[1]}}, %{{customdata[2]:,d}} ns"
            "<br>at %{x:.9f} s<br>record %{customdata[3]}<extra></extra>",
        )
        named.add(code)


def _add_invalidations(figure: go.Figure, history: History, axis: GfnAxis) -> None:
    for source in sorted({each.source for each in history.invalidations}):
        drawn = [
            (each, start, end)
            for each in history.invalidations if each.source == source
            for start, end in each.gfns
        ]  # fmt: skip
        if not drawn:
            continue
        name = f"invalidation: {literal(source)}"
        outlines = _outlines(
            [Box(start, end, each.since, each.until, "") for each, start, end in drawn],
            axis,
            name,
            INVALIDATION,
        )
        outlines.update(hoverinfo="skip", legendgroup=name)
        figure.add_trace(outlines, row=1, col=1)
        figure.add_trace(
            go.Scattergl(
                x=np.array([each.since for each, _, _ in drawn]) / 1e9,
                y=axis.place(np.array([start for _, start, _ in drawn], np.float64)),
                customdata=together(
                    *(
                        np.array(column, np.float64)
                        for column in zip(
                            *(
                                (start, each.page_count, each.until - each.since, each.number)
                                for each, start, _ in drawn
                            ),
                            strict=True,
                        )
                    )
                ),
                mode="markers",
                marker={"size": 9, "symbol": "line-ns-open", "color": INVALIDATION},
                name=name,
                legendgroup=name,
                showlegend=False,
                hovertemplate=f"{name}<br>gfn %{{customdata[0]:{HEX}}}, %{{customdata[1]}} pages, "
                "%{customdata[2]:,d} ns<br>at %{x:.9f} s<br>record %{customdata[3]}<extra></extra>",
            ),
            row=1,
            col=1,
        )


def _outlines(boxes: Sequence[Box], axis: GfnAxis, name: str, shade: str) -> go.Scattergl:
    """Rectangles as one line with breaks: there may be many."""
    since, until = (np.array([getattr(box, end) for box in boxes]) / 1e9 for end in ("since", "until"))
    starts, ends = (np.array([getattr(box, end) for box in boxes], np.float64) for end in ("start", "end"))
    start, end = axis.place(starts) - 0.5, axis.place(ends - 1) + 0.5
    none = np.full(len(boxes), np.nan)
    return go.Scattergl(
        x=np.stack([since, since, until, until, since, none], 1).ravel(),
        y=np.stack([start, end, end, start, start, none], 1).ravel(),
        mode="lines",
        line={"width": 1.5, "color": shade},
        name=name,
        customdata=np.stack([starts, ends, ends, starts, starts, none], 1).ravel(),
        hovertemplate=f"{name}<br>gfn %{{customdata:{HEX}}}<br>at %{{x:.9f}} s<extra></extra>",
    )


def _add_mapped(figure: go.Figure, history: History, axis: GfnAxis) -> None:
    shares = mapped_shares(history, axis)
    if shares is None:
        return
    figure.add_trace(
        go.Heatmap(
            z=shares.share,
            x0=shares.width / 2e9,
            dx=shares.width / 1e9,
            y0=(shares.height - 1) / 2,
            dy=shares.height,
            zmin=0,
            zmax=1,
            colorscale=[[0, "rgba(0,114,178,0)"], [1, "rgba(0,114,178,0.85)"]],
            showscale=False,
            name="mapped",
            hovertemplate="%{z:.0%} mapped<br>at %{x:.6f} s<extra></extra>",
        ),
        row=2,
        col=1,
    )


def _steps(name: str, steps: Sequence[tuple[int, int]], shade: str, until: int) -> go.Scatter:
    times = np.array([*(time for time, _ in steps[:-1]), until], np.int64)
    counts = np.array([*(count for _, count in steps[:-1]), 0], np.float64)
    if len(counts) > 1:
        counts[-1] = counts[-2]  # what is known ends with the recording, and not what is there
    if len(times) > STEPS:
        kept = np.unique(np.searchsorted(times, np.linspace(times[0], times[-1], STEPS), "right") - 1)
        times, counts = times[kept], counts[kept]
    return go.Scatter(
        x=times / 1e9,
        y=counts,
        mode="lines",
        line={"shape": "hv", "color": shade},
        name=name,
        hovertemplate=f"%{{y:,d}} {name}<extra></extra>",
    )
