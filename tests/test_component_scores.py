"""Scores of the component graph against `component_oracle`, and what must hold by definition."""

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from component_cases import (
    ABLATIONS,
    EQUAL,
    FLAGGED,
    GRADIENTS,
    KINDS,
    METHODS,
    PROMPT,
    SHAPE,
    UNEQUAL,
    Case,
    assert_close,
    attributed,
    by_name,
    cases,
    circuits_of,
    each_of,
    every_kind,
    graph_of,
    main_kinds,
    marks_of,
    mean_of,
    model_of,
    no_stream,
    options_of,
    oracle_of,
    oracle_scores,
    random_masks,
    same,
    task_for,
    truth,
)
from component_oracle import (
    Metric,
    Scores,
    edge_name,
    ends,
    float64_copy,
    log_probability,
    writers_into,
)
from conftest import hooked_only, random_model
from torch import Tensor

import tracedensity as td
from benchmarks.lens import HookedTransformer, parameters_of
from tracedensity.model import as_transformer
from tracedensity.setting import component_setting

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")


# -- scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(kind, method, marks=marks_of(kind))
        for kind, method in [
            *product(KINDS, ("eap", "eap-ig", "clean-corrupted", "flow", "magnitude")),
            *product(("gpt2", "gpt2 folded", "llama ungrouped", "parallel grouped", "attention only"), ("exact",)),
            *product([kind for kind in KINDS if kind not in FLAGGED], ("eap-ig-activations",)),
        ]
    ],
)
def test_scores_are_those_of_the_oracle(kind: str, method: str):
    scores = attributed(kind, method, UNEQUAL)
    assert scores.values["edge"].dtype == torch.float64
    assert_close(by_name(scores), truth(kind, method, "counterfactual"))


@every_kind
@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
def test_midpoints_and_points_between_them_are_twice_as_many_points(kind: str, ablation: str):
    twice = by_name(attributed(kind, "eap-ig", UNEQUAL, steps=6, ablation=ablation))
    left, middle = (
        by_name(attributed(kind, method, UNEQUAL, steps=3, ablation=ablation))
        for method in ("eap-ig", "eap-ig-midpoint")
    )
    assert_close({edge: (left[edge] + middle[edge]) / 2 for edge in left}, twice)


def run_and_keep(model: HookedTransformer, ids: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name] = value
        value.retain_grad()

    names = ("hook_embed", "hook_result", "hook_mlp_out", "hook_z")
    hooks = [(point, keep) for point in model.hook_dict if point.endswith(names)]
    return kept, model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)[0, -1]


def written_by(writer: str, kept: Mapping[str, Tensor]) -> Tensor:
    if writer == "input":
        return kept["hook_embed"].detach()
    if writer.startswith("m"):
        return kept[f"blocks.{writer[1:]}.hook_mlp_out"].detach()
    layer, head = writer[1:].split(".h")
    return kept[f"blocks.{layer}.attn.hook_result"].detach()[:, :, int(head)]


def patched_by_flags(model: HookedTransformer, scores: td.Scores, ungroup: bool) -> Scores:
    """For edges into queries and keys ``<z(patched) - z, gradient at z>``, by TransformerLens' own separate inputs."""
    model = copy.deepcopy(model)
    model.set_use_split_qkv_input(True)
    model.set_use_attn_result(True)
    grouped = model.cfg.n_key_value_heads not in (None, model.cfg.n_heads)
    if grouped:
        model.set_ungroup_grouped_query_attention(True)
    size = 1 if ungroup or not grouped else model.cfg.n_heads // model.cfg.n_key_value_heads
    found: dict[str, list[float]] = {}
    for number, (clean, corrupted) in enumerate(zip(UNEQUAL.clean, UNEQUAL.corrupted, strict=True)):
        (there, _), (here, logits) = (run_and_keep(model, ids) for ids in (corrupted, clean))
        (right,), (wrong,) = UNEQUAL.answer[number], UNEQUAL.distractor[number]
        (logits[right] - logits[wrong]).backward()

        for edge in by_name(scores):
            if not edge.endswith(("<q>", "<k>")):
                continue
            writer, reader = edge.split("->")
            layer, unit, letter = int(reader[1 : reader.index(".")]), int(re.findall(r"\d+", reader)[1]), reader[-2]
            heads = [unit] if letter == "q" or size == 1 else range(unit * size, (unit + 1) * size)
            point = f"blocks.{layer}.attn.hook_z"
            change = written_by(writer, there) - written_by(writer, here)

            def patch(value: Tensor, hook: Any, change: Tensor = change, heads: Any = heads) -> Tensor:
                value = value.clone()
                for head in heads:
                    value[:, :, head] += change
                return value

            seen: dict[str, Tensor] = {}
            with torch.no_grad():
                model.run_with_hooks(
                    torch.tensor([clean]),
                    fwd_hooks=[
                        (f"blocks.{layer}.hook_{letter}_input", patch),
                        (point, lambda value, hook, seen=seen: seen.update(z=value)),
                    ],
                )
            gradient = here[point].grad
            assert gradient is not None
            found.setdefault(edge, []).append(float(((seen["z"] - here[point].detach()) * gradient).sum()))
    return {edge: sum(values) / len(values) for edge, values in found.items()}


