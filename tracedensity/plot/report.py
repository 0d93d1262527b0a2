"""The page of a report, and the shorter one of a curve alone."""

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from tracedensity.activations import Activations
from tracedensity.curve import DensityCurve
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.component import ComponentGraph
from tracedensity.plot.attention import plot_attention, plot_top
from tracedensity.plot.caption import predicted
from tracedensity.plot.comparison import plot_curves
from tracedensity.plot.component import plot_component
from tracedensity.plot.composition import plot_composition
from tracedensity.plot.curve import plot_curve
from tracedensity.plot.difference import plot_difference
from tracedensity.plot.growth import plot_growth
from tracedensity.plot.heatmap import plot_heatmap
from tracedensity.plot.page import figure_div, page, table, text_line
from tracedensity.plot.theme import percent, quoted, rounded, visible
from tracedensity.reporting import MOST, Finding, Report
from tracedensity.score import Scores
from tracedensity.tight import TightCurve
from tracedensity.unembedding import TopTokens

_TOP = 10  # bars of what writes most
_LEGIBLE = 600  # edges of two circuits in one picture


def density_page(curve: DensityCurve, *, faithfulness: float | int = 0.9) -> str:
    """A page on one prediction or task, of what a curve holds: minimal sizes, the curve, circuits, their composition.

    Args:
        curve: What to show; no model is run. `td.report` makes a page that says more.
        faithfulness: What the circuit that is shown first has to reach, as for `DensityCurve.circuit`.
    """
    circuit = curve.circuit(faithfulness=faithfulness)
    body = [
        f"<h1>{_question(curve)}</h1>",
        _prompt(curve),
        f"<p>{_enough(curve, circuit, faithfulness)} {html.escape(curve.summary())}.</p>",
        *_curve_section(curve, ""),
        *_circuit_section(curve, circuit, faithfulness, None, None, ""),
        *_composition_section(curve, ""),
        _provenance(curve),
    ]
    return page(predicted(curve), body)


def report_page(report: Report) -> str:
    """The page of a report."""
    findings = report.findings
    suffixes = [""] if len(findings) == 1 else [f"-{number + 1}" for number in range(len(findings))]
    first, *others = findings
    body = [
        f"<h1>{'How much of the model do these two need?' if others else _question(first.curve)}</h1>",
        '<div class="side">',
        *(f"<div>{_short(finding, report.faithfulness)}</div>" for finding in findings),
        "</div>",
    ]
    for second in others:
        body += _comparison(first, second, report.faithfulness)
    for finding, suffix in zip(findings, suffixes, strict=True):
        curve = finding.curve
        if others:
            body.append(f"<h1>{html.escape(predicted(curve))}</h1>")
        body += [
            *_curve_section(curve, suffix),
            *_circuit_section(
                curve,
                finding.circuit,
                report.faithfulness,
                finding.scores,
                finding.tokens,
                suffix,
                MOST // len(findings),
            ),
            *_composition_section(curve, suffix),
            *_nodes_section(finding, suffix),
        ]
    body += ["<h2>Provenance</h2>", *(_provenance(finding.curve) for finding in findings)]
    made = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    body.append(f'<p class="note">{html.escape(made)}. To make it again:</p>')
    body.append(f"<p><code>{html.escape(report.command)}</code></p>")
    return page(" and ".join(predicted(finding.curve) for finding in findings), body)


def activations_page(activations: Activations, heads: Sequence[str] | None = None, *, n: int = 6) -> str:
    """A page on what a prompt leaves inside a model: attention patterns, and the heads and neurons that write most.

    Args:
        activations: Patterns, and with ``"z"`` and ``"post"`` what heads and neurons write.
        heads: Whose patterns to show, such as ``["a3.h1"]``; by default the `n` that write most at the last token.
        n: How many, if `heads` are not given.
    """
    body = [
        "<h1>What heads attend to, and which write most</h1>",
        text_line(activations.texts),
        figure_div(plot_attention(activations, heads, n=n), "attention"),
    ]
    model, n_layers = activations.transformer, len(activations.layers)
    for quantity, top, n_each in (
        ("z", activations.top_heads, model.n_heads),
        ("post", activations.top_neurons, model.d_mlp),
    ):
        if quantity in activations.values:
            body.append(figure_div(plot_top(top(min(_TOP, n_layers * n_each))), top.__name__))
    return page(quoted(activations.prompt), body)


# -- sections --------------------------------------------------------------------------------------


