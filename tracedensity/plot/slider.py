"""A slider below a figure, each of whose steps shows other data in the same traces."""

from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from tracedensity.plot.theme import FAINT, INK, MUTED, NARROW, PAPER, written

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
            "len": NARROW - 100,  # within reach, however wide the figure
            "lenmode": "pixels",
            "yanchor": "top",
            "pad": {"t": 0, "b": 0},
        }]
    )  # fmt: skip
    return figure


def compact(figure: go.Figure) -> go.Figure:
    """The figure for a page with a script of its own: a slider whose steps are the first so many of the same points.

    Where that is not so, as with circuits that are not nested, it is the figure itself.
    """
    sliders = figure.layout.sliders
    if not sliders:
        return figure
    steps = [step.args for step in sliders[0].steps]
    places = [(name, place) for name in "xy" for place in range(len(steps[0][2]))]
    decoded = [{key: b64decode(args[0][key[0]][key[1]]["bdata"]) for key in places} for args in steps]
    longest = {key: max((points[key] for points in decoded), key=len) for key in places}
    counts = []
    for args, points in zip(steps, decoded, strict=True):
        if not all(longest[key].startswith(part) for key, part in points.items()):
            return figure
        counts.append([len(points["x", place]) // 4 for place in range(len(args[2]))])
    made = go.Figure(figure)
    for step, args, count in zip(made.layout.sliders[0].steps, steps, counts, strict=True):
        style = {name: value for name, value in args[0].items() if name not in "xy"}
        step.update(method="skip", args=[{**style, "counts": count}, *args[1:]])
    whole = [
        {name: {"bdata": b64encode(longest[name, place]).decode()} for name in "xy"}
        for place in range(len(steps[0][2]))
    ]
    return made.update_layout(meta={**made.layout.meta, "whole": whole})


def _value(trace: go.Scatter, name: str) -> object:
    value = trace[name]
    if name in "xy":  # in a slider plotly.py would write each number out
        value = np.asarray(value, dtype="<f4")
        return {"dtype": "f4", "bdata": b64encode(value.tobytes()).decode()}
    return value
