"""Figures of all intercepts together: how long they took, and where they were.

Owns what is drawn there; must not know the page around it, nor files.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import plotly.graph_objects as go

from .history import STAGES, History
from .style import STAGE_COLOURS, colour, literal

BUSIEST: Final = 20
"""Pages in the chart of the busiest."""


def latency(history: History) -> go.Figure:
    """The share of intercepts that was faster, on an axis on which each step is ten times rarer."""
    figure = go.Figure()
    count = len(history.intercepts.number)
    rarity = np.unique(np.geomspace(1, max(count, 2), 400))
    for stage in STAGES if count else ():
        took = np.sort(history.intercepts.stages[stage])
        if not took[-1]:
            continue
        place = np.minimum(np.ceil(count * (1 - 1 / rarity)).astype(np.int64), count - 1)
        figure.add_trace(
            go.Scatter(
                x=rarity,
                y=np.where(took[place] > 0, took[place], np.nan),
                customdata=100 * (1 - 1 / rarity),
                mode="lines",
                line={"shape": "hv", "color": STAGE_COLOURS[stage]},
                name=stage,
                hovertemplate=f"{stage}: %{{customdata:.6~f}} % took at most %{{y:,d}} ns<extra></extra>",
            )
        )
    ticks = [1, 2, 4, *(10**power for power in range(1, 9))]
    words = ["0 %", "50 %", "75 %", *(f"{100 - 100 / 10**power:.10g} %" for power in range(1, 9))]
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=words, title_text="share of the intercepts")
    figure.update_yaxes(type="log", title_text="ns", exponentformat="none", separatethousands=True)
    figure.update_layout(height=420, hovermode="x")
    return figure


def busiest(history: History) -> go.Figure:
    found = history.intercepts
    gfns, counts = np.unique(found.gfn[found.memory], return_counts=True)
    shown = gfns[np.argsort(-counts, kind="stable")[:BUSIEST]]
    figure = go.Figure()
    there = found.memory & np.isin(found.gfn, shown)
    for code in np.unique(found.answer[there]).tolist():
        name = literal(history.answer(code))
        of_answer = found.gfn[there & (found.answer == code)]
        figure.add_trace(
            go.Bar(
                x=[int(np.count_nonzero(of_answer == gfn)) for gfn in shown],
                y=[f"{int(gfn):#x}" for gfn in shown],
                orientation="h",
                marker={"color": colour(history, code)},
                name=name,
                hovertemplate=f"gfn %{{y}}: %{{x:,d}} {name}<extra></extra>",
            )
        )
    figure.update_yaxes(type="category", autorange="reversed", title_text="gfn")
    figure.update_xaxes(title_text="intercepts", rangemode="tozero")
    figure.update_layout(height=160 + 20 * len(shown), barmode="stack", hovermode="closest")
    return figure
