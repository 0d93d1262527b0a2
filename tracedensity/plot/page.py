"""Pages: figures and text as one HTML file that needs no network, light or dark as the reader likes."""

import html
import json
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tracedensity.files import replace_file
from tracedensity.plot.slider import compact
from tracedensity.plot.theme import COLOURS, DARK, FAINT, FONT, INK, MUTED, NARROW, PAPER, visible

_IMAGES = (".png", ".svg", ".pdf", ".jpg", ".webp")
_VARIABLES = {"paper": PAPER, "ink": INK, "muted": MUTED, "faint": FAINT, "head": COLOURS["head"]}


def _variables(colours: Iterable[str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in zip(_VARIABLES, colours, strict=True))


_STYLE = f"""
:root {{ {_variables(_VARIABLES.values())} color-scheme: light; }}
:root.dark {{ {_variables(DARK[colour] for colour in _VARIABLES.values())} color-scheme: dark; }}
body {{ font: 15px/1.5 {FONT}; color: var(--ink); background: var(--paper); margin: 0; }}
main {{ max-width: 1200px; margin: 0 auto; padding: 20px 16px; }}
h1 {{ font-size: 22px; margin: 48px 0 12px; line-height: 1.25; overflow-wrap: anywhere; }}
main > h1:first-of-type {{ margin: 0 96px 12px 0; }}
h2 {{ font-size: 17px; margin: 36px 0 8px; }}
p {{ max-width: 76ch; }}
#theme {{ float: right; font: inherit; font-size: 13px; color: var(--muted); background: none; padding: 2px 10px;
  border: 1px solid var(--faint); border-radius: 4px; cursor: pointer; }}
.text {{ line-height: 2; overflow-wrap: anywhere; max-width: none; }}
.text span {{ background: var(--faint); border-radius: 3px; padding: 2px 1px; margin-right: 2px;
  white-space: pre-wrap; display: inline-block; line-height: 1.4; max-width: 100%; }}
.text .prediction {{ background: var(--head); color: var(--paper); padding: 2px 5px; }}
.side {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 8px 32px; }}
table {{ border-collapse: collapse; margin: 12px 0; font-variant-numeric: tabular-nums; font-size: 14px; }}
th, td {{ text-align: right; padding: 3px 16px 3px 0; border-bottom: 1px solid var(--faint); font-weight: normal; }}
th {{ color: var(--muted); vertical-align: bottom; }}
th:first-child, td:first-child, .left {{ text-align: left; }}
td {{ white-space: pre; }}
.bar {{ display: inline-block; height: 9px; background: var(--head); border-radius: 2px; }}
.wide {{ overflow-x: auto; clear: both; }}
.figure {{ overflow-x: auto; margin: 12px 0; clear: both; }}
.note, footer {{ color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }}
code {{ font-size: 13px; overflow-wrap: anywhere; white-space: pre-wrap; }}
"""

# Every colour of a figure has a counterpart, so that the other theme needs no second figure.
_SCRIPT = """
const counterparts = COUNTERPARTS, root = document.documentElement;
const back = Object.fromEntries(Object.entries(counterparts).map(([light, dark]) => [dark, light]));
function recoloured(value, key, map) {
  if (typeof value === "string") {
    if (/(color|colorscale)$/.test(key)) return map[value] || value;
    return value.replace(/(<span style="color:)(#[0-9A-F]{6})(?=">)/g, (_, tag, old) => tag + (map[old] || old));
  }
  if (Array.isArray(value)) return value.map(part => recoloured(part, key, map));
  if (value && Object.getPrototypeOf(value) === Object.prototype)
    return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, recoloured(part, name, map)]));
  return value;
}
// Steps of a slider that show the first so many points of what is there hold numbers in place of points.
function points(spec) {
  return new Float32Array(Uint8Array.from(atob(spec.bdata), char => char.charCodeAt(0)).buffer);
}
for (const figure of document.querySelectorAll(".js-plotly-plot")) {
  const whole = (figure.layout.meta || {}).whole;
  if (!whole) continue;
  const arrays = whole.map(trace => [points(trace.x), points(trace.y)]);
  figure.on("plotly_sliderchange", ({step}) => {
    const [{counts, ...style}, layout, traces] = step.args;
    style.x = counts.map((count, place) => arrays[place][0].subarray(0, count));
    style.y = counts.map((count, place) => arrays[place][1].subarray(0, count));
    Plotly.update(figure, style, layout, traces);
  });
}
function show(dark) {
  if (dark === root.classList.contains("dark")) return;
  root.classList.toggle("dark", dark);
  const map = dark ? counterparts : back;
  for (const figure of document.querySelectorAll(".js-plotly-plot"))
    Plotly.react(figure, recoloured(figure.data, "", map), recoloured(figure.layout, "", map));
}
const preferred = matchMedia("(prefers-color-scheme: dark)");
preferred.addEventListener("change", event => show(event.matches));
document.getElementById("theme").addEventListener("click", () => show(!root.classList.contains("dark")));
show(preferred.matches);
"""


def write_html(figure: go.Figure | str, path: str | PathLike[str]) -> None:
    """Write a figure, or a page that is already HTML, as one file that opens without a network.

    An interrupted write leaves the old file as it was.

    Args:
        figure: A figure, or a page.
        path: Where to.

    Raises:
        ValueError: If there is no such folder.
    """
    replace_file(path, figure if isinstance(figure, str) else page("tracedensity", [figure_div(figure, "figure")]))


def write_figure(figure: go.Figure, path: str | PathLike[str]) -> None:
    """Write a figure in the format that the end of the file's name says.

    Args:
        figure: What to write.
        path: A ``.html`` file opens without a network; ``.json`` is plotly's own, for `plotly.io.read_json`; ``.png``,
            ``.svg``, ``.pdf``, ``.jpg`` and ``.webp`` need kaleido and a Chrome or Chromium.

    Raises:
        ValueError: If there is no such folder or format, or what an image needs is missing.
    """
    path = Path(path)
    if path.suffix == ".html":
        write_html(figure, path)
    elif path.suffix == ".json":
        replace_file(path, figure.to_json() or "")
    elif path.suffix in _IMAGES:
        try:
            image = figure.to_image(path.suffix[1:], scale=2 if path.suffix in (".png", ".jpg", ".webp") else 1)
        except ImportError as error:
            raise ValueError(f'images need kaleido: pip install "tracedensity[image]" ({error}).') from error
        except (RuntimeError, OSError) as error:  # kaleido finds no browser, or it does not start
            raise ValueError(
                f"images need a Chrome or Chromium that runs: install one, or run `plotly_get_chrome` ({error})."
            ) from error
        replace_file(path, image)
    else:
        raise ValueError(f"`path` must end in .html, .json or one of {', '.join(_IMAGES)}, got {str(path)!r}.")


def page(title: str, body: Sequence[str]) -> str:
    """A page of parts that are HTML already; `title` is plain text."""
    script = _SCRIPT.replace("COUNTERPARTS", json.dumps(DARK))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(visible(title))}</title>\n<style>{_STYLE}</style>\n"
        f"<script>{get_plotlyjs()}</script>\n</head>\n<body>\n<main>\n"
        '<button id="theme" type="button">light / dark</button>\n'
        + "\n".join(body)
        + f"\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def figures_page(title: str, figures: Sequence[go.Figure], rows: Any) -> str:
    """A page of figures, then the table that they were drawn from.

    Args:
        title: Its title, plain text.
        figures: The figures.
        rows: A pandas table.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [figure_div(figure, f"figure-{number}") for number, figure in enumerate(figures, start=1)]
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row] for row in rows.to_numpy().tolist()]
    return page(title, [*body, table([str(each).replace("_", " ") for each in rows.columns], cells)])


def figure_div(figure: go.Figure, name: str) -> str:
    """A light figure without plotly.js; a window in which it does not fit scrolls it rather than squeezing it.

    Args:
        figure: As `finished` leaves it.
        name: Its own on the page, and that of an image of it.
    """
    figure = compact(figure)
    layout = figure.layout
    height, min_width = layout.height or 500, (layout.meta or {}).get("min_width", NARROW) - 32
    drawn = (
        go.Figure(figure)
        .update_layout(width=None)
        .to_html(
            full_html=False,
            include_plotlyjs=False,
            include_mathjax=False,
            div_id=name,  # not at random: the same result makes the same page
            default_height=f"{height}px",
            config={
                "displaylogo": False,
                "responsive": True,
                "modeBarButtonsToRemove": ["zoom2d", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
                "toImageButtonOptions": {"format": "svg", "filename": name},
            },
        )
    )
    return f'<div class="figure"><div style="min-width:{min_width}px;height:{height}px">{drawn}</div></div>'


def text_line(
    texts: Sequence[str],
    prediction: str | None = None,
    weights: Sequence[float] | None = None,
    about: Sequence[str] = (),
) -> str:
    """The tokens of a prompt, each the bluer the larger its weight, and what is predicted after them.

    What is said `about` each is shown under the mouse.
    """
    most = max(weights or [1.0]) or 1.0
    words = []
    for place, text in enumerate(texts):
        style = ""
        if weights is not None:
            alpha = 0.6 * weights[place] / most
            style = f' style="background:rgba(86,180,233,{alpha:.2f})" title="{html.escape(about[place])}"'
        words.append(f"<span{style}>{html.escape(visible(text))}</span>")
    if prediction is not None:
        words.append(f'<span class="prediction">{html.escape(visible(prediction))}</span>')
    return f'<p class="text">{"".join(words)}</p>'


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], left: Sequence[int] = ()) -> str:
    """A table of plain text; the columns numbered in `left`, and the first, begin at the left."""
    marked = ['<{tag} class="left">' if place in left else "<{tag}>" for place in range(len(columns))]
    head = "".join(
        f"{mark.format(tag='th')}{html.escape(name)}</th>" for mark, name in zip(marked, columns, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"{mark.format(tag='td')}{html.escape(visible(str(cell)))}</td>"
            for mark, cell in zip(marked, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
