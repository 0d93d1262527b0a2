"""Bisection: the size at which circuits of one ranking reach a faithfulness, in few runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from tracedensity.evaluation import evaluate, paper_sizes
from tracedensity.extract import Ranking
from tracedensity.model import as_transformer
from tracedensity.score import attribute

Kind = Literal["stable", "first"]
"""Whether all larger circuits that were run must reach a faithfulness as well."""


@dataclass(frozen=True)
class Bisection:
    """The size at which a family of circuits reaches a faithfulness, by halving.

    Attributes:
        size: The smallest size found from which on all that were tried reach it.
        faithfulness: What it reaches.
        n_runs: Circuits that were run.
        monotone_violation: Whether a smaller circuit reaches it as well, or a larger one does not: halving takes for
            granted that neither happens.
        ranking: Whose circuits these are, if it is known: ``ranking.circuit(size)`` is the one that was found.
    """

    size: int
    faithfulness: float
    n_runs: int
    monotone_violation: bool
    ranking: Ranking | None = field(default=None, repr=False)

    def __str__(self) -> str:
        said = f"{self.size:,} edges: faithfulness {self.faithfulness:.4f}, found in {self.n_runs} runs"
        if self.monotone_violation:
            said += "; faithfulness does not grow with size here, so that other sizes were run as well"
        return said + "."


def bisected(
    measure: Callable[[Sequence[int]], Sequence[float]],
    n_edges: int,
    target: float,
    *,
    grid: Sequence[int] = (),
    kind: Kind | str = "stable",
) -> Bisection:
    """Find the smallest size that reaches a target, taking for granted that faithfulness grows with size, and check.

    Takes at most ``ceil(log2(n_edges))`` circuits and one more, then looks around: at half the size, at 90% and 110%,
    one less and one more. Where that does not fit, sizes of a grid are run as well, and the smallest counts from which
    on all that were run reach the target.

    Args:
        measure: Faithfulness of circuits of some sizes.
        n_edges: The largest size.
        target: Faithfulness to reach.
        grid: Sizes to run where faithfulness does not grow.
        kind: There, whether all larger circuits must reach it as well (``"stable"``) or not (``"first"``).

    Raises:
        ValueError: If not even the largest circuit reaches it.
    """
    known: dict[int, float] = {}

    def run(sizes: Sequence[int]) -> None:
        new = [size for size in dict.fromkeys(sizes) if 0 <= size <= n_edges and size not in known]
        known.update(zip(new, measure(new), strict=True) if new else ())

    run([n_edges])
    if known[n_edges] < target:
        raise ValueError(f"`target` must be one that all edges reach, {known[n_edges]:.4f}, got {target}.")
    low, high = -1, n_edges  # the first does not reach it, the second does
    while high - low > 1:
        middle = (low + high) // 2
        run([middle])
        low, high = (low, middle) if known[middle] >= target else (middle, high)
    run([high // 2, int(0.9 * high), high - 1, high + 1, min(int(1.1 * high), n_edges)])
    wrong = any((known[size] >= target) != (size >= high) for size in known)
    if wrong:
        run(list(grid))
        if kind == "first":
            high = min(size for size in known if known[size] >= target)
        else:
            high = min(size for size in known if all(known[other] >= target for other in known if other >= size))
    return Bisection(high, known[high], len(known), wrong)


def target(
    model: object,
    prompt: object,
    faithfulness: float | int = 0.9,
    *,
    ranking: Ranking | None = None,
    kind: Kind | str = "stable",
    **options: Any,
) -> Bisection:
    """The smallest circuit of a ranking that reaches a faithfulness, by halving: for models that are dear to run.

    `td.density` finds every threshold, and draws the curve; this finds one, in the runs that `bisected` takes.

    Args:
        model: A model of TransformerLens, or a name for `load_model`.
        prompt: Text, token ids, or a ``[pos]`` tensor.
        faithfulness: To reach: 1 - total variation distance between the predictions.
        ranking: An order of the edges; by default that of `options`.
        kind: Where faithfulness falls again, ``"stable"`` takes the smallest circuit from which on all larger ones that
            were run reach it, ``"first"`` the smallest.
        options: Options of `attribute`, such as `method`.

    Returns:
        The size, and whether halving was misled; the density papers' sizes are run as well where it was.

    Raises:
        ValueError: If an argument is not as described.
    """
    if not 0 < faithfulness <= 1:
        raise ValueError(f"`faithfulness` must be above 0 and at most 1, got {faithfulness}.")
    if kind not in get_args(Kind):
        raise ValueError(f"`kind` must be one of {list(get_args(Kind))}, got {kind!r}.")
    if ranking is not None and options:
        raise ValueError(f"`ranking` must be left out with options of its scores, got {list(options)}.")
    transformer = as_transformer(model)
    order = attribute(transformer, prompt, **options).rank() if ranking is None else ranking

    def measure(sizes: Sequence[int]) -> list[float]:
        found = evaluate(transformer, prompt, order, sorted(sizes), metrics="tv", position=options.get("position", -1))
        height = dict(zip(found.sizes.tolist(), (1 - found.metrics["tv"]).tolist(), strict=True))
        return [height[size] for size in sizes]

    # total variation distances of the whole model to itself are rounding
    aim = min(float(faithfulness), 1 - 1e-6)
    found = bisected(measure, order.n_edges, aim, grid=paper_sizes(order.n_edges).tolist(), kind=kind)
    return replace(found, ranking=order)
