"""Every family of models, as either class of TransformerLens, against a slow float64 reference of Hugging Face alone.

The reference knows nothing of TransformerLens: two classes, or two versions, that both agree with it agree.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, UNKNOWN, bridged, hooked, hugging_face
from hf_reference import Reference
from torch import Tensor

import tracedensity as td
from benchmarks.lens import HAS_HOOKED
from tracedensity.extract import rank_edges
from tracedensity.graph.component import ComponentGraph
from tracedensity.graph.token import TokenGraph
from tracedensity.model import as_transformer
from tracedensity.provenance import Provenance

TOLERANCE = 1e-4  # relative to the largest; found: 4e-6
CLEAN = [5, 17, 40, 9, 23, 11, 30, 6, 19]
CORRUPTED = [5, 28, 40, 14, 23, 33, 7, 6, 19]
ANSWER, DISTRACTOR = 12, 35
TASK = td.Task(clean=[CLEAN], corrupted=[CORRUPTED], answer=[ANSWER], distractor=[DISTRACTOR])
PROVENANCE = Provenance("made up", "", (1,), ("1",), "made up")

CASES = [
    *((name, "HookedTransformer") for name in FAMILIES if HAS_HOOKED and name not in UNKNOWN),
    *((name, "TransformerBridge") for name in FAMILIES),
]
PARALLEL = ("gpt-j", "pythia", "phi2", "falcon")
GROUPED = ("llama3", "mistral", "qwen2", "qwen2.5", "qwen3", "phi3", "gemma1", "gemma2", "gemma3", "stablelm", "falcon",
           "mixtral", "qwen2-moe", "qwen3-moe")  # fmt: skip
EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe")


def over(*without: str, among: tuple[str, ...] = tuple(FAMILIES)) -> pytest.MarkDecorator:
    cases = [case for case in CASES if case[0] not in without and case[0] in among]
    return pytest.mark.parametrize(("name", "kind"), cases)


@cache
def model_of(name: str, kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left of TransformerLens' and Hugging Face's while they convert
        return hooked(name) if kind == "HookedTransformer" else bridged(name)


@cache
def reference(name: str) -> Reference:
    return Reference(hugging_face(name))


def apart(found: object, expected: object) -> float:
    """The largest difference, relative to the largest number."""
    one, other = (torch.as_tensor(each, dtype=torch.float64) for each in (found, expected))
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.abs().max())


def logit(token: int) -> Any:
    def metric(logits: Tensor, examples: object) -> Tensor:
        return logits[:, token]

    metric.__name__ = f"logit {token}"
    return metric


LOGITS = [logit(token) for token in range(48)]


def logits_of(model: Any, subject: object, circuits: list[td.Circuit]) -> Tensor:
    found = td.evaluate(model, subject, circuits, metrics=LOGITS).metrics
    return torch.stack([found[metric.__name__].double().cpu() for metric in LOGITS], -1)


def random_circuits(graph: Any, shares: tuple[float, ...], ablation: str = "zero") -> list[td.Circuit]:
    generator = torch.Generator().manual_seed(1)
    masks = [
        {kind: edges & (torch.rand(edges.shape, generator=generator) < share) for kind, edges in graph.exists.items()}
        for share in shares
    ]
    return [td.Circuit(graph, mask, PROVENANCE, ablation=ablation) for mask in masks]


@over()
def test_logits_are_those_of_hugging_face(name, kind):
    found = as_transformer(model_of(name, kind)).logits(torch.tensor([CLEAN, CORRUPTED]))
    expected = torch.stack([reference(name).plain_logits(tokens) for tokens in (CLEAN, CORRUPTED)])
    assert apart(found, expected) < TOLERANCE
    put_together = torch.stack([reference(name).logits(tokens) for tokens in (CLEAN, CORRUPTED)])
    assert apart(put_together, expected) < 1e-9


# -- the token graph ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["norm", "flow"])
@over(*PARALLEL)
def test_scores_of_the_token_graph(name, kind, method):
    found = td.attribute(model_of(name, kind), CLEAN, method=method)
    expected = reference(name).token_scores(CLEAN, method)
    assert found.values.keys() == expected.keys()
    for each in expected:
        assert apart(found.values[each], expected[each]) < TOLERANCE
    greedy = rank_edges(found.graph, expected, "greedy", PROVENANCE)
    assert apart(in_order(found, found.rank()), in_order(found, greedy)) < TOLERANCE


def in_order(scores: td.Scores, ranking: td.Ranking) -> Tensor:
    """Scores of all edges in the order in which they enter."""
    rank = torch.cat([each.flatten() for each in ranking.rank.values()])
    values = torch.cat([scores.values[kind].flatten() for kind in ranking.rank])
    return values[rank >= 0][rank[rank >= 0].argsort()]


@over(*PARALLEL)
def test_circuits_of_the_token_graph(name, kind):
    model = model_of(name, kind)
    circuits = random_circuits(TokenGraph.of(as_transformer(model), len(CLEAN)), (1.0, 0.9, 0.7, 0.5, 0.3))
    expected = torch.stack([reference(name).token_logits(CLEAN, circuit.kept) for circuit in circuits])
    assert apart(logits_of(model, CLEAN, circuits), expected) < TOLERANCE


@over(*PARALLEL)
def test_minimal_sizes_of_the_token_graph(name, kind):
    """Those of the published estimator, found again with the reference's own runs of the same circuits."""
    curve = td.density(model_of(name, kind), CLEAN, method="norm")
    full = reference(name).logits(CLEAN).softmax(-1)

    def faithful(circuit: td.Circuit) -> float:
        logits = reference(name).token_logits(CLEAN, circuit.kept)
        return 1 - float((logits.softmax(-1) - full).abs().sum() / 2)

    assert_minimal_sizes(curve, faithful)