@hooked_only  # whose flags give every head inputs of its own
@each_of(["gpt2", "gpt2 folded", "llama", "llama ungrouped", "parallel", "gpt2 with flags"])
def test_attention_is_computed_anew_for_edges_into_queries_and_keys(kind: str):
    scores, eap = attributed(kind, "eap-qk", UNEQUAL), by_name(attributed(kind, "eap", UNEQUAL))
    expected = patched_by_flags(model_of(kind.removesuffix(" with flags"), torch.float64), scores, "ungrouped" in kind)
    others = {edge: score for edge, score in eap.items() if not edge.endswith(("<q>", "<k>"))}
    assert expected and others
    assert_close(by_name(scores), {edge: (expected | others)[edge] for edge in eap})
    for workspace in (1, 10_000):
        same(attributed(kind, "eap-qk", UNEQUAL, workspace=workspace), scores)


def test_attention_anew_is_everything_where_all_else_is_linear():
    options = {**SHAPE, "n_layers": 1, "attn_only": True, "normalization_type": None}
    model = float64_copy(random_model(**options))
    exact, anew = (td.attribute(model, UNEQUAL, graph="component", method=method) for method in ("exact", "eap-qk"))
    same(anew, exact)


@pytest.mark.parametrize("option", ["positions", "neurons"])
def test_attention_anew_tells_neither_tokens_nor_neurons_apart(option: str):
    with pytest.raises(ValueError, match="`positions` and `neurons` must be left out for method 'eap-qk'"):
        attributed("gpt2", "eap-qk", EQUAL, **{option: True})


@pytest.mark.parametrize("method", ["eap-ig", "clean-corrupted"])
def test_gradients_where_the_stream_is_zero_are_warned_of(method: str):
    """Llamas have no positions in the stream: without its token it is zero, and the norm blows gradients up."""
    with pytest.warns(UserWarning, match="gradients are taken where the stream is zero"):
        attributed("llama", method, UNEQUAL, ablation="zero")
    usual = td.attribute(model_of("llama", torch.float64), UNEQUAL, graph="component", ablation="zero")
    assert usual.provenance.method == "eap-ig-midpoint"
    same(usual, attributed("llama", "eap-ig-midpoint", UNEQUAL, ablation="zero"))
    assert td.attribute(model_of("llama"), UNEQUAL, graph="component").provenance.method == "eap-ig"


@main_kinds
@pytest.mark.parametrize("method", ["eap-ig, one step", "eap-ig-activations, one step"])
def test_one_step_is_the_first_of_the_oracle(kind: str, method: str):
    assert_close(by_name(attributed(kind, method, UNEQUAL)), truth(kind, method, "counterfactual"))


@hooked_only
@pytest.mark.parametrize("flag", ["attn_result", "split_qkv_input", "hook_mlp_in", "ungroup_grouped_query_attention"])
@pytest.mark.parametrize("ungroup", [False, True])
def test_no_single_flag_of_the_user_changes_a_score_or_a_circuit(flag: str, ungroup: bool):
    model = copy.deepcopy(model_of("llama", torch.float64))
    options = {"graph": "component", "method": "eap", "ungroup": ungroup}
    plain = td.attribute(model, UNEQUAL, **options)
    expected = td.evaluate(model, UNEQUAL, plain.rank(), [0, 9, 40], metrics="logit_diff")
    getattr(model, f"set_{flag}" if flag.startswith("ungroup") else f"set_use_{flag}")(True)
    same(td.attribute(model, UNEQUAL, **options), plain)
    found = td.evaluate(model, UNEQUAL, plain.rank(), [0, 9, 40], metrics="logit_diff")
    assert torch.allclose(found.metrics["logit_diff"], expected.metrics["logit_diff"], rtol=0, atol=1e-10)


