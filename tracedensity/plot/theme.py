"""The look of all figures: one template, the colours, and how text of prompts and tokens is written."""

import html

import numpy as np
import plotly.graph_objects as go

# Okabe and Ito's palette, which people with any common form of colour blindness can tell apart.
COLOURS = {
    "head": "#0072B2",
    "mlp": "#D55E00",
    "published": "#CC79A7",
    "residual": "#8A8A8A",
    "circuit": "#1A1A1A",
    "random": "#E69F00",
    "inverse": "#009E73",
}
INK, MUTED, FAINT = "#1A1A1A", "#767676", "#EBEBEB"
FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"

_AXIS = {
    "showgrid": False,
    "zeroline": False,
    "showline": True,
    "linecolor": MUTED,
    "ticks": "outside",
    "tickcolor": MUTED,
    "ticklen": 4,
    "title": {"standoff": 12, "font": {"size": 13}},
    "automargin": True,
}

# Given to each figure, never registered or set as plotly's default: other figures of a notebook keep their look.
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "title": {
            "x": 0,
            "xref": "container",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 16, "t": 28},  # below the tool bar
            "xanchor": "left",
            "font": {"size": 16},
            "subtitle": {"font": {"size": 12, "color": MUTED}},
        },
        "margin": {"l": 64, "r": 24, "t": 96, "b": 108},
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "white", "font": {"family": FONT, "size": 12, "color": INK}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "yref": "container", "y": 0, "yanchor": "bottom"},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)


def heading(title: str, subtitle: str) -> dict[str, object]:
    """A figure's title; both lines are plain text, except for ``<br>``, and must have been through `label`."""
    return {"text": title, "subtitle": {"text": subtitle}}


def visible(text: str) -> str:
    """Text with line breaks, tabs and all that cannot be seen written out, so that it fits on one line."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)


def token(text: str, length: int = 14) -> str:
    """A token as a tick label: its spaces seen, long ones shortened in the middle."""
    return label(shortened(visible(text), length).replace(" ", "·"))


def quoted(text: str, length: int = 50) -> str:
    """Text in quotation marks on one line, shortened in the middle."""
    return f"'{label(shortened(visible(text), length))}'"


def shortened(text: str, length: int) -> str:
    """Text of at most `length` characters, its middle left out if need be; more of its end is kept."""
    if len(text) <= length:
        return text
    start = (length - 1) // 3
    return text[:start] + "…" + text[len(text) - (length - 1 - start) :]


def label(text: str) -> str:
    """Text that plotly shows as it is: neither tags nor, in a notebook, ``$...$`` formulas are read.

    Quotation marks stay, since plotly does not know their names: use it between tags, never in an attribute.
    """
    return html.escape(text, quote=False).replace("$", "&#36;")


def percent(share: float) -> str:
    """A share in per cent with three digits, never in powers of ten."""
    return np.format_float_positional(100 * share, precision=3, fractional=False, trim="-") + "%"
