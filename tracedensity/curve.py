"""Density curves: how faithful the circuit of each size is, and the smallest that is faithful enough."""

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import log10
from operator import index
from os import PathLike
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.choices import FaithfulnessMetric
from tracedensity.evaluation import paper_sizes
from tracedensity.extract import Ranking
from tracedensity.faithfulness import faithfulness
from tracedensity.graph.circuit import Circuit
from tracedensity.provenance import Provenance
from tracedensity.run import Conditions
from tracedensity.sparkline import spark_svg, spark_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tracedensity.plot import Theme
    from tracedensity.score import Scores

THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.99)
_ROUNDING = 1e-6  # faithfulness of the whole graph is 1 only up to rounding


@dataclass(frozen=True, eq=False)
class Points:
    """Faithfulness of some circuits, smallest first.

    Attributes:
        sizes: Numbers of edges, strictly increasing.
        faithfulness: Share of the model's prediction that each keeps; 1 is all.
    """

    sizes: Int[Tensor, " point"]
    faithfulness: Float[Tensor, " point"]

    def __post_init__(self) -> None:
        if not (self.sizes.diff() > 0).all():
            raise ValueError(f"`sizes` must strictly increase, got {self.sizes.tolist()}.")
        if not (finite := self.faithfulness.isfinite()).all():
            bad = self.sizes[~finite].tolist()
            raise ValueError(f"`faithfulness` must be finite, got NaN or infinity at sizes {bad}.")
        if len(self.sizes) != len(self.faithfulness) or not len(self.sizes):
            raise ValueError(f"`faithfulness` must have one entry per size, got {len(self.faithfulness)}.")


