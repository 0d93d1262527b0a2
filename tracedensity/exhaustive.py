"""Exhaustion: on small graphs every circuit is run, so that the smallest are known."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracedensity.ground import Ground

MOST_EDGES = 22
"""Four million circuits are run on a graph of so many edges."""

_AT_ONCE = 2**14


def require_few(ground: Ground) -> None:
    """Raise a ValueError if there are too many circuits to run them all."""
    if (n_free := int(ground.free.sum())) > MOST_EDGES:
        raise ValueError(
            f"`method` must not be 'exhaustive' for a graph of {n_free:,} edges that can be taken away, the most is "
            f"{MOST_EDGES}: every one of the circuits is run. Use 'best' with `refine=True`."
        )


def best_of_each_size(grounds: Sequence[Ground]) -> tuple[Float[Tensor, " size"], Bool[Tensor, "size edge"]]:
    """The most faithful circuit of every number of edges, all circuits having been run.

    Args:
        grounds: Where circuits are run; where there are several, it is the least faithfulness that counts.

    Returns:
        Faithfulness by number of edges, from none to all that the conditions do not keep anyhow, and the circuits; of
        equally faithful ones the one that comes first when edges are counted in binary.
    """
    first = grounds[0]
    free = first.free.nonzero()[:, 0]
    n_free = len(free)
    faithfulness = torch.full((n_free + 1,), -torch.inf, dtype=torch.float64)
    number = torch.zeros(n_free + 1, dtype=torch.long)
    for numbers in _numbers(n_free):
        chosen = _bits(numbers, n_free)
        kept = torch.zeros(len(numbers), first.graph.n_edges, dtype=torch.bool)
        kept[:, free] = chosen
        found = torch.stack([ground.tried(kept).faithfulness for ground in grounds]).amin(0)
        size = chosen.sum(1)
        for each in size.unique().tolist():
            here = size == each
            best = found[here].argmax()
            if found[here][best] > faithfulness[each]:
                faithfulness[each] = found[here][best]
                number[each] = numbers[here][best]
    circuits = torch.zeros(n_free + 1, first.graph.n_edges, dtype=torch.bool)
    circuits[:, free] = _bits(number, n_free)
    return faithfulness, circuits


def _numbers(n_bits: int) -> Iterator[Int[Tensor, " number"]]:
    yield from torch.arange(2**n_bits).split(_AT_ONCE)


def _bits(numbers: Int[Tensor, " number"], n_bits: int) -> Bool[Tensor, "number bit"]:
    return (numbers[:, None] >> torch.arange(n_bits) & 1).bool()