@every_kind
@pytest.mark.parametrize("method", ["eap-ig", "magnitude"])
def test_scores_of_a_float32_model_are_nearly_those_of_the_oracle(kind: str, method: str):
    scores = attributed(kind, method, UNEQUAL, torch.float32)
    assert scores.values["edge"].dtype == torch.float32
    assert_close(by_name(scores), truth(kind, method, "counterfactual"), 1e-4)


@pytest.mark.parametrize("method", ["eap", "clean-corrupted", "eap-ig-activations", "exact", "flow"])
def test_other_scores_of_a_float32_model_are_nearly_those_of_the_oracle(method: str):
    for kind in ("gpt2", "llama folded"):
        scores = attributed(kind, method, UNEQUAL, torch.float32)
        assert_close(by_name(scores), truth(kind, method, "counterfactual"), 1e-4)


@no_stream
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(("gpt2", method) for method in METHODS if "one step" not in method),
        *(("llama", method) for method in ("eap-ig", "clean-corrupted", "magnitude")),
    ],
)
@pytest.mark.parametrize("ablation", ABLATIONS[1:])
def test_scores_under_other_ablations_are_those_of_the_oracle(kind: str, ablation: str, method: str):
    scores = attributed(kind, method, task_for(ablation), ablation=ablation)
    assert_close(by_name(scores), truth(kind, method, ablation))
    assert scores.provenance.ablation == ablation


@every_kind
@pytest.mark.parametrize("ablation", ABLATIONS[1:])
def test_patching_scores_of_every_kind_are_those_of_the_oracle_under_every_ablation(kind: str, ablation: str):
    scores = attributed(kind, "eap", task_for(ablation), ablation=ablation)
    assert_close(by_name(scores), truth(kind, "eap", ablation))


def test_a_positional_mean_is_over_the_prompts_that_are_so_long():
    oracle = oracle_of("gpt2")
    prompts = [torch.tensor(ids) for ids in UNEQUAL.clean]
    runs = [oracle.forward(tokens).writers for tokens in prompts]

    def mean(writer: str, pos: int) -> Tensor:
        return torch.stack([run[writer][pos] for run in runs if len(run[writer]) > pos]).mean(0)

    expected = []
    for case in cases("gpt2", "counterfactual", UNEQUAL):
        n_pos = len(case.tokens)
        ablated = {writer: torch.stack([mean(writer, pos) for pos in range(n_pos)]) for writer in oracle.writers}
        expected.append(oracle.eap(case.tokens, ablated, case.metric))
    assert_close(by_name(attributed("gpt2", "eap", UNEQUAL, ablation="mean-positional")), mean_of(expected))


METRICS: dict[str, Callable[[Case, Tensor], Metric]] = {
    "prob_diff": lambda case, clean: lambda x: x.softmax(-1)[case.right] - x.softmax(-1)[case.wrong],
    "logprob": lambda case, clean: log_probability(case.right),
    "kl": lambda case, clean: lambda x: (clean.softmax(-1) * (clean.log_softmax(-1) - x.log_softmax(-1))).sum(),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("method", "kind"), [("eap-ig", "gpt2"), ("eap-ig", "llama"), ("exact", "gpt2")])
def test_scores_of_other_metrics_are_those_of_the_oracle(metric: str, method: str, kind: str):
    oracle = oracle_of(kind)
    expected = mean_of([
        oracle_scores(oracle, method, case, METRICS[metric](case, oracle.run(case.tokens)[0]))
        for case in cases(kind, "counterfactual", UNEQUAL)
    ])  # fmt: skip
    scores = attributed(kind, method, UNEQUAL, metric=metric)
    assert_close(by_name(scores), expected)
    assert scores.helpful == (1 if metric == "kl" else -1)
    assert scores.provenance.metric == metric