def assert_minimal_sizes(curve: td.DensityCurve, faithful: Callable[[td.Circuit], float]) -> None:
    """Every fourth point of the curve, and those before and behind which a threshold is first reached."""
    sizes, found = curve.sizes.tolist(), curve.faithfulness.tolist()
    crossed = {threshold: sizes.index(curve.minimal_size(threshold)) for threshold in (0.5, 0.8, 0.9, 0.95)}
    asked = sorted({*range(0, len(sizes), 4), *crossed.values(), *(max(place - 1, 0) for place in crossed.values())})
    expected = {place: faithful(curve.ranking.circuit(sizes[place])) for place in asked}
    assert apart([found[place] for place in asked], [*expected.values()]) < TOLERANCE
    most = max(map(abs, expected.values()))
    for threshold, place in crossed.items():
        if min(abs(each - threshold) for each in expected.values()) > TOLERANCE * most:
            assert expected[place] >= threshold and all(each < threshold for each in found[:place])
            assert place == 0 or expected[place - 1] < threshold


# -- the component graph -----------------------------------------------------------------------------


def component_scores(model: Any, method: str, ungroup: bool = False) -> td.Scores:
    return td.attribute(model, TASK, graph="component", method=method, ungroup=ungroup)


def assert_scores(name: str, model: Any, method: str, ungroup: bool = False) -> None:
    found = component_scores(model, method, ungroup)
    expected = reference(name).component_scores(CLEAN, CORRUPTED, ANSWER, DISTRACTOR, method, ungroup=ungroup)
    assert found.graph.readers == reference(name).readers(ungroup)
    assert found.graph.writers == reference(name).writers()
    assert len(expected) == found.graph.n_edges
    places = [found.graph.edge_index(edge)[1] for edge in expected]
    assert apart([float(found.values["edge"][place]) for place in places], list(expected.values())) < TOLERANCE
    importance = torch.zeros_like(found.values["edge"])
    for place, score in zip(places, expected.values(), strict=True):
        importance[place] = abs(score)
    greedy = rank_edges(found.graph, {"edge": importance}, "greedy", PROVENANCE)
    assert apart(in_order(found, found.rank()).abs(), in_order(found, greedy).abs()) < TOLERANCE


@pytest.mark.parametrize("method", ["eap", "eap-ig", "flow"])
@over()
def test_scores_of_the_component_graph(name, kind, method):
    assert_scores(name, model_of(name, kind), method)


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
@over(among=GROUPED)
def test_scores_where_every_head_has_keys_and_values_of_its_own(name, kind, method):
    assert_scores(name, model_of(name, kind), method, ungroup=True)


@cache
def logits_of_circuit(name: str, kept: frozenset[str], ungroup: bool = False) -> Tensor:
    return reference(name).component_logits(CLEAN, CORRUPTED, kept, ungroup=ungroup)


def edges_of(circuit: td.Circuit) -> frozenset[str]:
    return frozenset(circuit.graph.edge_name("edge", tuple(place)) for place in circuit.kept["edge"].nonzero().tolist())


@over()
def test_minimal_sizes_of_the_component_graph(name, kind):
    curve = td.density(
        model_of(name, kind), TASK, graph="component", method="eap", ablation="counterfactual", metric="logit_diff",
        thresholds=(0.5, 0.8, 0.9, 0.95), baselines=False,
    )  # fmt: skip

    def difference(kept: frozenset[str]) -> float:
        logits = logits_of_circuit(name, kept)
        return float(logits[ANSWER] - logits[DISTRACTOR])

    whole, nothing = difference(edges_of(curve.ranking.circuit(curve.n_edges))), difference(frozenset())
    assert_minimal_sizes(curve, lambda circuit: (difference(edges_of(circuit)) - nothing) / (whole - nothing))


def assert_circuits(name: str, model: Any, *, ungroup: bool = False, folded: bool = False) -> None:
    graph = ComponentGraph.of(as_transformer(model), ungroup=ungroup)
    circuits = random_circuits(graph, (1.0, 0.95, 0.8, 0.5, 0.2, 0.0), "counterfactual")
    expected = [logits_of_circuit(name, edges_of(circuit), ungroup) for circuit in circuits]
    both = [logits_of(model, TASK, circuits), torch.stack(expected)]
    if folded:  # which may have centred the unembedding
        both = [logits - logits.mean(-1, keepdim=True) for logits in both]
    assert apart(*both) < TOLERANCE


