"""Tables: what a sweep writes of each prompt, threshold and size, column by column."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.composition import Composition, counts_in
from tracedensity.curve import DensityCurve
from tracedensity.evaluation import RELATIVE_SIZES, paper_sizes
from tracedensity.faithfulness import entropy, kl_divergence
from tracedensity.graph.component import ComponentGraph
from tracedensity.graph.token import TokenGraph
from tracedensity.groups import by_component, by_part, by_source
from tracedensity.model import Transformer
from tracedensity.study.contexts import Context, written
from tracedensity.study.counts import Counts
from tracedensity.tight import TightCurve

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = 1
"""Version of the columns; it grows when one is removed or means something else."""

TableName: TypeAlias = Literal["prompts", "thresholds", "points"]

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its name.
        type: What it holds, as pyarrow calls it.
        about: What that is.
    """

    name: str
    type: str
    about: str


def _columns(text: str) -> tuple[Column, ...]:
    rows = (line.split(None, 2) for line in text.splitlines() if line)
    return tuple(Column(name, kind, about) for name, kind, about in rows)


_KEYS = """
index           int64          number of the prompt in the sweep
id              string         its name
document        string         what it was taken from
"""

TABLES: Mapping[str, tuple[Column, ...]] = {
    "prompts": _columns(
        _KEYS
        + """
source          string         the file
domain          string         what kind of text, if that was said
group           string         prompts of one group have the same target and reach back differently far
text            string         the prompt
text_hash       string         SHA-256 of the text, or of tokens that part a character: the same prompt in other sweeps
error           string         why there are no numbers; null if there are
tokens          list<int32>    token ids, one that begins the sequence included
n_tokens        int32          how many
target          int32          token that comes next in the corpus; null if not known, or where `position` is given
target_text     string         its text
top_token       int32          token that the model finds most probable
top_text        string         its text
top_probability double         its probability
margin          double         the same minus the probability of the second
entropy         double         of the model's prediction, nats
surprisal       double         -log p(target), nats
rarity_target   double         -log10 of the frequency of the target in the named corpus
rarity_top      double         the same of the top token
rarity_expected double         its mean under the model's prediction
kl_unigram      double         KL(prediction || frequencies), nats
n_edges         int64          edges of the whole graph
auc             double         density: area under 1 - faithfulness over log10 of the share of edges
auc_of_edges    double         the same over sizes of at least one edge
auc_random      double         the same of random circuits, on the sizes that were run
auc_inverse     double         the same of everything but the circuit
auc_coarse      double         the same of the curve itself on those sizes
sizes           list<int64>    numbers of edges of all circuits that were run
faithfulness    list<double>   share of the prediction that each keeps
from_first      list<int64>    edges of each of these circuits that leave the first token; null if tokens are no nodes
entered         list<int64>    smallest circuit that each component has an edge in
passes          int64          forward passes that searches took; 0 without a search
model           string         name of the model
fingerprint     string         hash of its weights
graph           string         what an edge is
method          string         how edges were scored
family          string         how scores became an order
metric          string         what faithfulness means
ablation        string         what replaced absent edges
seed            int64          for whatever was drawn
versions        string         of tracedensity, TransformerLens and torch
"""
    ),
    "thresholds": _columns(
        _KEYS
        + """
threshold       double         faithfulness to reach
size            int64          edges of the smallest circuit that reaches it
stable_size     int64          of the smallest from which on all larger ones reach it
robust_size     int64          of the smallest that reaches it under every ablation of `robust`; null without
pruned_size     int64          edges of the smallest on a path to the logits; null on the token graph, or if refined
fraction        double         size as a share of all edges
stable_fraction double         the other as a share
per_token       double         size over the tokens of the prompt
n_components    int64          heads, MLPs and skip connections with an edge in the circuit, positions united
component_share double         the same as a share of all of them
later_fraction  double         size as a share, both without edges that leave the first token; null as above
faithfulness    double         what the circuit reaches
by_part         list<int64>    its edges of heads, of MLPs and of skip connections
by_quarter      list<int64>    its edges in each quarter of the layers, lowest first
"""
    ),
    "points": _columns(
        _KEYS
        + """
share           double         size of the density papers, as a share of all edges
size            int64          edges of the circuit
faithfulness    double         share of the prediction that it keeps
random          double         the same of a random circuit of this size
inverse         double         the same of everything but the circuit
top1            double         1 if its most probable token is the model's
nucleus         double         largest mass whose nucleus is the model's, see `nucleus_recovery`
entropy         double         of its prediction, nats
unigram_tv      double         total variation distance of its prediction to the frequencies
by_part         list<int64>    as for thresholds
by_quarter      list<int64>    as for thresholds
"""
    ),
}
"""Columns of the tables; null is what is not known. A part of the component graph is that of the writer: the embedding,
heads, MLPs."""

ALSO = ("top1", "nucleus", "entropy")
"""Metrics that are measured on every circuit beside faithfulness."""