def _short(finding: Finding, faithfulness: float | int) -> str:
    """What is predicted, and the three answers that a reader wants first."""
    curve, circuit = finding.curve, finding.circuit
    parts = [_prompt(curve, finding)]
    if finding.candidates:
        rows = "".join(
            f'<tr><td class="left">{html.escape(quoted(text, 24))}</td><td>{share:.3f}</td>'
            f'<td class="left"><span class="bar" style="width:{120 * share:.0f}px"></span></td></tr>'
            for text, share in finding.candidates
        )
        parts.append(
            '<table><thead><tr><th>next token</th><th>probability</th><th class="left">'
            f"entropy {curve.entropy:.2f} nats</th></tr></thead><tbody>{rows}</tbody></table>"
        )
    else:
        parts.append(f"<p>{html.escape(curve.summary())}.</p>")
    answers = [_enough(curve, circuit, faithfulness)]
    heads = finding.nodes[~finding.nodes["node"].str.startswith("m") & (finding.nodes["loss"] > 0)].head(3)
    if len(heads):
        left = [
            f"<b>{name}</b> ({value:.2f})" for name, value in zip(heads["node"], heads["faithfulness"], strict=True)
        ]
        answers.append(
            f"The heads that it can least do without, and how faithful it is without each: {', '.join(left)}."
        )
    elif not len(finding.nodes[~finding.nodes["node"].str.startswith("m")]):
        answers.append("It has no heads: nothing is moved from one token to another.")
    else:
        answers.append("It can do without any one of its heads.")
    if finding.origins is not None and len(needed := finding.origins[finding.origins["loss"] > 0].head(3)):
        texts = curve.provenance.texts
        left = [
            f"<b>{html.escape(quoted(texts[place], 24))}</b> ({value:.2f})"
            for place, value in zip(needed["token"], needed["faithfulness"], strict=True)
        ]
        answers.append(
            f"The tokens that its information comes from, and how faithful it is without the embedding of each: "
            f"{', '.join(left)}. The bluer a token above, the more is lost without it."
        )
    parts += [f"<p>{answer}</p>" for answer in answers]
    return "\n".join(parts)


def _comparison(first: Finding, second: Finding, faithfulness: float | int) -> list[str]:
    """Both curves, and where the circuits differ; blue is the sparser one in both figures."""
    one, other = sorted((first, second), key=lambda finding: finding.circuit.fraction)
    metrics = [html.escape(visible(each.curve.metric)) for each in (first, second)]
    if metrics[0] == metrics[1]:
        drawn = figure_div(plot_curves([one.curve, other.curve], threshold=faithfulness), "compared")
    else:
        drawn = f"<p>Faithfulness is measured by {metrics[0]} here and by {metrics[1]} there, on no common scale.</p>"
    body = ["<h2>Side by side</h2>", drawn]
    if type(one.circuit.graph) is not type(other.circuit.graph):
        return body
    if one.circuit.graph == other.circuit.graph and (one.circuit | other.circuit).n_edges <= _LEGIBLE:
        names = [predicted(each.curve, 12) for each in (one, other)]
        figure = plot_difference(one.circuit, other.circuit, names=(names[0], names[1]), scores=one.scores)
    else:
        figure = plot_heatmap(one.circuit, minus=other.circuit)
    return [*body, "<p>Where the two circuits differ:</p>", figure_div(figure, "difference")]


def _curve_section(curve: DensityCurve, suffix: str) -> list[str]:
    return [
        "<h2>How faithful a circuit of each size is</h2>",
        f'<div class="wide">{curve.html_table()}</div>',
        figure_div(plot_curve(curve), f"curve{suffix}"),
    ]


def _circuit_section(
    curve: DensityCurve,
    circuit: Circuit,
    faithfulness: float | int,
    scores: Scores | None,
    tokens: TopTokens | None,
    suffix: str,
    most: int = MOST,
) -> list[str]:
    if isinstance(circuit.graph, ComponentGraph):
        note = f"{circuit.pruned_size:,} of its edges are on a path from the input to the logits."
        figure: go.Figure = plot_component(circuit, scores=scores)
    else:
        note = "The slider shows circuits of other sizes."
        figure = plot_growth(curve, scores=scores, tokens=tokens, faithfulness=faithfulness, max_edges=most)
    return ["<h2>The circuit</h2>", f"<p>{note}</p>", figure_div(figure, f"circuit{suffix}")]


def _composition_section(curve: DensityCurve, suffix: str) -> list[str]:
    return ["<h2>What circuits are made of</h2>", figure_div(plot_composition(curve), f"composition{suffix}")]