@over()
def test_circuits_of_the_component_graph(name, kind):
    assert_circuits(name, model_of(name, kind))


@over(among=GROUPED)
def test_circuits_where_every_head_has_keys_and_values_of_its_own(name, kind):
    assert_circuits(name, model_of(name, kind), ungroup=True)


@pytest.mark.parametrize("folded", [False, True], ids=["weights as they are", "weights folded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_bridges_in_compatibility_mode(name, folded):
    """Folding changes what heads and MLPs write, but only by what norms and differences of two prompts leave out."""
    model = model_of.__wrapped__(name, "TransformerBridge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.enable_compatibility_mode(no_processing=not folded, disable_warnings=True)
    assert_scores(name, model, "eap")
    assert_circuits(name, model, folded=folded)
    if not folded:
        assert_scores(name, model, "flow")


@over(among=("olmo2-grouped",))
def test_keys_that_are_normed_together_are_not_ungrouped(name, kind):
    with pytest.raises(ValueError, match="`ungroup` must be left out for olmo2-grouped: in layer 0 one norm"):
        component_scores(model_of(name, kind), "eap", ungroup=True)


@pytest.mark.parametrize("method", ["eap-qk", "relp"])
@over()
def test_other_gradients_of_the_component_graph(name, kind, method):
    """They have oracles of their own on a few models; here both classes agree, and what stays as in `eap` does."""
    if method == "relp" and name in EXPERTS:
        with pytest.raises(ValueError, match=f"`method` must not be 'relp' for {name}: layer 0 is no plain MLP"):
            component_scores(model_of(name, kind), method)
        return
    found = component_scores(model_of(name, kind), method).values["edge"]
    if method == "eap-qk":
        plain = component_scores(model_of(name, kind), "eap")
        same = [number for number, reader in enumerate(plain.graph.readers) if not reader.endswith(("<q>", "<k>"))]
        assert apart(found[:, same], plain.values["edge"][:, same]) < TOLERANCE
    if kind == "TransformerBridge" and (name, "HookedTransformer") in CASES:
        assert apart(found, component_scores(model_of(name, "HookedTransformer"), method).values["edge"]) < TOLERANCE


# -- what is the same for both classes ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if HAS_HOOKED and name not in UNKNOWN and name not in EXPERTS]
)
def test_a_model_is_the_same_model_as_either_class(name):
    """A circuit found in one is verified in the other."""
    one, other = (as_transformer(model_of(name, kind)) for kind in ("HookedTransformer", "TransformerBridge"))
    assert one.fingerprint() == other.fingerprint()
    assert one.vocabulary == other.vocabulary


@over(among=("llama3",))
def test_scaled_rotations_are_part_of_the_fingerprint(name, kind):
    model = model_of.__wrapped__(name, kind)
    usual = as_transformer(model).fingerprint()
    if kind == "HookedTransformer":
        model.cfg.NTK_by_parts_factor *= 2
    else:
        model.original_model.config.rope_parameters["factor"] *= 2
    assert as_transformer(model).fingerprint() != usual


@over(*EXPERTS)
def test_neurons_are_told_apart(name, kind):
    model = model_of(name, kind)
    if name not in PARALLEL:
        found = td.capture(model, CLEAN)
        written = torch.stack([found.post[row] @ as_transformer(model).W_out(row) for row in range(len(found.layers))])
        bias = found.mlp_out - written
        if not as_transformer(model).adapter.norm("mlp_out", 0):
            torch.testing.assert_close(bias, bias[:, :1].expand_as(bias), rtol=1e-4, atol=1e-4)
    neurons = td.attribute(model, TASK, graph="component", method="eap", neurons=True)
    expected = reference(name).neuron_scores(CLEAN, CORRUPTED, ANSWER, DISTRACTOR)
    readers = [edge.split("->") for edge in expected]
    found = torch.stack([
        neurons.values["edge"][neurons.graph.mlp_of(int(mlp[1:]))][:, neurons.graph.readers.index(reader)]
        for mlp, reader in readers
    ])  # fmt: skip
    assert neurons.graph.d_mlp == as_transformer(model).d_mlp
    assert apart(found, torch.stack([*expected.values()])) < TOLERANCE


@over(among=EXPERTS)
def test_neurons_of_experts_are_refused(name, kind):
    for options in ({"method": "eap"}, {"graph": "component", "method": "eap"}):
        subject = CLEAN if "graph" not in options else TASK
        with pytest.raises(ValueError, match=f"Neurons of {name} cannot be told apart: layer 0 is no plain MLP"):
            td.attribute(model_of(name, kind), subject, neurons=True, **options)


@over(among=PARALLEL)
def test_the_token_graph_of_parallel_blocks_is_refused(name, kind):
    with pytest.raises(ValueError, match=f"MLP after attention, got {name}, where both read the same stream"):
        td.density(model_of(name, kind), CLEAN)
