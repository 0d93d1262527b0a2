"""Models, tasks and helpers that the tests of the component graph share."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from component_oracle import (
    ComponentOracle,
    Metric,
    Scores,
    Values,
    float64_copy,
    logit_difference,
)
from conftest import hooked_only, random_model
from torch import Tensor

import tracedensity as td
from benchmarks.lens import HookedTransformer
from tracedensity.graph.component import ComponentGraph
from tracedensity.model import as_transformer
from tracedensity.provenance import Provenance

SHAPE: dict[str, Any] = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_mlp": 6, "n_ctx": 8, "d_vocab": 11}
ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary", "rotary_dim": 4}
GQA: dict[str, Any] = {"n_heads": 4, "n_key_value_heads": 2}
LLAMA: dict[str, Any] = {"act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", **ROTARY, **GQA}
GPT2: dict[str, Any] = {"act_fn": "gelu_new", "normalization_type": "LN"}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2 folded": {**GPT2, "normalization_type": "LNPre"},
    "llama": LLAMA,
    "llama ungrouped": LLAMA,
    "llama folded": {**LLAMA, "normalization_type": "RMSPre"},
    "no norm": {"act_fn": "relu", "normalization_type": None},
    "parallel": {"act_fn": "gelu", "normalization_type": "LN", "parallel_attn_mlp": True, **ROTARY},
    "parallel grouped": {"act_fn": "silu", "normalization_type": "RMS", "parallel_attn_mlp": True, **GQA},
    "attention only": {"attn_only": True, "normalization_type": "LN"},
    "relu, three layers": {"act_fn": "relu", "normalization_type": "LN", "n_layers": 3},
    "gpt2 with flags": GPT2,
    "llama with flags": LLAMA,
    "llama ungrouped with flags": LLAMA,
}
FLAGGED = [name for name in KINDS if name.endswith("with flags")]
HOOKED_KINDS = ["parallel", "parallel grouped", *FLAGGED]  # a native bridge has no such blocks, and no such flags


def marks_of(kind: str) -> Sequence[pytest.MarkDecorator]:
    return [hooked_only] if kind in HOOKED_KINDS else []


def each_of(kinds: Iterable[str]) -> pytest.MarkDecorator:
    """A test of each kind that the installed TransformerLens has."""
    return pytest.mark.parametrize("kind", [pytest.param(kind, marks=marks_of(kind)) for kind in kinds])


every_kind = each_of(name for name in KINDS if name not in FLAGGED)
main_kinds = each_of(["gpt2", "llama", "llama ungrouped"])
ABLATIONS = ("counterfactual", "zero", "mean", "mean-positional")
every_ablation = pytest.mark.parametrize("ablation", ABLATIONS)
METHODS: dict[str, dict[str, Any]] = {
    "eap": {},
    "eap-ig": {"steps": 3},
    "eap-ig, one step": {"steps": 1},
    "clean-corrupted": {},
    "eap-ig-activations": {"steps": 2},
    "eap-ig-activations, one step": {"steps": 1},
    "exact": {},
    "flow": {},
    "magnitude": {},
}

UNEQUAL = td.Task(  # lengths differ
    clean=[[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7]],
    corrupted=[[3, 7, 4, 10, 5], [8, 2, 0], [5, 4, 6, 2, 6, 4]],
    answer=[4, 2, 7],
    distractor=[1, 8, 10],
)
EQUAL = td.Task(
    clean=[[3, 1, 4, 1], [9, 2, 6, 5], [3, 5, 8, 9]],
    corrupted=[[3, 7, 4, 10], [8, 2, 0, 5], [1, 4, 8, 2]],
    answer=[4, 2, 7],
    distractor=[1, 8, 10],
)
no_stream = pytest.mark.filterwarnings("ignore:gradients are taken where the stream is zero")
PROVENANCE = Provenance("made up", "", (1,), ("1",), "made up")


def task_for(ablation: str) -> td.Task:
    return EQUAL if ablation == "mean-positional" else UNEQUAL


PROMPT = [3, 1, 4, 1, 5]


# -- models and oracles ------------------------------------------------------------------------------


@cache
def model_of(kind: str, dtype: torch.dtype = torch.float32) -> HookedTransformer:
    if dtype == torch.float64:
        return float64_copy(model_of(kind))
    model = random_model(**{**SHAPE, **KINDS[kind]})
    if kind.endswith("with flags"):
        model.set_use_attn_result(True)
        model.set_use_hook_mlp_in(True)
        if kind.startswith("gpt2"):
            model.set_use_attn_in(True)
        else:
            model.set_use_split_qkv_input(True)
            model.set_ungroup_grouped_query_attention(True)
    return model


def options_of(kind: str) -> dict[str, Any]:
    return {"graph": "component", "ungroup": "ungrouped" in kind}


@cache
def oracle_of(kind: str) -> ComponentOracle:
    return ComponentOracle(model_of(kind), ungroup="ungrouped" in kind)


def graph_of(kind: str, **options: Any) -> ComponentGraph:
    return ComponentGraph.of(as_transformer(model_of(kind)), ungroup="ungrouped" in kind, **options)


@dataclasses.dataclass(frozen=True)
class Case:
    """An example as the oracle takes it."""

    tokens: Tensor
    ablated: Values
    right: int
    wrong: int

    @property
    def metric(self) -> Metric:
        return logit_difference(self.right, self.wrong)


@cache
def cases(kind: str, ablation: str, task: td.Task) -> list[Case]:
    oracle = oracle_of(kind)
    prompts = [torch.tensor(ids) for ids in task.clean]
    found = []
    for number, tokens in enumerate(prompts):
        ablated = {
            "counterfactual": lambda: oracle.corrupted_values(torch.tensor(task.corrupted[number])),  # noqa: B023
            "zero": lambda: oracle.zero_values(len(tokens)),  # noqa: B023
            "mean": lambda: oracle.mean_values(prompts, len(tokens)),  # noqa: B023
            "mean-positional": lambda: oracle.mean_positional_values(prompts),
        }[ablation]()
        found.append(Case(tokens, ablated, task.answer[number][0], task.distractor[number][0]))
    return found


def oracle_scores(oracle: ComponentOracle, method: str, case: Case, metric: Metric) -> Scores:
    name, steps = method.split(",")[0], METHODS[method].get("steps", 1)
    tokens, ablated = case.tokens, case.ablated
    if name == "eap-ig":
        return oracle.eap_ig_inputs(tokens, ablated, metric, steps)
    if name == "eap-ig-activations":
        return oracle.eap_ig_activations(tokens, ablated, metric, steps)
    if name == "flow":
        return oracle.flow(tokens)
    if name == "magnitude":
        return oracle.magnitude(tokens, ablated)
    return {"eap": oracle.eap, "clean-corrupted": oracle.clean_corrupted, "exact": oracle.exact}[name](
        tokens, ablated, metric
    )


def mean_of(scores: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    return {name: sum(each[name] for each in scores) / len(scores) for name in scores[0]}


@cache
def truth(kind: str, method: str, ablation: str) -> Scores:
    found = cases(kind, ablation, task_for(ablation))
    return mean_of([oracle_scores(oracle_of(kind), method, case, case.metric) for case in found])


def attributed(kind: str, method: str, task: object, dtype: torch.dtype = torch.float64, **options: Any) -> td.Scores:
    name = method.split(",")[0]
    given = {**options_of(kind), **METHODS.get(method, {}), "method": name, **options}
    return td.attribute(model_of(kind, dtype), task, **given)


def by_name(scores: td.Scores) -> dict[str, float]:
    values, exists = scores.values["edge"], scores.exists["edge"]
    assert values.shape == exists.shape
    assert (values[~exists] == 0).all()
    return {scores.graph.edge_name("edge", tuple(i)): float(values[tuple(i)]) for i in exists.nonzero().tolist()}


def assert_close(ours: Mapping[Any, float], theirs: Mapping[Any, float], tolerance: float = 1e-9) -> None:
    """Relative to the largest."""
    assert ours.keys() == theirs.keys()
    largest = max(abs(value) for value in theirs.values())
    assert largest > 1e-6
    worst = max(ours, key=lambda name: abs(ours[name] - theirs[name]))
    assert abs(ours[worst] - theirs[worst]) <= tolerance * largest, worst


def same(one: td.Scores, other: td.Scores, tolerance: float = 1e-9) -> None:
    assert one.graph == other.graph
    assert_close(by_name(one), by_name(other), tolerance)


GRADIENTS: dict[str, Callable[[ComponentOracle, Case], dict[str, Tensor]]] = {
    "eap": lambda oracle, case: oracle.gradients(case.tokens, case.metric),
    "eap-ig": lambda oracle, case: oracle.ig_input_gradients(case.tokens, case.ablated, case.metric, 3),
    "clean-corrupted": lambda oracle, case: oracle.clean_corrupted_gradients(case.tokens, case.ablated, case.metric),
    "eap-ig-activations": lambda oracle, case: oracle.ig_activation_gradients(
        case.tokens, case.ablated, case.metric, 2
    ),
}


def random_masks(graph: ComponentGraph, seed: int = 0) -> list[Tensor]:
    """All edges, none, and some circuits between."""
    generator = torch.Generator().manual_seed(seed)
    exists = graph.exists["edge"]
    shares = (1.0, 0.0, 0.95, 0.8, 0.5, 0.2)
    return [exists & (torch.rand(exists.shape, generator=generator) < share) for share in shares]


def circuits_of(graph: ComponentGraph, masks: Iterable[Tensor], ablation: str) -> list[td.Circuit]:
    return [td.Circuit(graph, {"edge": mask}, PROVENANCE, ablation=ablation) for mask in masks]
