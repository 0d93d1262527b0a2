"""The look of all figures: one template, colours in light and dark, and how text of prompts and tokens is written."""

import html
import re
import textwrap
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, TypeAlias
from unicodedata import east_asian_width

import numpy as np
import plotly.graph_objects as go

from tracedensity.curve import percent

Theme: TypeAlias = Literal["light", "dark"]

# Okabe and Ito's palette, with a darker grey: people with any common form of colour blindness can tell them apart.
COLOURS = {
    "head": "#0072B2",
    "mlp": "#D55E00",
    "published": "#CC79A7",
    "residual": "#6E6E6E",
    "circuit": "#1A1A1A",
    "random": "#E69F00",
    "inverse": "#009E73",
}
INK, MUTED, FAINT, BAND, DEAD, PAPER = "#1A1A1A", "#767676", "#EBEBEB", "#F6F6F6", "#C4C4C4", "#FFFFFF"
FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"

SEQUENTIAL = ("#F3F6FA", "#BFD7EA", "#7FB2D6", "#2F7FB8", "#08406B")
"""From nothing to much; the order is that of lightness."""

DIVERGING = ("#004B78", "#6FA8D0", "#F2F2F2", "#EBA36B", "#9E4500")
"""From the first to the second of two things that are compared."""

DARK = {
    PAPER: "#15171B",
    INK: "#E6E6E6",
    MUTED: "#9CA3AB",
    FAINT: "#333840",
    BAND: "#1C1F25",
    DEAD: "#4B515A",
    COLOURS["head"]: "#56B4E9",
    COLOURS["mlp"]: "#E8702A",
    COLOURS["published"]: "#E5A3C8",
    COLOURS["residual"]: "#7D848C",
    COLOURS["random"]: "#F5D060",
    COLOURS["inverse"]: "#10B070",
    **dict(zip(SEQUENTIAL, ("#20262E", "#24496A", "#2F75A8", "#5FA8DC", "#CDE6FA"), strict=True)),
    **dict(zip(DIVERGING, ("#7CC4F5", "#2F6A93", "#24272D", "#96562A", "#FFB070"), strict=True)),
}
"""What each colour of a light figure is in a dark one. Figures are made light, with these colours and no others."""

WIDTHS = ((0.0, 1.0), (0.05, 1.8), (0.2, 3.2), (0.5, 5.0))
"""How wide (px) lines are from which share of the strongest score on."""

NARROW = 400
"""Width (px) in which titles and legends fit; labels of many tokens need more, see `finished`."""

_BESIDE = 24 + 32  # px: room at the right, and what a page has at both sides

TOKEN = 15  # px that a token needs for its name, written upwards
SLIDER = 84  # px that a slider needs
TOOLBAR = 42  # px down to the line that the title stands on, so that plotly's tool bar is above it
_NAMED_TOKENS = 72  # more do not fit beside one another
_TITLE_LINE, _SUBTITLE_LINE, _LEGEND_LINE = 20, 15, 20  # px

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
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "title": {
            "x": 0,
            "xref": "container",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 16, "t": TOOLBAR},
            "xanchor": "left",
            "font": {"size": 15},
            "subtitle": {"font": {"size": 11, "color": MUTED}},
        },
        "hovermode": "closest",
        "hoverlabel": {
            "align": "left",
            "bgcolor": PAPER,
            "bordercolor": MUTED,
            "font": {"family": FONT, "size": 12, "color": INK},
        },
        "legend": {
            "orientation": "h", "x": 0, "xanchor": "left", "yref": "paper", "yanchor": "top", "font": {"size": 11},
            "tracegroupgap": 0,
        },
        "modebar": {"bgcolor": PAPER, "color": MUTED, "activecolor": INK},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)  # fmt: skip


def colour_bar(title: str, **options: Any) -> dict[str, Any]:
    """A colour bar at the right, as tall as the plot."""
    return {
        "title": {"text": title, "side": "right", "font": {"size": 12}},
        "thickness": 12,
        "outlinewidth": 0,
        "ticks": "outside",
        "ticklen": 3,
        "tickcolor": MUTED,
        "xpad": 6,
        "ypad": 0,
        **options,
    }


