"""Reports: all that there is to say of one prediction or task, measured in one go and written as one page."""

import html
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from importlib.metadata import version
from inspect import signature
from operator import or_
from os import PathLike
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor

from tracedensity.activations import neuron_name
from tracedensity.checks import minimality
from tracedensity.choices import Method
from tracedensity.curve import THRESHOLDS, DensityCurve
from tracedensity.estimation import density
from tracedensity.evaluation import evaluate
from tracedensity.files import require_folder
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.token import TokenGraph
from tracedensity.loading import bundled_models
from tracedensity.model import Transformer, as_transformer
from tracedensity.routing import Flow, trace_flow
from tracedensity.score import Scores, attribute
from tracedensity.task import Task, several_prompts
from tracedensity.unembedding import TopTokens, top_tokens

if TYPE_CHECKING:
    import pandas as pd

MOST = 3_000
"""Edges of a circuit that a report draws, half as many of two: its file is to stay small."""

_SCORING = ("graph", "ablation", "steps", "ungroup", "positions", "position", "seed")
"""Options of `density` that scores depend on as well."""


@dataclass(frozen=True, eq=False, repr=False)
class Finding:
    """What was measured for one prediction or task.

    Attributes:
        curve: Its density curve.
        circuit: The smallest circuit of the curve that is faithful enough.
        scores: The scores by which edges were ordered.
        nodes: What each head and MLP of the circuit is worth, most needed first; see `minimality`.
        candidates: The most probable next tokens and their probabilities; none of a task.
        origins: What the embedding of each token is worth to the circuit; of a prompt on the token graph only.
        flow: How the prediction flows through the circuit, by the scores; likewise.
        tokens: What edges say; likewise.
        neurons: The neurons that matter most; None where neurons cannot be told apart.
    """

    curve: DensityCurve
    circuit: Circuit
    scores: Scores
    nodes: "pd.DataFrame"
    candidates: tuple[tuple[str, float], ...] = ()
    origins: "pd.DataFrame | None" = None
    flow: Flow | None = None
    tokens: TopTokens | None = None
    neurons: "pd.DataFrame | None" = None


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """Findings on one prediction or task, or on two that are compared; made by `report`.

    Attributes:
        findings: One or two.
        faithfulness: What the circuits had to reach.
        command: What makes the report again.
        versions: Of what it was made with.
    """

    findings: tuple[Finding, ...]
    faithfulness: float
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)

    def html(self) -> str:
        """The page, which needs no network."""
        from tracedensity.plot import report_page

        return report_page(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the page to a file, which an interruption leaves as it was.

        Raises:
            ValueError: If there is no such folder.
        """
        from tracedensity.plot import write_html

        write_html(self.html(), path)

    def __repr__(self) -> str:
        return "\n\n".join([repr(finding.curve) for finding in self.findings] + [_HINT])

    def _repr_html_(self) -> str:
        # the page itself would load plotly.js once more
        return "".join(finding.curve._repr_html_() for finding in self.findings) + f"<p>{html.escape(_HINT)}</p>"


_HINT = "Report.save('report.html') writes the page with all figures."


def report(
    model: object,
    prompt: object,
    *,
    compare: object | None = None,
    faithfulness: float | int = 0.9,
    path: str | PathLike[str] | None = None,
    **options: Any,
) -> Report:
    """Measure all that a page on a prediction tells: how much of the model it needs, which part, and why.

    The curve and the circuit; what each head and MLP of the circuit, and each token that it reads, is worth, by running
    the circuit without it; how the prediction flows through it and what edges say; the neurons that matter most, found
    by the gradient of the log probability and measured by running the model without each.

    Args:
        model: A model of TransformerLens, or a name for `load_model`.
        prompt: Text, token ids, a ``[pos]`` tensor, or a `Task` (on the component graph).
        compare: Another prompt or task to set beside it.
        faithfulness: What the circuit that is looked at has to reach.
        path: Where to write the page, if anywhere.
        options: Those of `td.density`.

    Returns:
        The findings, and the page by `Report.html` and `Report.save`.

    Raises:
        ValueError: If an argument is not as described here or in `td.density`.
    """
    if not isinstance(faithfulness, float | int) or not 0 < faithfulness <= 1:
        raise ValueError(f"`faithfulness` must be above 0 and at most 1, got {faithfulness!r}.")
    if unknown := sorted(set(options) - set(signature(density).parameters)):
        raise ValueError(f"`options` must be those of `td.density`, got {', '.join(unknown)}.")
    transformer = as_transformer(model)
    if path is not None:
        require_folder(path)  # before the work, not after it
    faithfulness = float(faithfulness)
    subjects = [prompt] if compare is None else [prompt, compare]
    for name, subject in zip(("prompt", "compare"), subjects, strict=False):
        many = several_prompts(subject, options.get("attention_mask"))
        on_tokens = options.get("graph", "token") == "token" and getattr(subject, "ndim", 0) != 1
        if many is not None and on_tokens:
            raise ValueError(
                f"`{name}` must be one prompt, or a `Task` of several, got several prompts: write a report of each."
            )
    made = Report(
        tuple(_find(transformer, subject, faithfulness, options) for subject in subjects),
        faithfulness,
        _command(model, subjects, faithfulness, options),
        {name: version(name) for name in ("tracedensity", "transformer-lens", "torch", "plotly")}
        | {"python": platform.python_version()},
    )
    if path is not None:
        made.save(path)
    return made


def _find(model: Transformer, subject: object, faithfulness: float, options: Mapping[str, Any]) -> Finding:
    if isinstance(subject, Task):
        options = {"graph": "component", **options}
    thresholds = tuple(sorted({*options.get("thresholds", THRESHOLDS), faithfulness}))  # the crossing is wanted exactly
    curve = density(model, subject, **{**options, "thresholds": thresholds})
    circuit = curve.circuit(faithfulness=faithfulness)
    metric: Any = options.get("metric")
    metric = metric if callable(metric) else None
    made = curve.ranking.provenance
    scoring = {name: options[name] for name in _SCORING if name in options}
    scoring["method"] = made.method if made.method in get_args(Method) else None
    scoring["metric"] = metric or made.metric or None
    scores = attribute(model, subject, **scoring)
    nodes = minimality(model, circuit, by="node", metric=metric).iloc[::-1].reset_index(drop=True)
    if not isinstance(circuit.graph, TokenGraph):
        return Finding(curve, circuit, scores, nodes)
    drawn = [curve.circuit(size=size) for size in curve.sizes.tolist() if size <= MOST]  # of a search not nested
    return Finding(
        curve, circuit, scores, nodes,
        candidates=_candidates(model, curve),
        origins=minimality(model, circuit, by="token", metric=metric).iloc[::-1].reset_index(drop=True),
        flow=trace_flow(circuit, scores),
        tokens=top_tokens(model, reduce(or_, drawn, circuit)),
        neurons=_neurons(model, curve),
    )  # fmt: skip


def _candidates(model: Transformer, curve: DensityCurve, k: int = 5) -> tuple[tuple[str, float], ...]:
    """The most probable next tokens."""
    logits = model.logits(curve.provenance.tokens[None].to(model.device))[0]
    found = logits.softmax(-1).topk(min(k, len(logits)))
    return tuple(zip(model.texts(found.indices.tolist()), found.values.tolist(), strict=True))


def _neurons(model: Transformer, curve: DensityCurve, k: int = 10) -> "pd.DataFrame | None":
    """The neurons whose ablation would change the log probability of the prediction most, to first order.

    With what it changes when each is ablated: `effect` is the first-order one, `measured` the other.
    """
    import pandas as pd

    prompt = curve.provenance.tokens
    try:
        scores = attribute(model, prompt, method="eap", neurons=True)
    except ValueError:  # no MLPs, or experts, whose neurons cannot be told apart
        return None
    effect = scores.values["neuron"].cpu()
    best = effect.abs().flatten().topk(min(k, effect.numel())).indices
    layer, pos, neuron = (each.tolist() for each in torch.unravel_index(best, effect.shape))
    whole = Circuit(scores.graph, scores.graph.exists, scores.provenance)
    lesser = []
    for place in zip(layer, pos, neuron, strict=True):
        kept = {**whole.kept, "neuron": whole.kept["neuron"].clone()}
        kept["neuron"][place] = False
        lesser.append(whole.of_edges(kept))
    measured = evaluate(model, prompt, [whole, *lesser], metrics=("logprob",), target=curve.top_token)
    logprob = measured.metrics["logprob"]
    return pd.DataFrame({
        "neuron": [neuron_name(*pair) for pair in zip(layer, neuron, strict=True)],
        "position": pos,
        "effect": effect.flatten()[best].tolist(),
        "measured": (logprob[1:] - logprob[0]).tolist(),
    })  # fmt: skip


def _command(model: object, subjects: Sequence[object], faithfulness: float | int, options: Mapping[str, Any]) -> str:
    """The line of Python that makes the report, with names in place of what cannot be written down."""

    def written(value: object, name: str) -> str:
        value = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
        return ascii(value) if isinstance(value, str | int | float | bool | list | tuple | None) else name

    named = model if isinstance(model, str) else as_transformer(model).name
    loaded = f"td.load_model({named!r})" if isinstance(model, str) or named in bundled_models() else "model"
    arguments = [loaded, written(subjects[0], "task")]
    arguments += [f"compare={written(each, 'other_task')}" for each in subjects[1:]]
    given = {"faithfulness": faithfulness, **options}
    arguments += [f"{name}={written(value, getattr(value, '__name__', name))}" for name, value in given.items()]
    return f"td.report({', '.join(arguments)}, path='report.html')"