def test_several_answers_count_alike():
    task = dataclasses.replace(UNEQUAL, answer=[[4, 6], [2], [7, 0, 1]], distractor=[[1], [8, 9], [10, 3]])

    def metric(logits: Tensor, right: Sequence[int], wrong: Sequence[int]) -> Tensor:
        return logits[list(right)].logsumexp(0) - logits[list(wrong)].logsumexp(0)

    expected = []
    for number, case in enumerate(cases("gpt2", "counterfactual", UNEQUAL)):
        of_this = partial(metric, right=task.answer[number], wrong=task.distractor[number])
        expected.append(oracle_of("gpt2").eap(case.tokens, case.ablated, of_this))
    assert_close(by_name(attributed("gpt2", "eap", task)), mean_of(expected))


def test_a_metric_of_the_user_is_like_one_of_ours():
    def difference(logits: Tensor, examples: Any) -> Tensor:
        return (logits.gather(1, examples.answer) - logits.gather(1, examples.distractor))[:, 0]

    for method in ("eap-ig", "eap-ig-activations"):
        ours, theirs = (attributed("gpt2", method, UNEQUAL, metric=each) for each in (None, difference))
        same(theirs, ours)
        assert theirs.provenance.metric == "difference"
        assert theirs.helpful == -1


def test_a_metric_that_gives_one_number_is_taken_row_by_row():
    def one(logits: Tensor, examples: Any) -> Tensor:
        return (logits.gather(1, examples.answer) - logits.gather(1, examples.distractor)).mean()

    for method in ("eap-ig", "exact"):
        same(attributed("gpt2", method, UNEQUAL, metric=one), attributed("gpt2", method, UNEQUAL))


@no_stream
@each_of(["gpt2", "llama", "llama ungrouped", "parallel", "attention only"])
@pytest.mark.parametrize("method", GRADIENTS)
def test_scores_of_positions_are_those_of_the_oracle(kind: str, method: str):
    oracle = oracle_of(kind)
    for ablation in ("counterfactual", "zero"):
        expected = mean_of([
            oracle.products(case.tokens, case.ablated, GRADIENTS[method](oracle, case))
            for case in cases(kind, ablation, EQUAL)
        ])  # fmt: skip
        flat = {f"{edge}@{pos}": float(each) for edge, score in expected.items() for pos, each in enumerate(score)}
        found = by_name(attributed(kind, method, EQUAL, positions=True, ablation=ablation))
        assert_close(found, {edge: score for edge, score in flat.items() if edge in found})
        # what is no edge changes nothing
        assert max(abs(score) for edge, score in flat.items() if edge not in found) < 1e-12


@main_kinds
@pytest.mark.parametrize("method", ["eap-ig", "magnitude"])
def test_scores_of_positions_sum_to_the_score_of_the_edge(kind: str, method: str):
    whole = by_name(attributed(kind, method, EQUAL))
    parts = dict.fromkeys(whole, 0.0)
    graph = graph_of(kind, n_pos=4)
    for edge, score in by_name(attributed(kind, method, EQUAL, positions=True)).items():
        parts[edge.split("@")[0]] += score
    if method == "magnitude":  # where queries and the MLP of the last layer are read at the last token only
        last = ["m1", *(f"a1.h{head}<q>" for head in range(graph.n_heads))]
        whole = {edge: score for edge, score in whole.items() if ends(edge)[1] not in last}
        parts = {edge: parts[edge] for edge in whole}
    assert_close(parts, whole)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_exact_scores_of_positions_are_those_of_the_oracle(kind: str):
    oracle, task = oracle_of(kind), EQUAL[:1]
    graph = graph_of(kind, n_pos=4)
    (case,) = cases(kind, "counterfactual", task)
    edges = [graph.edge_name("edge", tuple(i)) for i in graph.exists["edge"].nonzero().tolist()]
    triples = {edge: (*ends(edge.split("@")[0]), int(edge.split("@")[1])) for edge in edges}
    clean = float(case.metric(oracle.run(case.tokens)[0]))
    expected = {}
    for edge in edges[::3]:
        kept = [triple for other, triple in triples.items() if other != edge]
        expected[edge] = float(case.metric(oracle.run_positions(case.tokens, kept, case.ablated)[0])) - clean
    found = by_name(attributed(kind, "exact", task, positions=True))
    assert_close({edge: found[edge] for edge in expected}, expected)


