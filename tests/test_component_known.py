"""Circuits of components that are known by hand: whether they are what we think they are, and are found."""

from collections.abc import Callable, Collection
from functools import cache
from itertools import combinations
from typing import NamedTuple

import handmade_components as handmade
import pytest
import torch
from component_oracle import ComponentOracle, ends, logit_difference
from handmade import A, B, C, D
from handmade_components import BOTH_ON_CIRCUITS, BOTH_ON_TASK, DEAD_BRANCH
from torch import Tensor

import tracedensity as td
from benchmarks.lens import HookedTransformer

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")


class Known(NamedTuple):
    make: Callable[[], HookedTransformer]
    task: td.Task
    circuit: frozenset[str]
    n_live: int  # edges that can have an effect


KNOWN = {
    "induction": Known(handmade.induction_model, handmade.INDUCTION_TASK, handmade.INDUCTION_CIRCUIT, 7),
    "and": Known(handmade.and_model, handmade.AND_TASK, handmade.TWO_BITS_CIRCUIT, 7),
    "or": Known(handmade.or_model, handmade.OR_TASK, handmade.TWO_BITS_CIRCUIT, 5),
    "dead branch": Known(handmade.relay_model, handmade.RELAY_TASK, handmade.RELAY_CIRCUIT, 3),
}
each_known = pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN)
each_finder = pytest.mark.parametrize("method", ["exact", "eap-ig"])


@cache
def scores_of(known: Known, method: str) -> td.Scores:
    return td.attribute(known.make(), known.task, graph="component", method=method)


@cache
def density_of(known: Known, method: str, **options: object) -> td.DensityCurve:
    """A curve on which every size was run."""
    model = known.make()
    sizes = range(len(ComponentOracle(model).edges))
    options = {"method": method, "thresholds": (0.99,), "sizes": sizes, "baselines": False, **options}
    return td.density(model, known.task, graph="component", **options)


def by_name(scores: td.Scores) -> dict[str, float]:
    table = scores.top(scores.graph.n_edges)
    return dict(zip(table["edge"], table["score"], strict=True))


# -- what is known, without the package ------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "prompt", "expected"),
    [
        pytest.param(handmade.induction_model, (A, B, A), B, id="B came after A"),
        pytest.param(handmade.induction_model, (C, D, D), D, id="D came after D"),
        pytest.param(handmade.and_model, (A, A, D), C, id="both are on"),
        pytest.param(handmade.and_model, (A, B, D), D, id="one is not enough"),
        pytest.param(handmade.and_model, (B, A, D), D, id="nor is the other"),
        pytest.param(handmade.and_model, (B, B, D), D, id="nor none"),
        pytest.param(handmade.or_model, (A, A, D), C, id="both are enough"),
        pytest.param(handmade.or_model, (A, B, D), C, id="so is one"),
        pytest.param(handmade.or_model, (B, A, D), C, id="so is the other"),
        pytest.param(handmade.or_model, (B, B, D), D, id="none is not"),
        pytest.param(handmade.relay_model, (A, B, C), A, id="the first token"),
    ],
)
def test_the_models_do_what_they_are_made_for(make, prompt, expected):
    assert make()(torch.tensor([prompt]))[0, -1].argmax() == expected


@each_known
def test_the_tasks_are_solved_and_their_counterfactuals_are_not(known):
    model, task = known.make(), known.task
    assert task.solved(model).accuracy == 1
    corrupted = td.Task(task.corrupted, answer=task.answer, distractor=task.distractor)
    assert corrupted.solved(model).accuracy == 0


class Truth:
    """Faithfulness of sets of edges on a task, by the oracle."""

    def __init__(self, model: HookedTransformer, task: td.Task) -> None:
        self.oracle = ComponentOracle(model)
        self.pairs = []
        for clean, corrupted, (right,), (wrong,) in zip(
            task.clean, task.corrupted, task.answer, task.distractor, strict=True
        ):
            ablated = self.oracle.corrupted_values(torch.tensor(corrupted))
            self.pairs.append((torch.tensor(clean), ablated, logit_difference(right, wrong)))
        self.empty, self.full = self.metric([]), self.metric(None)

    def metric(self, kept: Collection[str] | None) -> float:
        return sum(float(metric(self.oracle.run(clean, kept, ablated)[0])) for clean, ablated, metric in self.pairs)

    def faithfulness(self, kept: Collection[str]) -> float:
        return (self.metric(kept) - self.empty) / (self.full - self.empty)


def live_edges(model: HookedTransformer) -> list[str]:
    """Edges that can matter: the reader's weights see some of what the writer can write, and so on to the logits.

    What the others carry, on whichever prompt and in whichever circuit, is multiplied by zero on its way.
    """
    oracle = ComponentOracle(model)
    reached, live = {"logits"}, []
    for edge in reversed(oracle.edges):
        writer, reader = ends(edge)
        node = reader.split("<")[0]
        if node in reached and (written_by(model, writer) @ read_by(model, reader)).any():
            reached.add(writer)
            live.append(edge)
    return live


