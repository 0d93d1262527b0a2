"""Summaries: a result in one number per head, or per sublayer and token, and the difference of two."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tracedensity.curve import DensityCurve
from tracedensity.extract import Ranking
from tracedensity.graph.circuit import Circuit
from tracedensity.groups import Groups, by_head, by_token
from tracedensity.provenance import Provenance
from tracedensity.score import Scores

Over: TypeAlias = Literal["head", "token"]
Quantity: TypeAlias = Literal["presence", "importance", "entry"]


@dataclass(frozen=True, eq=False)
class Summary:
    """One number for each group of edges.

    Attributes:
        quantity: What the numbers are. ``"presence"``: how many of the edges are in a circuit. ``"importance"``: the
            sum of their importance. ``"entry"``: the size of the smallest circuit of a nested family that has one of
            them.
        values: The numbers; NaN where there are no edges.
        groups: Which edges these are.
        unit: What the numbers count.
        provenance: What they are about.
    """

    quantity: Quantity
    values: Float[Tensor, "row column"]
    groups: Groups
    unit: str
    provenance: Provenance


def summary(result: Circuit | Scores | Ranking | DensityCurve, over: Over | str = "head") -> Summary:
    """What a result says of each head, or of each sublayer and token.

    Args:
        result: A circuit: presence. Scores: importance (of effects, without their sign). A ranking, or the ranking of
            a curve: entry.
        over: ``"head"``, see `tracedensity.groups.by_head`, or ``"token"``, see `tracedensity.groups.by_token`.

    Raises:
        ValueError: If `result` or `over` is anything else, a score is not finite, or there are no tokens.
    """
    if over not in get_args(Over):
        raise ValueError(f"`over` must be 'head' or 'token', got {over!r}.")
    result = result.ranking if isinstance(result, DensityCurve) else result
    if not isinstance(result, Circuit | Scores | Ranking):
        raise ValueError(
            f"`result` must be a Circuit, Scores, a Ranking or a DensityCurve, got {type(result).__name__}."
        )
    groups = by_head(result.graph) if over == "head" else by_token(result.graph)
    if isinstance(result, Circuit):
        return Summary("presence", groups.total(result.kept), groups, "edges", result.provenance)
    if isinstance(result, Ranking):
        return Summary("entry", groups.least(result.rank) + 1, groups, "edges", result.provenance)
    total, about = groups.total(result.importance()), result.provenance
    if not total[groups.n_edges > 0].isfinite().all():
        raise ValueError("`result` must have finite scores to be summed up, got NaN or infinite ones.")
    unit = f"|effect on {about.metric}|" if result.helpful else f"{about.method} score"
    return Summary("importance", total, groups, unit, about)


def difference(first: Summary, second: Summary) -> Float[Tensor, "row column"]:
    """What the first has more than the second, cell by cell.

    Of importance the difference. Of presence that of the shares of all edges of a cell (%), since graphs of prompts of
    different lengths have more or fewer. Of sizes of entry the log10 of their ratio, below 0 where the first is
    earlier.

    Raises:
        ValueError: If they are different quantities, or not of the same cells.
    """
    for what, here, there in (
        ("quantity", first.quantity, second.quantity),
        ("unit", first.unit, second.unit),
        ("kind of graph", *(type(each.groups.graph).__name__ for each in (first, second))),
    ):
        if here != there:
            raise ValueError(f"`minus` must have the {what} of `result`, {here}, got {there}.")
    if (here := _cells(first.groups)) != (there := _cells(second.groups)):
        raise ValueError(
            f"`minus` must have the layers and columns of `result`, {here}, got {there}. Models of one shape can be "
            "compared, and prompts of different lengths by head."
        )
    if first.quantity == "entry":
        return torch.log10(first.values / second.values)
    if first.quantity == "presence":
        first_share, second_share = (each.values / each.groups.n_edges for each in (first, second))
        return 100 * (first_share - second_share)
    return first.values - second.values


def _cells(groups: Groups) -> str:
    rows, columns = (f"{len(names)} ({names[0]} to {names[-1]})" for names in (groups.rows, groups.columns))
    return f"{rows} x {columns}"