@main_kinds
def test_flow_by_position_is_a_share_at_each_token(kind: str):
    oracle = oracle_of(kind)
    expected: dict[str, float] = {}
    for case in cases(kind, "counterfactual", EQUAL):
        trace = oracle.forward(case.tokens)
        for reader in oracle.readers:
            read = writers_into(oracle.shape, reader)
            for pos, y in enumerate(trace.readers[reader]):
                near = [max(0.0, float(y.abs().sum() - (y - trace.writers[w][pos]).abs().sum())) for w in read]
                for writer, value in zip(read, near, strict=True):
                    edge = f"{edge_name(writer, reader)}@{pos}"
                    expected[edge] = expected.get(edge, 0.0) + value / (sum(near) or 1.0) / len(EQUAL)
    found = by_name(attributed(kind, "flow", EQUAL, positions=True))
    assert_close(found, {edge: expected[edge] for edge in found})


@each_of(["gpt2", "llama", "llama ungrouped", "parallel grouped", "relu, three layers"])
def test_scores_of_neurons_are_those_of_the_oracle(kind: str):
    oracle = oracle_of(kind)
    found = by_name(attributed(kind, "eap", UNEQUAL, neurons=True))
    neurons = []
    for number, case in enumerate(cases(kind, "counterfactual", UNEQUAL)):
        other = torch.tensor(UNEQUAL.corrupted[number])
        scores = oracle.neuron_scores(case.tokens, other, case.metric)
        neurons.append({f"m{layer}.n{neuron}->{reader}": score for (layer, neuron, reader), score in scores.items()})
    others = {edge: each for edge, each in truth(kind, "eap", "counterfactual").items() if not edge.startswith("m")}
    assert_close(found, {**others, **mean_of(neurons)})


@pytest.mark.parametrize("method", GRADIENTS)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "relu, three layers"])
def test_neurons_of_an_mlp_sum_to_its_score(method: str, kind: str):
    for ablation in ("counterfactual", "mean"):
        found = by_name(attributed(kind, method, UNEQUAL, neurons=True, ablation=ablation))
        total: dict[str, float] = {}
        for edge, score in found.items():
            writer, reader = ends(edge)
            name = edge_name(writer.split(".n")[0], reader)
            total[name] = total.get(name, 0.0) + score
        assert_close(total, truth(kind, method, ablation) if method != "eap-ig" else truth(kind, "eap-ig", ablation))


def test_neurons_by_position_sum_to_neurons():
    whole = by_name(attributed("llama", "eap", EQUAL, neurons=True))
    parts = dict.fromkeys(whole, 0.0)
    for edge, score in by_name(attributed("llama", "eap", EQUAL, neurons=True, positions=True)).items():
        parts[edge.split("@")[0]] += score
    assert_close(parts, whole)


def test_a_neuron_ablated_to_zero_leaves_the_bias():
    """The MLP as a writer is ablated with its bias, a neuron is not."""
    oracle = oracle_of("gpt2")
    expected = []
    for case in cases("gpt2", "zero", UNEQUAL):
        post, gradients = oracle.forward(case.tokens).neurons[0], oracle.gradients(case.tokens, case.metric)
        W_out = oracle.weights["blocks.0.mlp.W_out"]
        expected.append(
            {f"m0.n{i}->logits": float(-(post[:, i] * (gradients["logits"] @ W_out[i])).sum()) for i in range(6)}
        )
    found = by_name(attributed("gpt2", "eap", UNEQUAL, neurons=True, ablation="zero"))
    assert_close({edge: found[edge] for edge in expected[0]}, mean_of(expected))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama ungrouped"])
@pytest.mark.parametrize("options", [{}, {"positions": True}, {"neurons": True}], ids=["plain", "positions", "neurons"])
def test_scores_do_not_depend_on_the_workspace(kind: str, options: dict[str, Any]):
    expected = attributed(kind, "eap-ig", EQUAL, **options)
    for workspace in (1, 5000):
        same(attributed(kind, "eap-ig", EQUAL, workspace=workspace, **options), expected, 1e-12)


@pytest.mark.parametrize(
    ("method", "n_rows"),
    [("eap-ig", 1), ("eap-ig", 2), ("eap-ig-activations", 2), ("exact", 2), ("flow", 2), ("magnitude", 2)],
)
def test_scores_do_not_depend_on_how_many_rows_are_run_at_once(method: str, n_rows: int, monkeypatch):
    for ablation in ("mean",) if method == "exact" else ("counterfactual", "mean"):
        expected = attributed("gpt2", method, UNEQUAL, ablation=ablation)
        with monkeypatch.context() as patched:
            patched.setattr("tracedensity.setting._as_many", lambda model, size: n_rows)
            same(attributed("gpt2", method, UNEQUAL, ablation=ablation), expected, 1e-11)


