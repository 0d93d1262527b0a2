"""Pages: figures as one HTML file that needs no network."""

import html
from os import PathLike

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tracedensity.curve import DensityCurve
from tracedensity.files import replace_file
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.component import ComponentGraph
from tracedensity.plot.circuit import plot_circuit
from tracedensity.plot.component import plot_component
from tracedensity.plot.curve import plot_curve
from tracedensity.plot.theme import COLOURS, FAINT, FONT, INK, MUTED, percent, visible

_STYLE = f"""
body {{ font: 15px/1.5 {FONT}; color: {INK}; max-width: 1200px; margin: 0 auto; padding: 24px 16px; }}
h1 {{ font-size: 22px; margin: 0 0 8px; }}
.prompt {{ margin: 0 0 16px; line-height: 2; overflow-wrap: anywhere; }}
.prompt span {{ background: {FAINT}; border-radius: 3px; padding: 2px 0; margin-right: 2px; white-space: pre-wrap; }}
.prompt .prediction {{ background: {COLOURS["head"]}; color: white; padding: 0 4px; }}
.prompt .prediction {{ display: inline-block; line-height: 1.5; }}
table {{ border-collapse: collapse; margin: 16px 0; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 3px 16px 3px 0; border-bottom: 1px solid {FAINT}; font-weight: normal; }}
th, footer {{ color: {MUTED}; }}
.figure {{ overflow-x: auto; margin: 24px 0; }}
.table {{ overflow-x: auto; }}
footer {{ font-size: 13px; overflow-wrap: anywhere; }}
"""


def density_page(curve: DensityCurve, *, faithfulness: float = 0.9) -> str:
    """A page on one prediction or task: what is asked, the minimal sizes, the curve, the circuit at one faithfulness.

    Args:
        curve: What to show; no model is run.
        faithfulness: What the circuit that is drawn has to reach, as for `DensityCurve.circuit`.
    """
    circuit = curve.circuit(faithfulness=faithfulness)
    if isinstance(circuit.graph, ComponentGraph):
        return _task_page(curve, circuit, faithfulness)
    texts = curve.provenance.texts
    prompt = "".join(f"<span>{html.escape(visible(text))}</span>" for text in texts)
    summary = (
        f"The model's most probable token (p = {curve.top_probability:.2f}, entropy {curve.entropy:.2f} nats). "
        f"{circuit.n_edges:,} of {curve.n_edges:,} edges ({percent(circuit.fraction)}) are enough for a faithfulness "
        f"of {faithfulness:g}. Density (area under the curve): {curve.auc:.2f}."
    )
    body = [
        "<h1>How much of the model does this prediction need?</h1>",
        f'<p class="prompt">{prompt}<span class="prediction">{html.escape(visible(curve.top_text))}</span></p>',
        f"<p>{html.escape(summary)}</p>",
        f'<div class="table">{curve.html_table()}</div>',
        _div(plot_curve(curve), "curve", min_width=560),
        _div(plot_circuit(circuit, prediction=curve.top_text), "circuit", min_width=max(560, 120 + 16 * len(texts))),
        f"<footer>{_provenance(curve)}</footer>",
    ]
    return _page(f"{visible(curve.top_text)} after {visible(curve.provenance.prompt)}", "\n".join(body))


def _task_page(curve: DensityCurve, circuit: Circuit, faithfulness: float) -> str:
    task = curve.provenance.named_task
    name = visible(curve.provenance.prompt if task is None else task.name)
    summary = (
        f"{curve.summary()}. {circuit.n_edges:,} edges ({percent(circuit.fraction)}) are enough for a faithfulness of "
        f"{faithfulness:g}; {circuit.pruned_size:,} of them are on a path from the input to the logits."
    )
    pairs = ""
    if task is not None and task.answer is not None:
        pairs = f'<div class="table">{task.to_dataframe().head(5).to_html(index=False, border=0)}</div>'
    body = [
        f"<h1>How much of the model does '{html.escape(name)}' need?</h1>",
        f"<p>{html.escape(summary)}</p>",
        f'<div class="table">{curve.html_table()}</div>',
        pairs,
        _div(plot_curve(curve), "curve", min_width=560),
        _div(plot_component(circuit), "circuit", min_width=560),
        f"<footer>{_provenance(curve)}</footer>",
    ]
    return _page(name, "\n".join(body))


def write_html(figure: go.Figure | str, path: str | PathLike[str]) -> None:
    """Write a figure, or a page that is already HTML, as one file that opens without a network.

    An interrupted write leaves the old file as it was.

    Args:
        figure: A figure, or what `density_page` returns.
        path: Where to.

    Raises:
        ValueError: If there is no such folder.
    """
    replace_file(
        path, figure if isinstance(figure, str) else _page("tracedensity", _div(figure, "figure", min_width=320))
    )


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n"
        f"<script>{get_plotlyjs()}</script>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _div(figure: go.Figure, name: str, min_width: int) -> str:
    """A figure without plotly.js; a narrow window scrolls it rather than squeezing it below `min_width` px."""
    height = figure.to_dict()["layout"].get("height", 500)
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        div_id=name,  # not at random: the same result makes the same page
        default_height=f"{height}px",
        config={"displaylogo": False, "responsive": True, "toImageButtonOptions": {"format": "svg", "filename": name}},
    )
    return f'<div class="figure"><div style="min-width:{min_width}px;height:{height}px">{drawn}</div></div>'


def _provenance(curve: DensityCurve) -> str:
    about = curve.provenance
    conditions = curve.conditions
    if isinstance(curve.ranking.graph, ComponentGraph):
        how = f"effects on {about.metric or 'nothing'}, absent edges carry {conditions.ablation} values."
    else:
        how = (
            f"skip connections {'all kept' if conditions.keep_residual else 'ablated like other edges'}, "
            f"attention {conditions.attention}."
        )
    first = "" if about.task is None or len(about.task) == 1 else " of the first prompt"
    lines = [
        f"Model {about.model} ({about.fingerprint}), token ids{first} {list(about.token_ids)}.",
        f"Edges scored by {about.method}, ordered by {curve.ranking.family}, metric {curve.metric}, seed {about.seed}, "
        + how,
        "Minimal sizes are those of the circuits that were run, and upper bounds on the true minimum.",
    ]
    return "<br>".join(html.escape(line) for line in lines)