@dataclass(frozen=True, eq=False, repr=False)
class DensityCurve(Points):
    """Faithfulness of a nested family of circuits, for one prediction or for a task.

    Attributes:
        sizes: Numbers of edges of the circuits that were run, strictly increasing, up to all edges.
        faithfulness: Share of the model's prediction that each keeps; 1 is all.
        ranking: The order in which edges enter: the family itself.
        thresholds: Faithfulnesses around which the curve was refined.
        metric: What faithfulness means, see `density`.
        conditions: How the circuits were run.
        entropy: Entropy of the model's prediction in nats; mean over the examples of a task.
        top_token: The token that it finds most probable; on the first example of a task.
        top_text: Its text.
        top_probability: Its probability.
        random: The density papers' random baseline: connected subgraphs grown at random, run with all skip
            connections kept, whatever the conditions of the curve; None if it was not asked for.
        inverse: Their inverse baseline: everything but the circuit of a size, with all skip connections.
        values: The metric of each circuit on each example, where there are several.
        full: The metric of the model on each example; None where faithfulness is no share of a difference.
        empty: That of the circuit without edges.
        pruned_sizes: Numbers of edges on a path from the input to the logits; None on the token graph.
        also: Other metrics of each circuit, mean over examples.
        situations: Where circuits were run, if that is not only where they are at home; faithfulness is the least
            there.
        robust: The curve of circuits that have to be faithful in several situations, if that was asked for.
    """

    ranking: Ranking
    thresholds: tuple[float, ...]
    metric: FaithfulnessMetric | str
    conditions: Conditions
    entropy: float
    top_token: int
    top_text: str
    top_probability: float
    random: Points | None = None
    inverse: Points | None = None
    values: Float[Tensor, "point example"] | None = field(default=None, repr=False)
    full: Float[Tensor, " example"] | None = field(default=None, repr=False)
    empty: Float[Tensor, " example"] | None = field(default=None, repr=False)
    pruned_sizes: Int[Tensor, " point"] | None = field(default=None, repr=False)
    also: Mapping[str, Float[Tensor, " point"]] = field(default_factory=dict, repr=False)
    situations: tuple[str, ...] = ()
    robust: "DensityCurve | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sizes[0] < 0 or self.sizes[-1] != self.n_edges:
            raise ValueError(f"`sizes` must be from 0 up to all {self.n_edges} edges, got {self.sizes.tolist()}.")

    _is_envelope = False  # whether the best circuit between two sizes is that of the smaller one

    @property
    def provenance(self) -> Provenance:
        """The model, the prompt and the method."""
        return self.ranking.provenance

    @property
    def n_edges(self) -> int:
        """Edges of the whole graph."""
        return self.ranking.n_edges

    @property
    def auc(self) -> float:
        """Density as the s-Trace paper's code has it: area under 1 - faithfulness over log10 of relative size.

        Trapezoids on the paper's 27 sizes, those of no edge counted as 1e-8 (so they add up to three
        decades). Higher is denser. Compare prompts of equal length only, or use `auc_of_edges`.

        References:
            arXiv 2605.27033, section on density; ``methods`` of its public code.
        """
        sizes = paper_sizes(self.n_edges)
        return self._area(sizes, (sizes / self.n_edges).clamp(1e-8, 1.0))

    @property
    def auc_of_edges(self) -> float:
        """The same area over the sizes of at least one edge only."""
        sizes = paper_sizes(self.n_edges)
        sizes = sizes[sizes > 0]
        return self._area(sizes, sizes / self.n_edges)

    def _area(self, sizes: Tensor, relative: Tensor) -> float:
        lost = 1 - self.faithfulness[torch.searchsorted(self.sizes, sizes)]
        return float(torch.trapezoid(lost.double(), relative.double().log10()))

    def minimal_size(self, threshold: float | int, stable: bool = False) -> int:
        """Size of the smallest circuit that reaches a faithfulness.

        An upper bound on the true minimum: only circuits of this family are considered, and of these only
        the ones that were run. At the curve's own thresholds the crossing is known to 2% or one edge; what
        happens wholly between two sizes of the grid, an earlier crossing or a relapse, is not seen. On small
        graphs, ``density(..., sizes=range(n_edges))`` runs them all.

        Args:
            threshold: Faithfulness to reach, in (0, 1].
            stable: Whether all larger circuits on the curve must reach it as well; if not, the first
                circuit that does is enough (faithfulness need not grow with size).

        Returns:
            A number of edges; all of the graph's if nothing less is enough.

        Raises:
            ValueError: If the threshold is outside (0, 1].
        """
        require_thresholds((threshold,))
        return int(self.sizes[crossings(self.faithfulness, float(threshold))[stable]])

    def circuit(
        self, *, faithfulness: float | int | None = None, size: SupportsIndex | None = None, stable: bool = False
    ) -> Circuit:
        """A circuit of the family: the smallest that is faithful enough, or one of a given size.

        Args:
            faithfulness: What it has to reach, as for `minimal_size`.
            size: Or its number of edges.
            stable: As for `minimal_size`.

        Raises:
            ValueError: If not exactly one of `faithfulness` and `size` is given, or it is out of range.
        """
        if (faithfulness is None) == (size is None):
            raise ValueError("give one of `faithfulness` and `size`, for example `curve.circuit(faithfulness=0.9)`.")
        if size is None:
            assert faithfulness is not None
            size = self.minimal_size(faithfulness, stable)
        size = index(size)
        where = torch.searchsorted(self.sizes, size)
        measured = None
        if where < len(self.sizes) and self.sizes[where] == size and not self.situations:
            measured = float(self.faithfulness[where])
        kept = self.ranking.circuit(size).kept
        return Circuit(
            self.ranking.graph,
            kept,
            self.provenance,
            ablation=self.conditions.ablation,
            keep_residual=self.conditions.keep_residual,
            attention=self.conditions.attention,
            metric=self.metric,
            faithfulness=measured,
        )

    def faithfulness_per_example(self) -> Float[Tensor, "point example"]:
        """Faithfulness of each circuit on each example by itself.

        Where it is a share of a difference, examples on which model and empty circuit hardly differ give huge numbers,
        and infinite ones where they do not: look at `full` and `empty`. The mean of these shares is not the share of
        the means that the curve is made of.

        Raises:
            ValueError: If there is one example only.
        """
        if self.values is None:
            raise ValueError("`curve` must be of several examples to be looked at one by one, got one prompt.")
        return each_of(self.values, self.metric, self.full, self.empty)

    def minimal_size_per_example(self, threshold: float | int, stable: bool = False) -> Int[Tensor, " example"]:
        """`minimal_size` on each example by itself, among the circuits that were run.

        Known to 2% or one edge at the curve's own thresholds if it was made by ``density(..., per_example=True)``;
        otherwise the curve is fine only where that of all examples together is.

        Raises:
            ValueError: If the threshold is outside (0, 1], or there is one example only.
        """
        require_thresholds((threshold,))
        columns = self.faithfulness_per_example().T
        return self.sizes[[crossings(column, float(threshold))[stable] for column in columns]]

    def table(self) -> "pd.DataFrame":
        """One row per threshold: first and stable minimal size, in edges and as shares, and what the first reaches."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `table`."""
        rows = []
        for threshold in self.thresholds:
            first, stable = self.minimal_size(threshold), self.minimal_size(threshold, stable=True)
            reached = float(self.faithfulness[torch.searchsorted(self.sizes, first)])
            pruned = {}
            if self.pruned_sizes is not None:
                pruned["pruned_size"] = int(self.pruned_sizes[torch.searchsorted(self.sizes, first)])
            rows.append({
                "threshold": threshold,
                "size": first,
                **pruned,
                "fraction": first / self.n_edges,
                "stable_size": stable,
                "stable_fraction": stable / self.n_edges,
                "faithfulness": reached,
                **({} if self.robust is None else {"robust_size": self.robust.minimal_size(threshold)}),
            })  # fmt: skip
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the curve, without circuits, as what JSON can hold."""
        return {
            "model": self.provenance.model,
            "method": self.provenance.method,
            "family": self.ranking.family,
            "metric": self.metric,
            "keep_residual": self.conditions.keep_residual,
            "attention": self.conditions.attention,
            "ablation": self.conditions.ablation,
            "seed": self.provenance.seed,
            **self._task_dict(),
            **self._robust_dict(),
            "tokens": list(self.provenance.texts),
            "token_ids": list(self.provenance.token_ids),
            "n_edges": self.n_edges,
            "entropy": self.entropy,
            "top_token": self.top_text,
            "top_token_id": self.top_token,
            "top_probability": self.top_probability,
            "auc": self.auc,
            "auc_of_edges": self.auc_of_edges,
            "sizes": self.sizes.tolist(),
            "faithfulness": self.faithfulness.tolist(),
            **({"also": {name: values.tolist() for name, values in self.also.items()}} if self.also else {}),
            "minimal_size": {
                plain(row["threshold"]): {
                    "first": row["size"],
                    "stable": row["stable_size"],
                    **({"pruned": row["pruned_size"]} if "pruned_size" in row else {}),
                    "fraction": row["fraction"],
                    "stable_fraction": row["stable_fraction"],
                    "faithfulness": row["faithfulness"],
                }
                for row in self.rows()
            },
            "baselines": {
                name: {"sizes": points.sizes.tolist(), "faithfulness": points.faithfulness.tolist()}
                for name, points in (("random", self.random), ("inverse", self.inverse))
                if points is not None
            },
        }

    def _robust_dict(self) -> dict[str, Any]:
        if self.robust is None:
            return {}
        sizes = {plain(each): self.robust.minimal_size(each) for each in self.thresholds}
        known = {f"robust_{name}": values for name, values in self.robust._certificates().items()}
        return {"robust_minimal_size": sizes, **known, "situations": list(self.robust.situations)}

    def _certificates(self) -> dict[str, Any]:
        """What is known of the circuits at the thresholds: nothing of those that no search has found."""
        return {}

    def _task_dict(self) -> dict[str, Any]:
        about: dict[str, Any] = {}
        task = self.provenance.named_task
        if task is not None:
            about = {"task": task.name, "n_examples": len(task), "score_metric": self.provenance.metric}
        if self.full is not None and self.empty is not None:
            about |= {"full": float(self.full.mean()), "empty": float(self.empty.mean())}
        if about.get("n_examples", 1) > 1 and self.values is not None:
            sizes = {plain(each): self.minimal_size_per_example(each).tolist() for each in self.thresholds}
            about["minimal_size_per_example"] = sizes
        return about

    @property
    def _about(self) -> str:
        """The prompt, or the task."""
        task = self.provenance.named_task
        return repr(self.provenance.prompt if task is None else task)

    def save(self, path: str | PathLike[str]) -> None:
        """Write to one safetensors file, rankings and metadata included; `td.load` reads it."""
        from tracedensity.files import curve_file, replace_file

        replace_file(path, curve_file(self))

    def plot(self, *, theme: "Theme | str" = "light") -> "go.Figure":
        """Faithfulness over circuit size, with thresholds and baselines."""
        from tracedensity.plot import plot_curve

        return plot_curve(self, theme=theme)

    def plot_circuits(self, scores: "Scores | None" = None, **options: Any) -> "go.Figure":
        """The circuit of each size under a slider; options are those of `tracedensity.plot.plot_growth`."""
        from tracedensity.plot import plot_growth

        return plot_growth(self, scores=scores, **options)

    def plot_composition(self, *, theme: "Theme | str" = "light") -> "go.Figure":
        """What circuits of each size are made of: heads, MLPs, skip connections, and quarters of the layers."""
        from tracedensity.plot import plot_composition

        return plot_composition(self, theme=theme)

    def summary(self) -> str:
        """One line: the prediction or the task, and how much of the graph it needs."""
        size = f"{self.n_edges:,} edges; density (AUC) {self.auc:.2f}"
        if self.full is None or self.empty is None:
            return (
                f"{self.top_text!r} follows with probability {self.top_probability:.2f} "
                f"(entropy {self.entropy:.2f} nats); {size}"
            )
        return (
            f"{self.metric} {float(self.full.mean()):.2f}, with everything ablated {float(self.empty.mean()):.2f} "
            f"({self.conditions.ablation}), over {len(self.full)} examples; {size}"
        )

    def __repr__(self) -> str:
        lines = [f"DensityCurve: {self.provenance}", self._about, self.summary(), self._spark_text(), ""]
        pruned = "" if self.pruned_sizes is None else f"{'after pruning':>16}"
        robust = "" if self.robust is None else f"{'robust':>10}"
        lines.append(f"{'faithfulness':>12}{'minimal circuit':>18}{'share':>9}{'stable from':>14}{pruned}{robust}")
        for row in self.rows():
            name, size, fraction, stable = (row[k] for k in ("threshold", "size", "fraction", "stable_size"))
            pruned = f"{row['pruned_size']:>16,}" if "pruned_size" in row else ""
            robust = f"{row['robust_size']:>10,}" if "robust_size" in row else ""
            lines.append(f"{plain(name):>12}{size:>12,} edges{percent(fraction):>9}{stable:>14,}{pruned}{robust}")
        return "\n".join([*lines, *([""] * (self.robust is not None)), *self._robust_lines()])

    def _robust_lines(self) -> list[str]:
        """What "robust" means."""
        return [] if self.robust is None else ["robust: as faithful in all of these:", *self.robust.situations]

    def _repr_html_(self) -> str:
        return (
            f"<p><b>{type(self).__name__}</b> {html.escape(str(self.provenance))}<br>"
            f"<code>{html.escape(self._about)}</code><br>{html.escape(self.summary())}</p>"
            f"{self._spark_svg()}{self.html_table()}"
        )

    def _spark_svg(self) -> str:
        """The curve in small, without plotly; a logarithmic scale has no 0, so the empty circuit stands at 1/2."""
        sizes = self.sizes.double().clamp(min=0.5).log10().tolist()
        title = f"faithfulness of circuits of {int(self.sizes[0]):,} to {self.n_edges:,} edges, log scale"
        return spark_svg(sizes, self.faithfulness.tolist(), title, steps=self._is_envelope)

    def _spark_text(self, n_bars: int = 24) -> str:
        """The curve in a line of text, at sizes equally far apart on a logarithmic scale."""
        sizes = torch.logspace(0, log10(self.n_edges), n_bars, dtype=torch.float64).round().long()
        points = (torch.searchsorted(self.sizes, sizes, right=True) - 1).clamp(min=0)
        return f"faithfulness of 1 to {self.n_edges:,} edges  {spark_text(self.faithfulness[points].tolist())}"

    def html_table(self) -> str:
        """Minimal sizes as a table of HTML, and what "robust" means if that was asked for."""
        columns = self._columns()
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(shown(row))}</td>' for shown in columns.values())}</tr>"
            for row in self.rows()
        )
        head = "".join(f"<th>{name}</th>" for name in columns)
        remark = "<br>".join(html.escape(line) for line in self._robust_lines())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{remark and f'<p>{remark}</p>'}"

    def _columns(self) -> dict[str, Callable[[dict[str, Any]], str]]:
        """Titles of the table's columns, and what stands in them."""
        return {
            "faithfulness": lambda row: plain(row["threshold"]),
            "minimal circuit (edges)": lambda row: f"{row['size']:,}",
            "share of all edges": lambda row: percent(row["fraction"]),
            "stable from (edges)": lambda row: f"{row['stable_size']:,}",
            **({} if self.pruned_sizes is None else {"after pruning (edges)": lambda row: f"{row['pruned_size']:,}"}),
            **({} if self.robust is None else {"robust (edges)": lambda row: f"{row['robust_size']:,}"}),
        }