@pytest.mark.parametrize("method", ["flow", "magnitude", "exact"])
def test_other_scores_do_not_depend_on_scratch_memory(method: str, monkeypatch):
    options = [{}] if method == "exact" else [{}, {"positions": True}]
    expected = [attributed("gpt2", method, EQUAL, **each) for each in options]
    for module in ("score.reading", "graph.component", "score.eap"):
        monkeypatch.setattr(f"tracedensity.{module}.WORKSPACE", 1)
    found = [attributed("gpt2", method, EQUAL, **each) for each in options]
    for one, other in zip(found, expected, strict=True):
        same(one, other, 1e-11)


@pytest.mark.parametrize("method", ["eap-ig", "flow", "magnitude"])
def test_scores_do_not_depend_on_the_order_of_the_examples(method: str):
    for ablation in ("counterfactual", "mean"):
        other = attributed("gpt2", method, UNEQUAL[[2, 0, 1]], ablation=ablation)
        same(other, attributed("gpt2", method, UNEQUAL, ablation=ablation), 1e-11)


@pytest.mark.parametrize("method", ["eap-ig", "eap-ig-activations", "exact", "flow", "magnitude"])
def test_scores_of_a_batch_are_the_mean_of_those_one_by_one(method: str):
    single = [by_name(attributed("gpt2", method, UNEQUAL[[i]])) for i in range(3)]
    assert_close(by_name(attributed("gpt2", method, UNEQUAL)), mean_of(single))


def test_relevance_is_the_gradient_where_there_is_nothing_to_replace():
    """A ReLU is a factor of 0 or 1 already; up to the stabiliser, 1e-6 beside its input."""
    same(attributed("no norm", "relp", UNEQUAL), attributed("no norm", "eap", UNEQUAL), 1e-3)
    with pytest.raises(AssertionError):
        same(attributed("gpt2", "relp", UNEQUAL), attributed("gpt2", "eap", UNEQUAL), 1e-2)


@main_kinds
def test_relevance_of_what_enters_a_norm_is_conserved(kind: str):
    """With norms and activations linear and patterns as they are, a zero-ablated writer's effect passes on whole.

    The MLP's relevance to the logits is -<output, gradient>, and that is what the edges into it sum up to but for
    biases, which get none; halved gates keep that of the gated one.
    """
    model = copy.deepcopy(model_of(kind, torch.float64))
    with torch.no_grad():
        for name, parameter in parameters_of(model).items():
            if ".b" in name:
                parameter.zero_()
        if "pos_embed.W_pos" in parameters_of(model):
            model.pos_embed.W_pos.zero_()
    scores = by_name(td.attribute(model, UNEQUAL, method="relp", ablation="zero", **options_of(kind)))
    into = sum(score for edge, score in scores.items() if ends(edge)[1] == "m1")
    # b_out is zero too, so that the MLP writes what its neurons do
    assert into == pytest.approx(scores["m1->logits"], rel=1e-4)


# -- padding -----------------------------------------------------------------------------------------