def written_by(model: HookedTransformer, writer: str) -> Tensor:
    """Rows of which a writer's output is made, but for what it always writes."""
    if writer == "input":
        return model.W_E
    if writer.startswith("m"):
        return model.blocks[int(writer[1:])].mlp.W_out
    layer, head = writer[1:].split(".h")
    return model.W_O[int(layer), int(head)]


def read_by(model: HookedTransformer, reader: str) -> Tensor:
    if reader == "logits":
        return model.W_U
    if reader.startswith("m"):
        return model.blocks[int(reader[1:])].mlp.W_in
    layer, head = reader[1:].split("<")[0].split(".h")
    weights = {"q": model.W_Q, "k": model.W_K, "v": model.W_V}[reader[-2]]
    return weights[int(layer), int(head)]


@each_known
def test_edges_that_are_not_live_do_nothing(known):
    model = known.make()
    truth, live = Truth(model, known.task), set(live_edges(model))
    assert len(live) == known.n_live and known.circuit <= live
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        kept = {edge for edge in truth.oracle.edges if torch.rand((), generator=generator) < 0.7}
        assert truth.metric(kept) == pytest.approx(truth.metric(kept & live), abs=1e-9)


@each_known
def test_a_set_of_edges_is_faithful_exactly_if_it_holds_the_circuit(known):
    """So the circuit is the smallest faithful set, and the only one of its size: all sets of live edges are tried."""
    model = known.make()
    truth, live = Truth(model, known.task), live_edges(model)
    for size in range(len(live) + 1):
        for kept in combinations(live, size):
            assert (truth.faithfulness(kept) >= 0.99) == (known.circuit <= set(kept))


def test_were_the_like_tokens_in_the_same_places_queries_and_keys_would_not_be_needed():
    """Corrupted queries would fit corrupted keys where clean ones fit clean ones: the trap that the pairs avoid."""
    swapped = td.Task(clean=[(A, B, A)], corrupted=[(B, A, B)], answer=[B], distractor=[A])
    two = {"input->a1.h0<v>", "a1.h0->logits"}
    assert Truth(handmade.induction_model(), swapped).faithfulness(two) >= 0.99
    assert Truth(handmade.induction_model(), handmade.INDUCTION_TASK).faithfulness(two) < 0.6


# -- whether it is found ---------------------------------------------------------------------------


@each_known
@each_finder
@pytest.mark.parametrize("family", ["top", "greedy"])
def test_exact_and_integrated_gradients_put_the_true_edges_first(known, method, family):
    ranking = scores_of(known, method).rank(family)
    assert set(ranking.circuit(len(known.circuit)).edge_names()) == known.circuit


@each_known
@each_finder
@pytest.mark.parametrize("family", ["top", "greedy"])
def test_the_minimal_size_is_the_true_one(known, method, family):
    curve = density_of(known, method, family=family)
    assert curve.minimal_size(0.99) == curve.minimal_size(0.99, stable=True) == len(known.circuit)
    circuit = curve.circuit(faithfulness=0.99)
    assert set(circuit.edge_names()) == known.circuit
    truth = Truth(known.make(), known.task)
    assert circuit.faithfulness == pytest.approx(truth.faithfulness(known.circuit), abs=1e-5)


def test_the_gradient_at_the_clean_prompt_finds_what_is_linear_there():
    for name in ("and", "dead branch"):
        assert density_of(KNOWN[name], "eap").minimal_size(0.99) == len(KNOWN[name].circuit)


def test_the_gradient_at_the_clean_prompt_hardly_sees_queries_and_keys_that_fit():
    """The softmax is all but flat there: a helper of 0.2% comes before what half of the task needs."""
    scores = by_name(scores_of(KNOWN["induction"], "eap"))
    through_softmax = ["input->a0.h0<v>", "a0.h0->a1.h0<k>", "input->a1.h0<q>"]
    helper = ["input->a1.h1<v>", "a1.h1->logits"]
    for edge in through_softmax:
        assert -1e-3 < scores[edge] < 0
    for edge in helper:
        assert scores[edge] == pytest.approx(-handmade.FAINT)
    anew, exact = (by_name(scores_of(KNOWN["induction"], method)) for method in ("eap-qk", "exact"))
    for edge in through_softmax[1:]:  # which are read as key and as query
        assert anew[edge] == pytest.approx(exact[edge], rel=1e-3)
        assert exact[edge] < -1
    assert density_of(KNOWN["induction"], "eap").minimal_size(0.99) == len(through_softmax) + len(helper) + 2


def test_the_gradient_at_the_clean_prompt_sees_nothing_through_a_saturated_mlp():
    scores = by_name(scores_of(KNOWN["or"], "eap"))
    assert scores.pop("m0->logits") == pytest.approx(-handmade.LOGIT)
    assert set(scores.values()) == {0.0}
    assert density_of(KNOWN["or"], "eap").minimal_size(0.99) > len(KNOWN["or"].circuit)


@each_known
def test_edges_in_random_order_need_more(known):
    for seed in range(3):
        assert density_of(known, "random", seed=seed).minimal_size(0.99) > len(known.circuit)


