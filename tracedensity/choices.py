"""Choices: the names that closed options take, in a module that imports nothing, so that `--help` can show them."""

from typing import Literal

TokenMethod = Literal[
    "norm", "norm-l2", "norm-ratio", "flow", "flow-shifted", "cosine", "eap", "eap-ig", "eap-ig-layers", "random",
    "random-connected",
]  # fmt: skip
"""How edges of the token graph are scored."""

ComponentMethod = Literal[
    "eap", "eap-qk", "eap-ig", "eap-ig-midpoint", "eap-ig-activations", "clean-corrupted", "relp", "exact", "flow",
    "magnitude", "random", "random-connected",
]  # fmt: skip
"""How edges of the component graph are scored."""

Method = Literal[TokenMethod, ComponentMethod]
"""How edges are scored, see `tracedensity.attribute`."""

DensityMethod = Literal[Method, "best", "exhaustive"]
"""What circuits a density curve is made of, see `tracedensity.density`."""

Backend = Literal["hooked", "bridge"]
"""A class of TransformerLens: `HookedTransformer` (3.9) or `TransformerBridge` (3.9 and 4)."""

Precision = Literal["float32", "bfloat16", "float16", "float64"]
"""What weights are in."""

Engine = Literal["local", "ray"]
"""What runs the parts of a sweep: processes of this machine, or a Ray cluster."""

GraphName = Literal["token", "component"]
"""What an edge is, see `TokenGraph` and `ComponentGraph`."""

Ablation = Literal["counterfactual", "resample", "zero", "mean", "mean-positional"]
"""What replaces an absent edge."""

TokenAblation = Literal["zero", "mean", "resample"]
"""What replaces an absent edge of the token graph."""

Change = Literal[Ablation, "swap", "prepend"]
"""What can be different where a circuit is run, see `Circuit.check`."""

Family = Literal["greedy", "top", "threshold", "nucleus"]
"""How scores become an order, see `tracedensity.extract.rank_edges`."""

Question = Literal["logit_diff", "prob_diff", "logprob", "kl"]
"""How well a question is answered, see `tracedensity.metric`."""

Metric = Literal["tv", "kl", "js", "top1", "nucleus", "nucleus_size", "entropy", "logit_diff", "prob_diff", "logprob"]
"""What can be said of a circuit's prediction, see `tracedensity.evaluate`."""

FaithfulnessMetric = Literal["tv", "kl", "js", "top1", "nucleus"]
"""Those of them that say how much of the model's prediction is kept, see `tracedensity.faithfulness.faithfulness`."""

Attention = Literal["masked", "open"]
"""Whether attention edges that are not in a circuit are ablated, or counted only."""

TaskName = Literal["ioi", "greater_than", "agreement", "pronoun", "capitals", "docstring", "induction"]
"""Tasks that `tracedensity.tasks` generates."""

Outcome = Literal["area", "auc", "auc_of_edges", "fraction", "size", "per_token", "component_share", "later_fraction"]
"""The ways in which a density is one number, see `tracedensity.study.covariates.OUTCOMES`."""