def padded(side: str, prompts: Iterable[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    rows, masks = [], []
    for ids in prompts:
        pad = [filler] * (7 - len(ids))
        real, fill = [1] * len(ids), [0] * len(pad)
        rows.append([*pad, *ids] if side == "left" else [*ids, *pad])
        masks.append([*fill, *real] if side == "left" else [*real, *fill])
    return torch.tensor(rows), torch.tensor(masks)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["eap-ig", "flow", "magnitude"])
def test_padding_changes_no_score(side: str, kind: str, method: str):
    clean, mask = padded(side, UNEQUAL.clean, 0)
    corrupted, _ = padded(side, UNEQUAL.corrupted, 9)
    task = td.Task(clean, corrupted, UNEQUAL.answer, UNEQUAL.distractor, attention_mask=mask)
    assert_close(by_name(attributed(kind, method, task)), truth(kind, method, "counterfactual"))
    if method == "eap-ig":
        model, graph = model_of(kind, torch.float64), graph_of(kind)
        for ablation in ("counterfactual", "mean", "mean-positional"):
            circuits = circuits_of(graph, random_masks(graph)[1:4], ablation)
            found, expected = (td.evaluate(model, each, circuits, metrics="logit_diff") for each in (task, UNEQUAL))
            assert torch.allclose(
                found.per_example["logit_diff"], expected.per_example["logit_diff"], rtol=0, atol=1e-12
            )


def test_the_prediction_may_be_that_of_an_earlier_token():
    later = td.Task(
        clean=[[*ids[:-1], 1, 2] for ids in UNEQUAL.clean],
        corrupted=[[*ids[:-1], 7, 7] for ids in UNEQUAL.corrupted],
        answer=UNEQUAL.answer,
        distractor=UNEQUAL.distractor,
        position=-3,
    )
    shorter = td.Task(
        clean=[ids[:-1] for ids in UNEQUAL.clean],
        corrupted=[ids[:-1] for ids in UNEQUAL.corrupted],
        answer=UNEQUAL.answer,
        distractor=UNEQUAL.distractor,
    )
    same(attributed("gpt2", "eap", later), attributed("gpt2", "eap", shorter))
    at_first = dataclasses.replace(UNEQUAL, position=0)  # where nothing but the token itself is seen
    first = td.Task(
        [ids[:1] for ids in UNEQUAL.clean],
        [ids[:1] for ids in UNEQUAL.corrupted],
        UNEQUAL.answer,
        UNEQUAL.distractor,
    )
    same(attributed("gpt2", "eap-ig", at_first), attributed("gpt2", "eap-ig", first))


# -- identities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "attention only"])
@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
def test_integrated_gradients_out_of_the_embedding_sum_to_the_whole_effect(kind: str, ablation: str):
    """The error is that of a sum in place of an integral: it falls as one over the steps."""
    oracle, whole = oracle_of(kind), []
    for case in cases(kind, ablation, UNEQUAL):
        run = oracle.forward(case.tokens, replaced={"input": case.ablated["input"]})
        whole.append(float(case.metric(run.logits) - case.metric(oracle.run(case.tokens)[0])))
    expected = sum(whole) / len(whole)

    def error(steps: int) -> float:
        scores = by_name(attributed(kind, "eap-ig", UNEQUAL, steps=steps, ablation=ablation))
        return sum(score for edge, score in scores.items() if edge.startswith("input->")) - expected

    coarse, fine = error(25), error(100)
    assert abs(fine) < 0.05 * abs(expected)
    assert fine == pytest.approx(coarse / 4, rel=0.1)


@pytest.fixture(scope="module")
def linear_model() -> HookedTransformer:
    """Logits are linear in the embedding: no norm, no MLP, and patterns that are the same for all prompts."""
    options = {**SHAPE, "n_layers": 3, "attn_only": True, "normalization_type": None}
    model = float64_copy(random_model(**options))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.zero_()
            block.attn.W_K.zero_()
    return model


@pytest.mark.parametrize("method", ["eap", "eap-ig", "clean-corrupted"])
def test_in_a_linear_model_the_first_order_is_everything(linear_model: HookedTransformer, method: str):
    exact = by_name(td.attribute(linear_model, UNEQUAL, graph="component", method="exact"))
    found = by_name(td.attribute(linear_model, UNEQUAL, graph="component", method=method, steps=2))
    assert_close(found, exact)
    for edge, score in exact.items():
        if edge.endswith(("<q>", "<k>")):  # the pattern is what it is
            assert abs(score) < 1e-12 and abs(found[edge]) < 1e-12


def test_a_swapped_pair_has_the_opposite_effects_in_a_linear_model(linear_model: HookedTransformer):
    swapped = dataclasses.replace(UNEQUAL, clean=UNEQUAL.corrupted, corrupted=UNEQUAL.clean)
    for method in ("eap", "eap-ig", "clean-corrupted"):
        there, back = (
            by_name(td.attribute(linear_model, each, graph="component", method=method)) for each in (UNEQUAL, swapped)
        )
        assert_close({edge: -score for edge, score in back.items()}, there)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_pair_that_is_the_same_twice_scores_nothing(kind: str):
    task = dataclasses.replace(UNEQUAL, corrupted=UNEQUAL.clean)
    for method in ("eap", "eap-ig", "clean-corrupted", "eap-ig-activations", "exact", "magnitude", "relp"):
        scores = attributed(kind, method, task)
        assert scores.values["edge"].abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_scores_are_signed_as_the_change_of_the_metric_is(kind: str):
    """The edge that helps most by its exact score is one whose removal makes the metric fall most."""
    scores = attributed(kind, "exact", UNEQUAL[:1])
    first = scores.rank("top", signed=True).circuit(1)
    last = scores.rank("top", signed=True).circuit(scores.graph.n_edges - 1)
    model = model_of(kind, torch.float64)
    without = td.evaluate(model, UNEQUAL[:1], [first], metrics="logit_diff", inverse=True)
    without_last = td.evaluate(model, UNEQUAL[:1], [last], metrics="logit_diff")
    change, of_last = (
        float(each.metrics["logit_diff"][0] - each.full["logit_diff"][0]) for each in (without, without_last)
    )
    values = by_name(scores)
    assert change == pytest.approx(min(values.values()), abs=1e-10)
    assert of_last == pytest.approx(max(values.values()), abs=1e-10)
    assert change < 0 < of_last


# -- single prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eap", "flow", "magnitude"])
def test_a_prompt_without_a_counterpart_is_resampled(kind: str, method: str):
    """Which is the counterfactual on as many prompts with drawn tokens, the model's own prediction being asked for."""
    model = model_of(kind, torch.float64)
    scores = attributed(kind, method, PROMPT, seed=5)
    assert scores.provenance.ablation == "resample" and scores.provenance.seed == 5
    setting = component_setting(as_transformer(model), PROMPT, None, -1, 5)
    assert setting.examples.corrupted is not None
    with torch.no_grad():
        top = int(model(torch.tensor([PROMPT]))[0, -1].argmax())
    task = td.Task([PROMPT] * 8, setting.examples.corrupted, answer=[top] * 8)
    assert (setting.examples.corrupted != torch.tensor(PROMPT)).float().mean() > 0.5
    same(scores, attributed(kind, method, task))
    same(attributed(kind, method, [PROMPT], seed=5), scores)
    same(attributed(kind, method, torch.tensor(PROMPT), seed=5), scores)
    if method != "flow":
        with pytest.raises(AssertionError):
            same(attributed(kind, method, PROMPT, seed=6), scores, 1e-3)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_a_prompt_is_ablated_as_a_task_of_one_is(kind: str, ablation: str):
    oracle, tokens = oracle_of(kind), torch.tensor(PROMPT)
    ablated = oracle.zero_values(5) if ablation == "zero" else oracle.mean_values([tokens], 5)
    expected = oracle.eap(tokens, ablated, log_probability(int(oracle.run(tokens)[0].argmax())))
    assert_close(by_name(attributed(kind, "eap", [PROMPT], ablation=ablation)), expected)


def test_a_seed_makes_a_result_again():
    for method in ("eap", "random", "random-connected"):
        one, again, other = (attributed("gpt2", method, PROMPT, seed=seed) for seed in (1, 1, 2))
        assert (one.values["edge"] == again.values["edge"]).all()
        assert (one.values["edge"] != other.values["edge"]).any()
    curves = [td.density(model_of("gpt2"), PROMPT, graph="component", seed=seed).to_dict() for seed in (1, 1, 2)]
    assert curves[0] == curves[1] != curves[2]


def test_a_circuit_is_run_on_the_tokens_that_its_seed_draws():
    model = model_of("gpt2", torch.float64)
    ranking = attributed("gpt2", "eap", PROMPT, seed=1).rank()
    usual, same_seed, other = (
        td.evaluate(model, PROMPT, ranking, [4], metrics="kl", seed=seed) for seed in (None, 1, 2)
    )
    assert usual.metrics["kl"] == same_seed.metrics["kl"] != other.metrics["kl"]


def test_one_token_is_a_prompt(kind: str):
    for ablation in (None, "zero"):
        curve = td.density(model_of(kind), [4], graph="component", ablation=ablation)
        assert float(curve.faithfulness[-1]) == pytest.approx(1, abs=1e-5)


def test_a_position_of_a_prompt_is_the_end_of_a_shorter_one():
    same(
        attributed("gpt2", "eap", PROMPT, position=2, ablation="zero"),
        attributed("gpt2", "eap", PROMPT[:3], ablation="zero"),
    )