def colour_scale(colours: Sequence[str]) -> list[list[Any]]:
    """Colours at equal distances, as plotly takes a scale."""
    return [[place / (len(colours) - 1), colour] for place, colour in enumerate(colours)]


def finished(
    figure: go.Figure,
    title: str,
    about: Sequence[str],
    *,
    plot_height: float | int,
    theme: Theme | str = "light",
    remark: str = "",
    above: float | int = 0,
    below: float | int = 56,
    left: float | int = 64,
    right: float | int = 24,
    min_width: float | int = NARROW,
) -> go.Figure:
    """A figure with its title, its legend, and margins in which both fit however narrow it is.

    Args:
        figure: What is drawn; its legend stands below the axis.
        title: First line, plain text; may ask for more lines.
        about: Parts of the second line, plain text; as many lines as they need.
        plot_height: Height of the part between the axes (px).
        theme: "light" or "dark".
        remark: A sentence below these lines: what is not drawn.
        above: Room for what stands between title and plot (px).
        below: Room for ticks and title of the axis below (px); a slider and the legend come next.
        left: Room at the left.
        right: Room at the right.
        min_width: Width (px) below which labels would overlap. Where that is more than `NARROW`, the figure has this
            width, and a page or notebook that is narrower scrolls.

    Raises:
        ValueError: If there is no such theme.
    """
    if theme not in ("light", "dark"):
        raise ValueError(f"`theme` must be 'light' or 'dark', got {theme!r}.")
    titles = _wrapped(title.split("\n"), 44, joined=False)
    subtitles = [*_wrapped(about, 60), *textwrap.wrap(remark, 60)]
    top = TOOLBAR + _TITLE_LINE * len(titles) + _SUBTITLE_LINE * len(subtitles) + 20 + above
    drawn: list[Any] = list(figure.select_traces())
    names = [trace.name or "" for trace in drawn if trace.showlegend is not False and trace.visible is not False]
    columns = max(1, int((NARROW - 24) / (44 + 6 * max(map(breadth, names), default=0))))
    axis_room, below = below, below + SLIDER * len(figure.layout.sliders)
    bottom = below + _LEGEND_LINE * -(-len(names) // columns) + 8 * bool(names)
    figure.update_layout(
        template=TEMPLATE,
        title={"text": written(titles), "subtitle": {"text": written(subtitles)}},
        height=round(plot_height + top + bottom),
        width=min_width if min_width > NARROW else None,
        margin={"t": top, "b": bottom, "l": left, "r": right},
        legend={"y": -below / plot_height},
        meta={"min_width": min_width},
    )
    figure.update_layout(sliders=[{"y": -axis_room / plot_height}] * len(figure.layout.sliders))
    return figure if theme == "light" else dark(figure)


def dark(figure: go.Figure) -> go.Figure:
    """The same figure on a dark ground: every colour replaced by its counterpart."""
    traces: list[Any] = list(figure.select_traces())
    return go.Figure(
        [_recoloured(trace.to_plotly_json()) for trace in traces], _recoloured(figure.layout.to_plotly_json())
    )


_IN_TEXT = re.compile(r'(?<=<span style="color:)#[0-9A-F]{6}(?=">)')  # text of prompts has no "<"


def _recoloured(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _recoloured(part, name) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_recoloured(part, key) for part in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "OU":
        return np.array([_recoloured(part, key) for part in value.tolist()], dtype=object)
    if not isinstance(value, str):
        return value
    if key.endswith(("color", "colorscale")):
        return DARK.get(value, value)
    return _IN_TEXT.sub(lambda found: DARK.get(found[0], found[0]), value)


def _wrapped(parts: Sequence[str], length: int, joined: bool = True) -> list[str]:
    """Parts on lines of at most so many characters, broken between parts where that is possible."""
    lines: list[str] = []
    for part in filter(None, parts):
        if joined and lines and len(lines[-1]) + 3 + len(part) <= length:
            lines[-1] += " · " + part
        else:
            lines += textwrap.wrap(part, length)
    return lines


def written(lines: Sequence[str]) -> str:
    """Plain text on several lines, as plotly takes it."""
    return "<br>".join(map(label, lines))


def edge_ticks(most: int) -> dict[str, Any]:
    """Ticks of a logarithmic axis of numbers of edges, at powers of ten, in few characters."""
    decades = [10**power for power in range(len(str(most)))]
    names = [f"{size:,}" if size < 10_000 else f"{size // 1000:,}k" for size in decades]
    minor = {"ticks": "outside", "tickvals": np.outer(decades, range(2, 10)).ravel().tolist(), "ticklen": 2}
    return {"type": "log", "tickvals": decades, "ticktext": names, "tickangle": 0, "minor": minor}


def share_ticks(most: int, whole: float | int = 1) -> dict[str, Any]:
    """Ticks of the same axis read as shares of `most` edges, `whole` being all; where many, at every second power."""
    powers = range(int(np.log10(most)) + 1)
    powers = powers[:: 1 if len(powers) <= 4 else 2]
    places = [10.0**-power for power in reversed(powers)]
    return {
        "type": "log",
        "tickvals": [place * whole for place in places],
        "ticktext": [percent(place) for place in places],
        "tickangle": 0,
    }


def named_tokens(n_pos: int) -> tuple[list[int], str]:
    """Which tokens have a name along an axis, the last one always, and the axis's title."""
    step = -(-n_pos // _NAMED_TOKENS)
    return list(range((n_pos - 1) % step, n_pos, step)), "token" if step == 1 else f"token (one in {step} is named)"


def require_result(argument: str, given: object, kind: type, example: str) -> None:
    """Raise a ValueError if what is to be drawn is of another type."""
    if not isinstance(given, kind):
        raise ValueError(f"`{argument}` must be a {kind.__name__}, {example}, got a {type(given).__name__}.")


def visible(text: str) -> str:
    """Text with line breaks, tabs and all that cannot be seen written out, so that it fits on one line."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)


def token(text: str, length: int = 14) -> str:
    """A token as a tick label: its spaces seen, long ones shortened in the middle."""
    return label(shortened(visible(text), length).replace(" ", "·"))


def quoted(text: str, length: int = 50) -> str:
    """Text in quotation marks on one line, shortened in the middle; plain, still to be a `label`."""
    return f"'{shortened(visible(text), length)}'"


def plain(text: str, length: int = 40) -> str:
    """Text of a user's on one line, shortened in the middle; still to be a `label`."""
    return shortened(visible(text), length)


def shortened(text: str, length: int) -> str:
    """Text of at most `length` columns, its middle left out if need be; more of its end is kept."""
    if breadth(text) <= length:
        return text
    start = (length - 1) // 3
    return _beginning(text, start) + "…" + _beginning(text[::-1], length - 1 - start)[::-1]


def breadth(text: str) -> int:
    """Columns that a text takes: Chinese, Japanese and Korean characters take two."""
    return sum(map(_columns, text))


def wide_enough(names: Sequence[str], left: float | int) -> float | int:
    """Width (px), at least `NARROW`, at which names below an axis stand side by side: turned ones would be left out.

    Args:
        names: The names, as they are shown.
        left: Room at the left of the axis.
    """
    return max(NARROW, left + _BESIDE + len(names) * (12 + 7 * max(map(breadth, names))))


def _columns(char: str) -> int:
    return 2 if east_asian_width(char) in "WF" else 1


def _beginning(text: str, length: int) -> str:
    """As much of a text as fits so many columns."""
    return text[: sum(columns <= length for columns in accumulate(map(_columns, text)))]


def label(text: str) -> str:
    """Text that plotly shows as it is: neither tags nor, in a notebook, ``$...$`` formulas are read.

    Quotation marks stay, since plotly does not know their names: use it between tags, never in an attribute.
    """
    return html.escape(text, quote=False).replace("$", "&#36;")


def rounded(value: float, digits: int = 2) -> str:
    """A number with few digits, and no power of ten for hundreds."""
    return f"{float(f'{value:.{digits}g}'):g}"