def schema(name: str) -> "pa.Schema":
    """The columns of a table as Parquet has them."""
    import pyarrow as pa

    types = {
        "int64": pa.int64(), "int32": pa.int32(), "double": pa.float64(), "string": pa.string(),
        "list<int32>": pa.list_(pa.int32()), "list<int64>": pa.list_(pa.int64()),
        "list<double>": pa.list_(pa.float64()),
    }  # fmt: skip
    return pa.schema([pa.field(column.name, types[column.type]) for column in TABLES[name]])


def text_hash(text: str) -> str:
    """What the same text has in every sweep, whatever the tokenizer."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def keys_of(number: int, context: Context) -> Row:
    """Columns by which rows of tables belong together."""
    return {"index": number, "id": context.id, "document": context.document}


def context_row(context: Context, tokens: Int[Tensor, " pos"] | None, target: int | None, model: Transformer) -> Row:
    """What is known of a prompt before it is run."""
    ids = None if tokens is None else tokens.tolist()
    own = ids if ids is not None else []
    inner = own[len(model.beginning) :] if tuple(own[: len(model.beginning)]) == model.beginning else own
    text = written(context.prompt if isinstance(context.prompt, str) else model.text(inner))
    # pieces of a character all read alike, so that only their tokens tell them apart
    torn = not isinstance(context.prompt, str) and "\N{REPLACEMENT CHARACTER}" in text
    return {
        "source": context.source,
        "domain": context.domain or None,
        "group": context.group or None,
        "text": text,
        "text_hash": text_hash(f"{model.vocabulary} {inner}" if torn else text),
        "error": context.error or None,
        "tokens": ids,
        "n_tokens": None if ids is None else len(ids),
        "target": target,
        "target_text": None if target is None else model.texts([target])[0],
    }


def prediction_row(
    logits: Float[Tensor, " d_vocab"], target: int | None, counts: Counts | None, model: Transformer
) -> Row:
    """What is known of the model's own prediction."""
    probability = logits.double().softmax(-1)
    best = probability.topk(min(2, len(probability)))
    top, second = int(best.indices[0]), float(best.values[-1]) if len(best.values) > 1 else 0.0
    row: Row = {
        "top_token": top,
        "top_text": model.texts([top])[0],
        "top_probability": float(best.values[0]),
        "margin": float(best.values[0]) - second,
        "entropy": float(entropy(logits.double())),
        "surprisal": None if target is None else float(-logits.double().log_softmax(-1)[target]),
    }
    if counts is None:
        return row
    rarity = torch.from_numpy(-counts.log10).to(probability)
    return {
        **row,
        "rarity_target": None if target is None else float(rarity[target]),
        "rarity_top": float(rarity[top]),
        "rarity_expected": float((probability * rarity).sum()),
        "kl_unigram": float(kl_divergence(logits.double(), counts.logits.to(logits.device).double())),
    }


def curve_rows(curve: DensityCurve) -> dict[TableName, list[Row]]:
    """What is known of a prompt's circuits: one row of its own, one per threshold, one per size of the papers."""
    content, sizes, tokens = _Content.of(curve), curve.sizes.tolist(), isinstance(curve.ranking.graph, TokenGraph)
    prompt: Row = {
        "n_edges": curve.n_edges,
        "auc": curve.auc,
        "auc_of_edges": curve.auc_of_edges,
        "sizes": sizes,
        "faithfulness": curve.faithfulness.double().tolist(),
        "from_first": [content.of_size[size]["from_first"] for size in sizes] if tokens else None,
        "entered": content.entered.tolist(),
        "passes": curve.passes if isinstance(curve, TightCurve) else 0,
        "graph": "token" if tokens else "component",
        "method": curve.provenance.method,
        "family": curve.ranking.family,
        "metric": curve.metric,
        "ablation": curve.conditions.ablation,
        "seed": curve.provenance.seed,
    }
    if curve.random is not None and curve.inverse is not None:
        coarse = curve.random.sizes
        prompt |= {
            "auc_random": area(coarse, curve.random.faithfulness),
            "auc_inverse": area(coarse, curve.inverse.faithfulness),
            "auc_coarse": area(coarse, curve.faithfulness[_point(curve, coarse)]),
        }
    return {"prompts": [prompt], "thresholds": _threshold_rows(curve, content), "points": _point_rows(curve, content)}


def named_in(model: Transformer, kind: str) -> dict[str, list[str]]:
    """Names of components in the order of the column `entered`, and of parts in that of `by_part`.

    Raises:
        ValueError: If the model has no such graph.
    """
    graph = TokenGraph.of(model, 1) if kind == "token" else ComponentGraph.of(model)
    return {"components": list(by_component(graph).columns), "parts": list(by_part(graph).columns)}


def area(sizes: Int[Tensor, " point"], faithfulness: Float[Tensor, " point"]) -> float:
    """Area under 1 - faithfulness over log10 of size, over sizes of at least one edge."""
    some = sizes > 0
    return float(torch.trapezoid(1 - faithfulness[some].double(), sizes[some].double().log10()))