def crossings(faithfulness: Float[Tensor, " point"], threshold: float) -> tuple[int, int]:
    """Which point is the first to reach a threshold, and from which one on all do."""
    reached = faithfulness >= threshold - _ROUNDING
    reached[-1] = True  # the whole graph is the model
    failed = (~reached).nonzero()
    return int(reached.nonzero()[0]), int(failed[-1]) + 1 if len(failed) else 0


def each_of(
    values: Float[Tensor, "point example"],
    metric: str,
    full: Float[Tensor, " example"] | None,
    empty: Float[Tensor, " example"] | None,
) -> Float[Tensor, "point example"]:
    """Faithfulness on each example by itself."""
    if full is None or empty is None:
        return faithfulness(metric, values)
    return (values - empty) / (full - empty)


def plain(threshold: float) -> str:
    """All digits of a threshold, and no others: 0.9, 1."""
    return repr(threshold).removesuffix(".0")


def percent(share: float | int) -> str:
    """A share in per cent with three digits, never in powers of ten."""
    return np.format_float_positional(100 * share, precision=3, fractional=False, trim="-") + "%"


def require_thresholds(thresholds: tuple[float | int, ...]) -> None:
    bad = [each for each in thresholds if not isinstance(each, float | int) or not 0 < each <= 1]
    if bad or not thresholds:
        raise ValueError(f"`thresholds` must be faithfulnesses above 0 and at most 1, got {bad or 'none'}.")