@each_known
@each_finder
def test_the_model_without_the_circuit_does_nothing_of_the_task(known, method):
    model, size = known.make(), len(known.circuit)
    ranking = scores_of(known, method).rank()
    complement = td.evaluate(model, known.task, ranking, [size], inverse=True, metrics="logit_diff")
    assert complement.faithfulness().item() == pytest.approx(0.0, abs=0.01)


@each_known
def test_no_edge_of_the_circuit_can_be_spared(known):
    circuit = density_of(known, "exact").circuit(faithfulness=0.99)
    table = td.minimality(known.make(), circuit)
    assert set(table["edge"]) == known.circuit
    assert (table["loss"] > 0.2).all()


@each_known
def test_knockouts_harm_the_circuit_as_they_harm_the_model(known):
    circuit = density_of(known, "exact").circuit(faithfulness=0.99)
    check = td.completeness(known.make(), circuit)
    assert len(check.size) == 20 and check.incompleteness.max() < 0.01
    assert check.complement == pytest.approx(0.0, abs=0.01)


# -- either of two, where both are there -----------------------------------------------------------

BOTH_ON = Known(handmade.or_model, BOTH_ON_TASK, handmade.TWO_BITS_CIRCUIT, 5)
OF_HEADS = BOTH_ON.circuit - {"m0->logits"}


def test_where_both_bits_are_on_either_head_is_enough():
    model = handmade.or_model()
    truth, live = Truth(model, BOTH_ON_TASK), live_edges(model)
    for size in range(len(live) + 1):
        for kept in combinations(live, size):
            enough = any(circuit <= set(kept) for circuit in BOTH_ON_CIRCUITS)
            assert (truth.faithfulness(kept) >= 0.99) == enough


@pytest.mark.parametrize("method", ["exact", "eap"])
def test_edges_that_can_stand_in_for_each_other_have_no_effect_one_by_one(method):
    scores = by_name(scores_of(BOTH_ON, method))
    assert {scores[edge] for edge in OF_HEADS} == {0.0}
    assert scores["m0->logits"] == pytest.approx(-handmade.LOGIT)
    # all that is left is the order of edges that score alike, which knows nothing
    assert density_of(BOTH_ON, method).minimal_size(0.99) > len(BOTH_ON.circuit)


def test_integrated_gradients_see_both_of_two_that_can_stand_in_for_each_other():
    """But not that one of them is enough: the two heads enter together, and the curve gives 4 edges in place of 3."""
    scores = by_name(scores_of(BOTH_ON, "eap-ig"))
    assert {edge for edge, score in scores.items() if score < -1} == BOTH_ON.circuit
    assert {score for edge, score in scores.items() if edge not in BOTH_ON.circuit} == {0.0}
    curve = density_of(BOTH_ON, "eap-ig")
    assert curve.minimal_size(0.99) == 4
    assert set(curve.circuit(size=4).pruned().edge_names()) in BOTH_ON_CIRCUITS


def test_checks_of_circuits_tell_that_one_of_two_is_enough():
    model = handmade.or_model()
    both = density_of(BOTH_ON, "eap-ig").circuit(size=5)
    spared = td.minimality(model, both).set_index("edge")["loss"]
    assert spared[sorted(OF_HEADS)].tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    assert spared["m0->logits"] == pytest.approx(1.0)
    assert td.completeness(model, both).incompleteness.max() < 1e-6

    one = both - both.subgraph(heads=["a0.h1"])
    assert set(one.edge_names()) == BOTH_ON_CIRCUITS[0]
    assert (td.minimality(model, one)["loss"] > 0.99).all()
    # without head 0 the circuit fails, and the model does not: it has the other
    assert td.completeness(model, one).incompleteness.max() == pytest.approx(1.0)


# -- a dead branch ---------------------------------------------------------------------------------


def dead_edges(scores: td.Scores) -> set[str]:
    """Edges that leave or enter the branch."""
    return {edge for edge in by_name(scores) if {end.split("<")[0] for end in ends(edge)} & {*DEAD_BRANCH}}


@each_finder
@pytest.mark.parametrize("family", ["top", "greedy"])
def test_a_dead_branch_scores_nothing_and_enters_last(method, family):
    known = KNOWN["dead branch"]
    scores = scores_of(known, method)
    dead = dead_edges(scores)
    assert len(dead) == scores.graph.n_edges - 12  # those between the tokens, heads 0 and the logits
    assert {by_name(scores)[edge] for edge in dead} == {0.0}
    ranking = scores.rank(family)
    assert dead.isdisjoint(ranking.circuit(len(known.circuit)).edge_names())


def test_a_dead_branch_is_first_by_magnitude():
    known = KNOWN["dead branch"]
    scores = scores_of(known, "magnitude")
    size = by_name(scores)
    loud = {edge for edge in size if ends(edge)[0] in DEAD_BRANCH}
    assert min(size[edge] for edge in loud) > 10 * max(size[edge] for edge in size if edge not in loud)
    assert set(scores.rank("top").circuit(len(loud)).edge_names()) == loud
    assert density_of(known, "magnitude", family="top").minimal_size(0.99) > len(loud)