@dataclass(frozen=True, eq=False)
class _Content:
    """What the circuits of a curve hold, at all sizes that rows are about.

    Attributes:
        of_size: For each size, of the best known circuit of at most so many edges: columns `by_part` and `by_quarter`;
            `n_components`, how many components have an edge in it; `from_first`, how many of its edges leave a state of
            the first token, or None where tokens are no nodes. Much attention goes to a first token that means nothing,
            so that lengths are compared without these edges as well.
        entered: The smallest circuit in which each component has an edge, in the order of `by_component`.
    """

    of_size: Mapping[int, Row]
    entered: Int[Tensor, " component"]

    @classmethod
    def of(cls, curve: DensityCurve) -> "_Content":
        graph, rank = curve.ranking.graph, curve.ranking.rank
        sizes = torch.cat([curve.sizes.cpu(), paper_sizes(curve.n_edges)]).unique()
        grouped = [by_part(graph), by_component(graph), *([by_source(graph)] if isinstance(graph, TokenGraph) else [])]
        if not isinstance(curve, TightCurve):
            counts, *of_sources = (counts_in(rank, sizes, groups) for groups in (grouped[0], *grouped[2:]))
            entered = grouped[1].least(rank)[0].long() + 1
            n_components = (entered <= sizes[:, None]).sum(1)
        else:  # its circuits do not hold one another: each is made, once
            own = sizes.clamp(min=int(curve.sizes[0]))
            kept = (curve.circuit(size=size).kept for size in own.tolist())
            totals = zip(*([groups.total(each) for groups in grouped] for each in kept), strict=True)
            counts, of_components, *of_sources = (torch.stack(each).nan_to_num().long() for each in totals)
            present = of_components[:, 0] > 0
            entered = torch.where(present, own[:, None], curve.n_edges).amin(0)
            n_components = present.sum(1)
        made = Composition(sizes, counts, grouped[0].columns, curve.ranking.family, curve.provenance)
        columns = {
            "by_part": counts.sum(1).tolist(),
            "by_quarter": made.by_quarter.tolist(),
            "n_components": n_components.tolist(),
            "from_first": of_sources[0][:, 0, 0].tolist() if of_sources else [None] * len(sizes),
        }
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        return cls(dict(zip(sizes.tolist(), rows, strict=True)), entered)

    def columns(self, size: int) -> Row:
        """What rows about a size have of it."""
        return {name: self.of_size[size][name] for name in ("by_part", "by_quarter")}

    def later_fraction(self, size: int) -> float | None:
        """Share of the edges that leave any token but the first; NaN without any, None without tokens."""
        n_edges, from_first = max(self.of_size), self.of_size[size]["from_first"]
        if from_first is None:
            return None
        n_later = n_edges - self.of_size[n_edges]["from_first"]
        return (size - from_first) / n_later if n_later else float("nan")


def _threshold_rows(curve: DensityCurve, content: _Content) -> list[Row]:
    rows = []
    for row in curve.rows():
        n_components = content.of_size[row["size"]]["n_components"]
        rows.append({
            **{name: row[name] for name in ("threshold", "size", "stable_size", "fraction", "stable_fraction")},
            **{name: row.get(name) for name in ("robust_size", "pruned_size")},
            "per_token": row["size"] / len(curve.provenance.token_ids),
            "n_components": n_components,
            "component_share": n_components / len(content.entered),
            "later_fraction": content.later_fraction(row["size"]),
            "faithfulness": row["faithfulness"],
            **content.columns(row["size"]),
        })  # fmt: skip
    return rows


def _point_rows(curve: DensityCurve, content: _Content) -> list[Row]:
    sizes = paper_sizes(curve.n_edges)
    points = _point(curve, sizes).tolist()
    own = curve.published if isinstance(curve, TightCurve) else curve
    where = _point(own, sizes).tolist()
    beside: dict[str, dict[int, float]] = {}
    for name, known in (("random", curve.random), ("inverse", curve.inverse)):
        if known is not None:
            beside[name] = dict(zip(known.sizes.tolist(), known.faithfulness.tolist(), strict=True))
    heights = {name: values.tolist() for name, values in {"": curve.faithfulness, **own.also}.items()}
    return [
        {
            "share": share,
            "size": size,
            "faithfulness": heights[""][points[number]],
            **{name: values.get(size) for name, values in beside.items()},
            **{name: heights[name][where[number]] for name in own.also},
            **content.columns(size),
        }
        for number, (share, size) in enumerate(zip(RELATIVE_SIZES, sizes.tolist(), strict=True))
    ]


def _point(curve: DensityCurve, sizes: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
    """The point of the curve at each size, or the next smaller one on a tight curve."""
    return (torch.searchsorted(curve.sizes, sizes, right=True) - 1).clamp(min=0)
