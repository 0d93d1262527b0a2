"""A slider below a figure, each of whose steps shows other data in the same traces."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from tracedensity.plot.theme import FAINT, INK, MUTED, PAPER, written

_CHANGES = ("x", "y", "opacity", "line.width")


@dataclass(frozen=True, eq=False)
class Step:
    """What a position of the slider shows.

    Attributes:
        label: What stands at the position.
        title: Lines of the figure's title, as many in every step.
        traces: As many in every step, in the same order.
    """

    label: str
    title: str
    traces: Sequence[go.Scatter]


def add_slider(figure: go.Figure, steps: Sequence[Step], active: int, prefix: str) -> go.Figure:
    """Add a slider that exchanges the points of the figure's first traces, which must be those of the active step.

    What the mouse is told does not change: traces that answer it have the same `customdata` in all steps, and NaN in
    place of points that a step lacks. `finished`, which makes room for the slider, comes after this.
    """
    figure.update_layout(
        sliders=[{
            "active": active,
            "steps": [
                {
                    "label": step.label,
                    "method": "update",
                    "args": [
                        {name: [_value(trace, name) for trace in step.traces] for name in _CHANGES},
                        {"title.text": written(step.title.split("\n"))},
                        list(range(len(step.traces))),
                    ],
                }
                for step in steps
            ],
            "currentvalue": {"prefix": prefix, "font": {"size": 12, "color": INK}},
            "font": {"size": 10, "color": MUTED},
            "bgcolor": FAINT,
            "activebgcolor": MUTED,
            "bordercolor": MUTED,
            "borderwidth": 1,
            "tickcolor": PAPER,
            "ticklen": 4,
            "minorticklen": 2,
            "x": 0,
            "len": 1,
            "yanchor": "top",
            "pad": {"t": 0, "b": 0},
        }]
    )  # fmt: skip
    return figure


def _value(trace: go.Scatter, name: str) -> object:
    value = trace[name]
    if isinstance(value, np.ndarray):  # in a slider plotly.py would write each number out
        return {"dtype": "f4", "bdata": b64encode(value.astype("<f4").tobytes()).decode()}
    return list(value) if isinstance(value, tuple) else value
