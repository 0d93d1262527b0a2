"""Circuits of the component graph against `component_oracle`: run, evaluated, cut at all faithfulnesses."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from component_cases import (
    EQUAL,
    KINDS,
    UNEQUAL,
    Case,
    attributed,
    cases,
    circuits_of,
    each_of,
    every_ablation,
    every_kind,
    graph_of,
    main_kinds,
    model_of,
    options_of,
    oracle_of,
    random_masks,
    task_for,
)
from component_oracle import (
    ends,
    log_probability,
)
from torch import Tensor

import tracedensity as td
from tracedensity.graph.component import ComponentGraph

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")


# -- circuits ----------------------------------------------------------------------------------------


def names_of(graph: ComponentGraph, mask: Tensor) -> list[str]:
    return [graph.edge_name("edge", tuple(index)) for index in mask.nonzero().tolist()]


def expected_logits(kind: str, case: Case, graph: ComponentGraph, mask: Tensor) -> Tensor:
    kept = names_of(graph, mask)
    if graph.n_pos is None:
        return oracle_of(kind).run(case.tokens, kept, case.ablated)[0]
    triples = [(*ends(edge.split("@")[0]), int(edge.split("@")[1])) for edge in kept]
    return oracle_of(kind).run_positions(case.tokens, triples, case.ablated)[0]


def assert_circuits_are_right(
    kind: str,
    task: td.Task,
    graph: ComponentGraph,
    ablation: str,
    masks: Sequence[Tensor],
    dtype: torch.dtype,
    **options: Any,
) -> td.Evaluation:
    found = td.evaluate(
        model_of(kind, dtype), task, circuits_of(graph, masks, ablation), metrics=["logit_diff", "logprob"], **options
    )
    some = cases(kind, ablation, task)
    chosen = [graph.exists["edge"] & ~mask for mask in masks] if options.get("inverse") else masks
    logits = [[expected_logits(kind, case, graph, mask) for case in some] for mask in chosen]
    for name, of_case in (
        ("logit_diff", lambda case: case.metric),
        ("logprob", lambda case: log_probability(case.right)),
    ):
        expected = torch.stack([
            torch.stack([of_case(case)(each) for case, each in zip(some, row, strict=True)]) for row in logits
        ])  # fmt: skip
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        assert found.per_example[name].shape == expected.shape
        assert (found.per_example[name].double() - expected).abs().max() <= tolerance * expected.abs().max()
        assert torch.allclose(found.metrics[name].double(), found.per_example[name].double().mean(1))
    return found


@each_of(KINDS)
@every_ablation
def test_circuits_are_run_as_the_oracle_runs_them(kind: str, ablation: str):
    graph = graph_of(kind)
    masks = random_masks(graph)
    found = assert_circuits_are_right(kind, task_for(ablation), graph, ablation, masks, torch.float64)
    assert found.sizes.tolist() == [int(mask.sum()) for mask in masks]
    assert found.empty is not None
    for name in found.metrics:
        assert torch.allclose(found.full[name], found.per_example[name][0])
        assert torch.allclose(found.empty[name], found.per_example[name][1])


@every_kind
def test_circuits_of_a_float32_model_are_nearly_those_of_the_oracle(kind: str):
    graph = graph_of(kind)
    assert_circuits_are_right(kind, UNEQUAL, graph, "mean", random_masks(graph), torch.float32)


@each_of(["gpt2", "llama", "llama ungrouped", "parallel", "attention only"])
@every_ablation
def test_circuits_of_positions_are_run_as_the_oracle_runs_them(kind: str, ablation: str):
    graph = graph_of(kind, n_pos=4)
    assert_circuits_are_right(kind, EQUAL, graph, ablation, random_masks(graph), torch.float64)


@main_kinds
def test_everything_but_a_circuit_is_its_complement(kind: str):
    for graph in (graph_of(kind), graph_of(kind, n_pos=4)):
        masks = random_masks(graph, 1)
        assert_circuits_are_right(kind, EQUAL, graph, "counterfactual", masks, torch.float64, inverse=True)


@every_kind
def test_all_edges_are_the_model_and_none_the_corrupted_prompt(kind: str):
    model, graph = model_of(kind, torch.float64), graph_of(kind)
    with torch.no_grad():
        logits = [
            [model(torch.tensor([ids]))[0, -1] for ids in prompts] for prompts in (UNEQUAL.clean, UNEQUAL.corrupted)
        ]
    found = td.evaluate(
        model, UNEQUAL, circuits_of(graph, random_masks(graph)[:2], "counterfactual"), metrics=["logit_diff", "tv"]
    )
    for row, per_example in enumerate(logits):
        expected = [
            float(each[right] - each[wrong])
            for each, (right,), (wrong,) in zip(per_example, UNEQUAL.answer, UNEQUAL.distractor, strict=True)
        ]
        assert found.per_example["logit_diff"][row].tolist() == pytest.approx(expected, abs=1e-10)
    assert found.metrics["tv"][0] < 1e-10 < found.metrics["tv"][1]


@pytest.mark.parametrize("kind", ["gpt2", "llama ungrouped"])
def test_circuits_together_are_circuits_one_by_one(kind: str):
    model = model_of(kind, torch.float64)
    for graph in (graph_of(kind), graph_of(kind, n_pos=4)):
        circuits = circuits_of(graph, random_masks(graph, 2), "mean")
        together = td.evaluate(model, EQUAL, circuits, metrics="logit_diff").per_example["logit_diff"]
        for batch_size in (1, 4):
            found = td.evaluate(model, EQUAL, circuits, metrics="logit_diff", batch_size=batch_size)
            assert torch.allclose(found.per_example["logit_diff"], together, rtol=0, atol=1e-12)
        for number, circuit in enumerate(circuits):
            alone = td.evaluate(model, EQUAL, circuit, metrics="logit_diff").per_example["logit_diff"]
            assert torch.allclose(alone[0], together[number], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_rows", [1, 2, 7])
def test_circuits_do_not_depend_on_how_much_is_run_at_once(n_rows: int, monkeypatch):
    monkeypatch.setattr("tracedensity.setting._as_many", lambda model, size: n_rows)
    monkeypatch.setattr("tracedensity.graph.component.WORKSPACE", n_rows)
    for kind, graph, task in (("llama", graph_of("llama"), UNEQUAL), ("gpt2", graph_of("gpt2", n_pos=4), EQUAL)):
        assert_circuits_are_right(kind, task, graph, "mean", random_masks(graph)[1:5], torch.float64)


@main_kinds
def test_a_ranking_is_run_as_its_circuits_are(kind: str):
    model = model_of(kind, torch.float64)
    for options in ({}, {"positions": True}):
        ranking = attributed(kind, "eap", EQUAL, ablation="zero", **options).rank()
        sizes = [0, 1, 2, 5, 17, ranking.n_edges - 1, ranking.n_edges]
        for inverse in (False, True):
            family = td.evaluate(model, EQUAL, ranking, sizes, inverse=inverse)
            circuits = td.evaluate(model, EQUAL, [ranking.circuit(size) for size in sizes], inverse=inverse)
            assert list(family.metrics) == ["logit_diff", "tv", "kl", "top1"] == list(circuits.metrics)
            assert family.sizes.tolist() == sizes == circuits.sizes.tolist()
            assert family.pruned_sizes is not None and circuits.pruned_sizes is not None
            assert family.pruned_sizes.tolist() == circuits.pruned_sizes.tolist()
            for name, values in family.metrics.items():
                assert torch.allclose(values, circuits.metrics[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_pos", [None, 4])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_pruned_edges_do_not_matter_under_the_counterfactual(kind: str, n_pos: int | None):
    graph = graph_of(kind, n_pos=n_pos)
    circuits = circuits_of(graph, random_masks(graph, 3)[3:], "counterfactual")
    less = [circuit.pruned() for circuit in circuits]
    sizes = [circuit.n_edges for circuit in less]
    assert sizes != [circuit.n_edges for circuit in circuits]
    found = td.evaluate(model_of(kind, torch.float64), EQUAL, [*circuits, *less], metrics="kl")
    of_all, of_less = found.per_example["kl"].chunk(2)
    assert torch.allclose(of_all, of_less, rtol=0, atol=1e-12)
    assert found.pruned_sizes is not None
    assert found.pruned_sizes.tolist() == sizes * 2 == [circuit.pruned_size for circuit in circuits] * 2


@pytest.mark.parametrize("name", ["tv", "kl", "js", "top1", "entropy", "logprob", "prob_diff"])
def test_metrics_of_circuits_are_made_of_the_oracles_logits(name: str):
    graph = graph_of("llama")
    masks = random_masks(graph, 4)[2:]
    found = td.evaluate(
        model_of("llama", torch.float64), UNEQUAL, circuits_of(graph, masks, "counterfactual"), metrics=name
    )
    for row, mask in enumerate(masks):
        for column, case in enumerate(cases("llama", "counterfactual", UNEQUAL)):
            p = oracle_of("llama").run(case.tokens)[0].softmax(-1)
            q = expected_logits("llama", case, graph, mask).softmax(-1)
            middle = (p + q) / 2
            expected = {
                "tv": (p - q).abs().sum() / 2,
                "kl": (p * (p / q).log()).sum(),
                "js": ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2,
                "top1": (p.argmax() == q.argmax()).double(),
                "entropy": -(q * q.log()).sum(),
                "logprob": q[case.right].log(),
                "prob_diff": q[case.right] - q[case.wrong],
            }[name]
            assert float(found.per_example[name][row, column]) == pytest.approx(float(expected), abs=1e-10)


# -- density -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", ["counterfactual", "zero"])
def test_minimal_sizes_agree_with_running_every_size(kind: str, ablation: str):
    model, graph = model_of(kind), graph_of(kind)
    every = td.density(model, UNEQUAL, graph="component", sizes=range(graph.n_edges + 1), ablation=ablation)
    assert every.sizes.tolist() == list(range(graph.n_edges + 1))
    found = td.density(model, UNEQUAL, graph="component", ablation=ablation, baselines=False)
    assert set(found.sizes.tolist()) <= set(every.sizes.tolist())
    at = every.faithfulness[found.sizes]
    assert torch.allclose(found.faithfulness, at, atol=1e-5)
    truth = every.faithfulness.tolist()
    for threshold in every.thresholds:
        first = next(size for size, value in enumerate(truth) if value >= threshold - 1e-6)
        stable = 1 + max(size for size, value in enumerate(truth) if value < threshold - 1e-6)
        assert every.minimal_size(threshold) == first
        assert every.minimal_size(threshold, stable=True) == stable
        # what was not run in between may hide a crossing, but never makes one
        size = found.minimal_size(threshold)
        assert size >= first and truth[size] >= threshold - 1e-5
        assert size == 0 or truth[size - 1] < threshold
    assert every.random is not None and every.inverse is not None


@main_kinds
def test_faithfulness_is_the_share_of_the_way_from_empty_to_model(kind: str):
    for ablation in ("counterfactual", "zero"):
        model = model_of(kind, torch.float64)
        curve = td.density(model, UNEQUAL, ablation=ablation, baselines=False, sizes=[3, 11], **options_of(kind))
        some, oracle, graph = cases(kind, ablation, UNEQUAL), oracle_of(kind), curve.ranking.graph
        assert isinstance(graph, ComponentGraph)

        def values(kept: Iterable[str], some: Sequence[Case] = some) -> list[float]:
            return [float(case.metric(oracle_of(kind).run(case.tokens, kept, case.ablated)[0])) for case in some]

        full, empty = values(oracle.edges), values([])
        assert curve.full is not None and curve.empty is not None and curve.values is not None
        assert curve.full.tolist() == pytest.approx(full) and curve.empty.tolist() == pytest.approx(empty)
        for size in (0, 3, 11, graph.n_edges):
            (point,) = (curve.sizes == size).nonzero()[:, 0].tolist()
            circuit = values(names_of(graph, curve.ranking.kept(size)["edge"]))
            expected = (sum(circuit) - sum(empty)) / (sum(full) - sum(empty))
            assert float(curve.faithfulness[point]) == pytest.approx(expected, abs=1e-9)
            assert curve.values[point].tolist() == pytest.approx(circuit)
            each = [(c - e) / (f - e) for c, e, f in zip(circuit, empty, full, strict=True)]
            assert curve.faithfulness_per_example()[point].tolist() == pytest.approx(each)
        evaluation = td.evaluate(model, UNEQUAL, curve.ranking, curve.sizes)
        assert torch.allclose(evaluation.faithfulness(), curve.faithfulness)
        assert torch.allclose(evaluation.faithfulness("logit_diff"), curve.faithfulness)
        assert evaluation.pruned_sizes is not None and curve.pruned_sizes is not None
        assert evaluation.pruned_sizes.tolist() == curve.pruned_sizes.tolist()
        with pytest.raises(ValueError, match=r"`metric` must be one that was measured, \['logit_diff', 'tv'"):
            evaluation.faithfulness("js")


def test_minimal_sizes_per_example_by_hand():
    curve = td.density(model_of("gpt2"), UNEQUAL[:2], graph="component", baselines=False)
    by_hand = dataclasses.replace(
        curve,
        sizes=torch.tensor([0, 1, 4, 10, curve.n_edges]),
        faithfulness=torch.tensor([0.0, 0.2, 0.4, 0.9, 1.0]).double(),
        full=torch.tensor([2.0, 5.0]),
        empty=torch.tensor([0.0, 1.0]),
        #                    share of the way:  0, 0 | 0.5, 0 | 0.25, 1.5 | 0.9, 0.75 | 1, 1
        values=torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.5, 7.0], [1.8, 4.0], [2.0, 5.0]]),
        pruned_sizes=torch.tensor([0, 1, 3, 10, curve.n_edges]),
    )
    shares = [[0.0, 0.0], [0.5, 0.0], [0.25, 1.5], [0.9, 0.75], [1.0, 1.0]]
    assert torch.allclose(by_hand.faithfulness_per_example(), torch.tensor(shares))
    n_edges = curve.n_edges
    for threshold, first, stable in (
        (0.5, [1, 4], [10, 4]),
        (0.9, [10, 4], [10, n_edges]),
        (1.0, [n_edges, 4], [n_edges] * 2),
    ):
        assert by_hand.minimal_size_per_example(threshold).tolist() == first
        assert by_hand.minimal_size_per_example(threshold, stable=True).tolist() == stable
    with pytest.raises(ValueError, match="`thresholds` must be faithfulnesses above 0 and at most 1"):
        by_hand.minimal_size_per_example(1.5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {"baselines": True}),
        ("gpt2", {"metric": "tv"}),
        ("gpt2", {"family": "threshold", "signed": True}),
        ("llama", {"positions": True}),
        ("llama", {"ungroup": True, "ablation": "mean"}),
    ],
)
def test_a_curve_is_written_and_read_again(kind: str, options: dict[str, Any], tmp_path):
    curve = td.density(model_of(kind), EQUAL, **{"graph": "component", "baselines": False, **options})
    curve.save(tmp_path / "curve")
    again = td.load(tmp_path / "curve")
    assert isinstance(again, td.DensityCurve)
    assert again.to_dict() == curve.to_dict()
    assert again.ranking.graph == curve.ranking.graph and again.conditions == curve.conditions
    assert (again.ranking.rank["edge"] == curve.ranking.rank["edge"]).all()
    for name in ("values", "full", "empty", "pruned_sizes", "sizes", "faithfulness"):
        one, other = getattr(again, name), getattr(curve, name)
        assert (one is None) == (other is None)
        assert one is None or (one == other).all()
    assert (curve.full is None) == (options.get("metric") == "tv")
    task = again.provenance.task
    assert task is not None
    assert task.to_dict() == EQUAL.to_dict()
    assert again.minimal_size_per_example(0.5).tolist() == curve.minimal_size_per_example(0.5).tolist()
    assert repr(again) == repr(curve)
    found = td.evaluate(model_of(kind), task, again.circuit(size=5))
    assert torch.allclose(found.metrics["tv"], td.evaluate(model_of(kind), EQUAL, curve.ranking, [5]).metrics["tv"])


@pytest.mark.parametrize(
    ("metric", "ablation"), [("logit_diff", "counterfactual"), ("tv", "mean"), ("kl", "zero"), ("logprob", "mean")]
)
def test_a_circuit_is_verified_on_the_task_it_was_found_on(kind: str, metric: str, ablation: str, tmp_path):
    model = model_of(kind)
    curve = td.density(model, UNEQUAL, graph="component", metric=metric, ablation=ablation, baselines=False)
    circuit = curve.circuit(size=int(curve.sizes[len(curve.sizes) // 2]))
    assert circuit.verify(model).faithfulness == pytest.approx(circuit.faithfulness, abs=1e-5)
    circuit.save(tmp_path / "circuit")
    assert td.load(tmp_path / "circuit").verify(model).faithfulness == pytest.approx(circuit.faithfulness, abs=1e-5)
    with pytest.raises(ValueError, match="makes another model"):
        circuit.verify(model_of("no norm"))


def test_a_circuit_of_a_single_prompt_is_verified():
    curve = td.density(model_of("gpt2"), [3, 1, 4, 1], graph="component", baselines=False, seed=3)
    circuit = curve.circuit(faithfulness=0.5)
    assert circuit.verify(model_of("gpt2")).faithfulness == pytest.approx(circuit.faithfulness, abs=1e-5)


def test_a_density_by_a_metric_of_the_user_is_that_of_the_metric_whatever_its_name():
    def kl(logits: Tensor, examples: Any) -> Tensor:
        return (logits.gather(1, examples.answer) - logits.gather(1, examples.distractor))[:, 0]

    model = model_of("gpt2")
    theirs = td.density(model, UNEQUAL, graph="component", metric=kl, baselines=False)
    ours = td.density(model, UNEQUAL, graph="component", baselines=False)
    assert theirs.faithfulness.tolist() == pytest.approx(ours.faithfulness.tolist(), abs=1e-5)


def test_two_metrics_of_one_name_are_not_taken_for_one():
    ranking = attributed("gpt2", "eap", UNEQUAL).rank()
    first, second = (lambda logits, examples: logits[:, 0]), (lambda logits, examples: logits[:, 1])
    with pytest.raises(ValueError, match="`metrics` must"):
        td.evaluate(model_of("gpt2"), UNEQUAL, ranking, [3], metrics=[first, second])


def test_areas_are_trapezoids():
    ranking = attributed("gpt2", "eap", UNEQUAL).rank()
    found = td.evaluate(model_of("gpt2"), UNEQUAL, ranking, [1, 10, 46])
    height = found.faithfulness().tolist()
    assert ranking.n_edges == 46
    expected = 9 / 46 * (height[0] + height[1]) / 2 + 36 / 46 * (height[1] + height[2]) / 2
    assert found.cpr() == pytest.approx(expected)
    far = [abs(1 - each) for each in height]
    assert found.cmd() == pytest.approx(9 / 46 * (far[0] + far[1]) / 2 + 36 / 46 * (far[1] + far[2]) / 2)
    log = math.log10(10) * (height[0] + height[1]) / 2 + math.log10(4.6) * (height[1] + height[2]) / 2
    assert found.cpr(log=True) == pytest.approx(log)
    by_default = td.evaluate(model_of("gpt2"), UNEQUAL, ranking)
    assert by_default.sizes.tolist() == [0, 0, 0, 0, 0, 2, 4, 9, 23, 46]
    table = by_default.to_dataframe()
    assert list(table.columns[:3]) == ["size", "fraction", "pruned_size"]
    for sizes in ([5], [0, 5]):
        with pytest.raises(ValueError, match="`sizes` must be two or more above 0 for an area"):
            td.evaluate(model_of("gpt2"), UNEQUAL, ranking, sizes).cpr(log=True)


def test_a_metric_that_does_not_tell_the_model_from_nothing_has_no_faithfulness():
    ranking = attributed("gpt2", "eap", UNEQUAL).rank()
    same_twice = dataclasses.replace(UNEQUAL, corrupted=UNEQUAL.clean)
    found = td.evaluate(model_of("gpt2"), same_twice, ranking, [3])
    with pytest.raises(ValueError, match="`metric` must tell the model from the circuit without edges"):
        found.faithfulness()