def _nodes_section(finding: Finding, suffix: str, most: int = 12) -> list[str]:
    shown = finding.circuit if isinstance(finding.curve, TightCurve) else finding.curve.ranking
    heading = "Which heads" if finding.neurons is None else "Which heads and neurons"
    body = [f"<h2>{heading}</h2>", figure_div(plot_heatmap(shown), f"heads{suffix}")]
    body.append(
        "<p>What each head and MLP of the circuit is worth, by running the circuit without it; the most needed first."
        + (
            " The flow is what scores say of it: how much of all that the prediction is made of passes through."
            if finding.flow
            else ""
        )
        + "</p>"
    )
    columns = ["head or MLP", "edges", "faithfulness without it"]
    if finding.flow is not None:
        columns += ["share of the flow", "most of it", "says"]
    strongest = finding.nodes.head(most)[["node", "size", "faithfulness"]]
    rows = [_node(finding, *row) for row in strongest.itertuples(index=False)]
    body.append(table(columns, rows, left=(4, 5)))
    if len(finding.nodes) > most:
        body.append(f'<p class="note">and {len(finding.nodes) - most:,} more</p>')
    if finding.neurons is not None:
        texts = finding.curve.provenance.texts
        body.append(
            f"<p>Neurons of the whole model that matter most for {html.escape(quoted(finding.curve.top_text, 24))}, "
            "each at one token: how its log probability (nats) changes when the neuron is ablated there.</p>"
        )
        rows = [
            [name, f"{quoted(texts[place], 24)} ({place})", f"{measured:+.3f}", f"{effect:+.3f}"]
            for name, place, effect, measured in finding.neurons.itertuples(index=False)
        ]
        body.append(table(["neuron", "at", "measured", "to first order"], rows, left=(1,)))
    return body


def _node(finding: Finding, name: str, size: int, faithfulness: float | int) -> list[str]:
    """What a table says of a head or MLP: of its strongest edge where that leads, and what it says."""
    row = [name, f"{size:,}", f"{faithfulness:.3f}".replace("-0.000", "0.000")]
    if finding.flow is None:
        return row
    graph, texts = finding.flow.graph, finding.curve.provenance.texts
    kind = "head" if name.startswith("a") else "mlp" if "mlp" in graph.shapes else "neuron"
    layer, *head = (int(number) for number in name[1:].split(".h"))
    flow = finding.flow.edges[kind][(layer, *head)]
    place = [int(each) for each in (flow == flow.max()).nonzero()[0]]
    says = [] if finding.tokens is None else finding.tokens.of(kind, (layer, *head, *place))
    way = quoted(texts[place[0]], 16)
    if head:
        way = f"{quoted(texts[place[1]], 16)} → {way}"
    return [*row, f"{float(flow.sum()):.1%}", way, ", ".join(quoted(text, 16) for text in says)]


# -- words -----------------------------------------------------------------------------------------


def _question(curve: DensityCurve) -> str:
    task = curve.provenance.named_task
    what = "this prediction" if task is None else f"'{html.escape(visible(task.name))}'"
    return f"How much of the model does {what} need?"


def _prompt(curve: DensityCurve, finding: Finding | None = None) -> str:
    """The prompt and the prediction, or some pairs of the task."""
    task = curve.provenance.named_task
    if task is None:
        texts = curve.provenance.texts
        if finding is None or finding.origins is None:
            return text_line(texts, curve.top_text)
        lost = dict(zip(finding.origins["token"], finding.origins["loss"].clip(lower=0.0), strict=True))
        left = dict(zip(finding.origins["token"], finding.origins["faithfulness"], strict=True))
        about = [
            f"faithfulness without it: {left[place]:.3f}" if place in left else "not read"
            for place in range(len(texts))
        ]
        return text_line(texts, curve.top_text, [lost.get(place, 0.0) for place in range(len(texts))], about)
    shown = task.to_dataframe().head(5)
    return table(list(shown.columns), shown.itertuples(index=False), left=range(len(shown.columns)))


def _enough(curve: DensityCurve, circuit: Circuit, faithfulness: float | int) -> str:
    measured = "" if circuit.faithfulness is None else f" (measured: {circuit.faithfulness:.3f})"
    return (
        f"<b>{circuit.n_edges:,} of {curve.n_edges:,} edges ({percent(circuit.fraction)})</b> suffice for "
        f"{rounded(100 * faithfulness, 4)}% faithfulness{measured}."
    )


def _provenance(curve: DensityCurve) -> str:
    about, conditions = curve.provenance, curve.conditions
    if isinstance(curve.ranking.graph, ComponentGraph):
        how = f"effects on {about.metric or 'nothing'}, absent edges carry {conditions.ablation} values."
    else:
        how = (
            f"skip connections {'all kept' if conditions.keep_residual else 'ablated like other edges'}, "
            f"attention {conditions.attention}, {conditions.ablation} ablation."
        )
    first = "" if about.task is None or len(about.task) == 1 else " of the first prompt"
    lines = [
        f"Model {about.model} ({about.fingerprint}), token ids{first} {list(about.token_ids)}.",
        f"Edges scored by {about.method}, ordered by {curve.ranking.family}, metric {curve.metric}, seed {about.seed}, "
        + how,
        "Minimal sizes are those of the circuits that were run, and upper bounds on the true minimum.",
    ]
    return f'<p class="note">{"<br>".join(html.escape(visible(line)) for line in lines)}</p>'
