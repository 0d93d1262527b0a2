"""Choices: the names that closed options take, in a module that imports nothing, so that `--help` can show them."""

from typing import Literal

Method = Literal["norm", "norm-l2", "norm-ratio", "flow", "flow-shifted", "cosine", "random", "random-connected"]
"""How edges are scored, see `tracedensity.attribute`."""

Family = Literal["greedy", "top", "threshold", "nucleus"]
"""How scores become an order, see `tracedensity.extract.rank_edges`."""

Metric = Literal["tv", "kl", "js", "top1", "nucleus", "nucleus_size", "entropy", "logprob"]
"""What can be said of a circuit's prediction, see `tracedensity.evaluate`."""

FaithfulnessMetric = Literal["tv", "kl", "js", "top1", "nucleus"]
"""Those of them that say how much of the model's prediction is kept, see `tracedensity.faithfulness.faithfulness`."""

Attention = Literal["masked", "open"]
"""Whether attention edges that are not in a circuit are ablated, or counted only."""
