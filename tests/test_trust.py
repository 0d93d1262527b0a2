"""Circuits where they were not looked for: the numbers of a `Check` are made again, and lucky circuits are caught."""

import html
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import handmade_components
import pytest
import torch
from component_cases import EQUAL, UNEQUAL, model_of
from conftest import random_model
from handmade_lucky import HABIT, INDUCTION, NAMES, PLACE, VOCABULARY, lucky_model
from handmade_lucky import PROMPT as NAMES_PROMPT
from test_left_as_it_was import fail_after, flushes, state
from torch import Tensor

import tracedensity as td
from benchmarks.lens import HookedTransformer
from tracedensity.evaluation import setting_for
from tracedensity.gauge import Gauge
from tracedensity.graph.component import ComponentGraph
from tracedensity.ground import Ground
from tracedensity.model import as_transformer
from tracedensity.run import Conditions
from tracedensity.situation import Home
from tracedensity.tasks import WORDS
from tracedensity.trust import _N_NULL, Check

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")

PROMPT = [3, 1, 4, 1, 5]
OTHER_PROMPT = [9, 2, 6, 5, 3]
STORY = "Once upon a time there was a little girl and a cat. The girl saw the"
UNPAIRED = td.Task(EQUAL.clean, answer=EQUAL.answer, distractor=EQUAL.distractor)
ABLATIONS = ("zero", "mean", "resample")
alone = pytest.mark.usefixtures("no_other_circuits")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws of the null take most of the time on tiny models."""
    monkeypatch.setattr("tracedensity.trust._N_NULL", 5)


@pytest.fixture
def all_draws(few_draws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracedensity.trust._N_NULL", _N_NULL)


@pytest.fixture
def no_other_circuits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is about situations: other methods take time as well."""
    monkeypatch.setattr("tracedensity.trust._METHODS", {"token": (), "component": ()})


@pytest.fixture(scope="module")
def books() -> HookedTransformer:
    """A real model, which comes with the package."""
    return td.load_model()


@pytest.fixture(scope="module")
def lucky() -> HookedTransformer:
    return lucky_model()


def faithfulness(model: object, prompt: object, circuit: td.Circuit, **options: Any) -> float:
    """By the other way there is to run a circuit."""
    return float(td.evaluate(model, prompt, circuit, metrics=(circuit.metric,), **options).faithfulness()[0])


def about(value: float | list[float]) -> Any:
    return pytest.approx(value, abs=2e-5)


def some_circuit(model: object, prompt: object = PROMPT, share: float = 0.6, **options: Any) -> td.Circuit:
    """Edges drawn at random: neither all nor none of the prediction is left."""
    ranking = td.attribute(model, prompt, method="random", seed=1, **options).rank("top")
    return ranking.circuit(int(share * ranking.n_edges))


def of_names(like: td.Circuit, names: Iterable[str]) -> td.Circuit:
    kept = {kind: torch.zeros_like(exists) for kind, exists in like.graph.exists.items()}
    for name in names:
        kind, index = like.graph.edge_index(name)
        kept[kind][index] = True
    return like.of_edges(kept)


def named_circuit(model: object, prompt: object, names: Iterable[str], **options: Any) -> td.Circuit:
    return of_names(td.attribute(model, prompt, **options).rank().circuit(0), names)


def home_of(model: object, circuit: td.Circuit, seed: int = 0) -> Home:
    """What `Circuit.check` makes situations from."""
    transformer, subject = as_transformer(model), circuit.provenance.subject
    setting = setting_for(transformer, circuit.graph, subject, circuit.ablation, -1, 0)
    ground = Ground(
        circuit.graph, Conditions(ablation=circuit.ablation), Gauge.of(setting, circuit.graph, circuit.metric)
    )
    return Home(transformer, subject, ground, circuit.metric, seed)


def prompts_of(grounds: Sequence[Ground]) -> list[list[int]]:
    return [ground.setting.prompts.tokens[0].tolist() for ground in grounds]


def swapped_prompts(model: object, prompt: object, seed: int = 0) -> list[list[int]]:
    circuit = td.attribute(model, prompt, method="random").rank("top").circuit(0)
    return prompts_of(home_of(model, circuit, seed).situations(["swap"])[1:])


# -- other ablations -------------------------------------------------------------------------------


@alone
@pytest.mark.parametrize("own", ABLATIONS)
def test_under_other_ablations_it_does_what_evaluate_says(own, tiny_model):
    circuit = replace(some_circuit(tiny_model), ablation=own)
    found = circuit.check(tiny_model, n_random=0, seed=3).situations
    others = [each for each in ABLATIONS if each != own]
    assert [name for name, _ in found[:-1]] == [f"own: {own} ablation", *(f"ablation: {each}" for each in others)]
    # the circuit's own tokens were drawn by its own seed, which is 1, those of other situations by that of the check
    expected = [faithfulness(tiny_model, PROMPT, circuit, seed=1)]
    expected += [faithfulness(tiny_model, PROMPT, circuit, ablation=each, seed=3) for each in others]
    assert [reached for _, reached in found[:-1]] == about(expected)
    assert len({round(reached, 3) for reached in expected}) == 3


@alone
@pytest.mark.parametrize(
    ("kind", "task", "own", "others"),
    [
        ("gpt2", EQUAL, "counterfactual", ["resample", "zero", "mean", "mean-positional"]),
        ("llama", EQUAL, "mean", ["counterfactual", "resample", "zero", "mean-positional"]),
        ("llama", UNEQUAL[:1], "zero", ["counterfactual", "resample", "mean"]),
        ("gpt2", UNPAIRED, "resample", ["zero", "mean", "mean-positional"]),
    ],
    ids=["pairs", "pairs, mean", "one pair", "no pairs"],
)
def test_a_task_is_run_under_all_ablations_that_it_allows(kind, task, own, others):
    model = model_of(kind)
    circuit = replace(some_circuit(model, task, graph="component", ablation=own), ablation=own)
    found = circuit.check(model, n_random=0, seed=3).situations
    assert [name for name, _ in found] == [f"own: {own} ablation", *(f"ablation: {each}" for each in others)]
    expected = [faithfulness(model, task, circuit, seed=1)]
    expected += [faithfulness(model, task, circuit, ablation=each, seed=3) for each in others]
    assert [reached for _, reached in found] == pytest.approx(expected, rel=1e-3, abs=1e-3)


@alone
def test_positions_are_told_apart_where_the_circuit_does(kind):
    model = model_of(kind)
    circuit = some_circuit(model, EQUAL, graph="component", positions=True)
    found = circuit.check(model, n_random=0).situations
    ablations = ["counterfactual", "resample", "zero", "mean", "mean-positional"]
    expected = [faithfulness(model, EQUAL, circuit, ablation=each, seed=0) for each in ablations]
    assert [reached for _, reached in found] == pytest.approx(expected, rel=1e-3, abs=1e-3)


@alone
def test_the_metric_is_the_circuits_own(tiny_gpt2):
    for metric in ("kl", "top1"):
        circuit = replace(some_circuit(tiny_gpt2), metric=metric)
        found = circuit.check(tiny_gpt2, n_random=0).own
        assert found == about(faithfulness(tiny_gpt2, PROMPT, circuit))
        assert found != about(faithfulness(tiny_gpt2, PROMPT, replace(circuit, metric="tv")))


@alone
def test_a_metric_of_the_users_is_given_once_more():
    def likely(logits: Tensor, examples: Any) -> Tensor:
        return logits.softmax(-1).gather(-1, examples.answer)[:, 0]

    model = model_of("gpt2")
    circuit = replace(some_circuit(model, EQUAL, graph="component"), metric="likely")
    found = circuit.check(model, metric=likely, n_random=1)
    expected = [
        td.evaluate(model, EQUAL, circuit, ablation=each, metrics=likely, seed=0).faithfulness()
        for each in ("counterfactual", "resample", "zero", "mean", "mean-positional")
    ]
    assert [reached for _, reached in found.situations] == pytest.approx(torch.cat(expected).tolist(), rel=1e-3)
    with pytest.raises(ValueError, match=r"`metric` must be .* a function, got 'likely'"):
        circuit.check(model)


def test_all_edges_together_are_the_model_in_every_situation(tiny_model):
    ranking = td.attribute(tiny_model, PROMPT).rank()
    found = ranking.circuit(ranking.n_edges).check(tiny_model, prompts=[OTHER_PROMPT], n_random=2)
    assert len(found.situations) == 5
    assert [reached for _, reached in found.situations] == about([1.0] * 5)
    assert found.random.tolist() == about([1.0] * 2)
    assert [each.jaccard for each in found.overlaps] == [1.0] * 3


# -- other prompts ---------------------------------------------------------------------------------


@alone
def test_on_prompts_of_the_users_it_does_what_evaluate_says(tiny_model):
    circuit = replace(some_circuit(tiny_model), ablation="mean")
    found = circuit.check(tiny_model, prompts=[OTHER_PROMPT, torch.tensor([1, 2, 3, 4, 5])], n_random=0)
    by_name = dict(found.situations)
    assert by_name["prompt: [9, 2, 6, 5, 3]"] == about(faithfulness(tiny_model, OTHER_PROMPT, circuit))
    assert by_name["prompt: tensor([1, 2, 3, 4, 5])"] == about(faithfulness(tiny_model, [1, 2, 3, 4, 5], circuit))
    assert by_name["own: mean ablation"] not in (
        by_name["prompt: [9, 2, 6, 5, 3]"],
        by_name["prompt: tensor([1, 2, 3, 4, 5])"],
    )


@alone
def test_on_tasks_of_the_users_it_does_what_evaluate_says(kind):
    model = model_of(kind)
    circuit = some_circuit(model, EQUAL, graph="component")
    found = dict(circuit.check(model, prompts=[UNEQUAL], n_random=0).situations)
    expected = faithfulness(model, UNEQUAL, circuit)
    assert found[f"prompt: {UNEQUAL!r}"] == pytest.approx(expected, rel=1e-3)
    assert found["own: counterfactual ablation"] != pytest.approx(expected, rel=1e-2)


@alone
def test_prompts_of_other_lengths_are_other_prompts_of_the_same_components(kind):
    model = model_of(kind)
    circuit = some_circuit(model, PROMPT, graph="component", ablation="mean")
    found = dict(circuit.check(model, prompts=[[1, 2, 3], [5, 4, 3, 2, 1, 0, 6]], n_random=0).situations)
    for prompt in ([1, 2, 3], [5, 4, 3, 2, 1, 0, 6]):
        assert found[f"prompt: {prompt}"] == about(faithfulness(model, prompt, circuit))


PREPENDED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": ("gpt2", {}, {}),
    "gpt2, mean": ("gpt2", {}, {"ablation": "mean"}),
    "gpt2, resample": ("gpt2", {}, {"ablation": "resample"}),
    "gpt2, skips kept": ("gpt2", {}, {"keep_residual": True}),
    "gpt2, open attention": ("gpt2", {}, {"attention": "open"}),
    "gpt2, neurons": ("gpt2", {"neurons": True}, {}),
    "llama": ("llama", {}, {}),
    "llama, neurons, mean": ("llama", {"neurons": True}, {"ablation": "mean"}),
    "attention only": ("attention only", {}, {}),
    "attention only, skips kept": ("attention only", {}, {"keep_residual": True}),
}


def behind(model: object, circuit: td.Circuit, prompt: list[int], place: int, **options: Any) -> td.Circuit:
    """The circuit on a prompt with one more token at a place, put together from names of edges."""

    def before(name: str) -> str | None:
        """What the edge was called without the token; None if it leads from it or to it."""
        places = [int(found) for found in re.findall(r"(?<=[@>])\d+", name)]
        if place in places:
            return None
        return re.sub(r"(?<=[@>])\d+", lambda found: str(int(found[0]) - (int(found[0]) > place)), name)

    ranking = td.attribute(model, prompt, method="random", **options).rank("top")
    whole = ranking.circuit(ranking.n_edges)
    own = set(circuit.edge_names())
    moved = of_names(whole, (name for name in whole.edge_names() if before(name) is None or before(name) in own))
    assert moved.n_edges == circuit.n_edges + whole.n_edges - circuit.graph.n_edges
    return replace(circuit, graph=moved.graph, kept=moved.kept)


@alone
@pytest.mark.parametrize("case", PREPENDED)
def test_behind_a_prepended_token_it_is_the_circuit_of_edges_moved_by_one(case):
    kind, scoring, running = PREPENDED[case]
    model = model_of(kind)
    circuit = replace(some_circuit(model, share=0.7, **scoring), **running)
    name, found = circuit.check(model, n_random=0, seed=2).situations[-1]
    text = re.fullmatch(r"prompt: '(\d+)' prepended", name)
    assert text is not None
    longer = [int(text[1]), *PROMPT]
    assert found == about(faithfulness(model, longer, behind(model, circuit, longer, 0, **scoring), seed=2))
    assert 0.01 < found < 0.99 and found != about(faithfulness(model, PROMPT, circuit, seed=2))


@alone
def test_the_token_is_put_behind_the_one_that_begins_a_sequence(lucky):
    circuit = some_circuit(lucky, NAMES_PROMPT)
    name, found = circuit.check(lucky, n_random=0).situations[-1]
    (word,) = re.findall(r"prompt: '(\w+)' prepended", name)
    longer = [0, VOCABULARY.index(word), *circuit.provenance.token_ids[1:]]
    assert found == about(faithfulness(lucky, longer, behind(lucky, circuit, longer, 1)))


def test_other_seeds_prepend_other_tokens_and_never_a_special_one(lucky):
    circuit = some_circuit(lucky, NAMES_PROMPT)
    tokens = [prompts_of(home_of(lucky, circuit, seed).situations(["prepend"]))[1] for seed in range(40)]
    assert all(each[0] == 0 and each[2:] == [*circuit.provenance.token_ids[1:]] for each in tokens)
    drawn = {each[1] for each in tokens}
    assert len(drawn) > 15 and min(drawn) > 1 and max(drawn) < len(VOCABULARY)


def test_a_model_without_tokenizer_gets_a_token_prepended_and_no_words_swapped(tiny_gpt2):
    circuit = some_circuit(tiny_gpt2)
    names = [ground.name for ground in home_of(tiny_gpt2, circuit).situations(["swap", "prepend"])]
    assert len(names) == 2
    assert re.fullmatch(r"prompt: '\d+' prepended", names[1])


# -- swapped words ---------------------------------------------------------------------------------


@alone
def test_swapped_words_of_the_users_are_another_prompt(books):
    circuit = some_circuit(books, STORY)
    found = circuit.check(books, swaps={"girl": "boy", "cat": "dog"}, n_random=0).situations
    other = "Once upon a time there was a little boy and a dog. The boy saw the"
    assert [name for name, _ in found if name.startswith("prompt: 'Once")] == [f"prompt: {other!r}"]
    assert dict(found)[f"prompt: {other!r}"] == about(faithfulness(books, other, circuit))


@alone
def test_words_are_swapped_whole(books):
    circuit = some_circuit(books, "The girl, the girls: a girl")
    names = [
        name
        for name, _ in circuit.check(books, swaps={"girl": "boy"}, n_random=0).situations
        if "prepended" not in name
    ]
    assert names[-1] == "prompt: 'The boy, the girls: a boy'"


@alone
def test_drawn_swaps_are_prompts_like_any_other(books):
    circuit = some_circuit(books, STORY)
    found = dict(circuit.check(books, n_random=0).situations)
    swapped = [name.removeprefix("prompt: ") for name in found if name.startswith("prompt: 'Once")]
    assert len(swapped) == 2
    for text in swapped:
        assert found[f"prompt: {text}"] == about(faithfulness(books, text[1:-1], circuit))


def test_names_and_nouns_are_swapped_for_others_of_their_kind_and_nothing_else_is(books):
    length = len(as_transformer(books).tokens(STORY))
    words, seen = re.findall(r"\w+", STORY), set()
    for seed in range(10):
        for tokens in swapped_prompts(books, STORY, seed):
            assert len(tokens) == length
            others = re.findall(r"\w+", books.to_string(tokens[1:]))
            assert len(others) == len(words)
            pairs = set(zip(words, others, strict=True))
            assert {one for one, other in pairs if one != other} == {"girl", "cat"}
            assert len(pairs) == len(set(words))  # a word becomes the same one wherever it stands
            for one, other in pairs:
                assert one == other or any({one, other} <= kind for kind in WORDS)
            seen.add(tuple(tokens))
    assert len(seen) > 10  # of two for each of ten seeds


def test_each_seed_has_its_swaps(lucky):
    drawn = [swapped_prompts(lucky, NAMES_PROMPT, seed) for seed in range(5)]
    assert drawn == [swapped_prompts(lucky, NAMES_PROMPT, seed) for seed in range(5)]
    assert len({str(each) for each in drawn}) == 5
    for first, second in drawn:
        assert first != second
        for prompt in (first, second):
            begin, one, other, again = (VOCABULARY[token] for token in prompt)
            assert begin == "<s>" and one == again and {one, other} <= {*NAMES}


def test_no_word_is_swapped_for_itself(lucky, monkeypatch):
    monkeypatch.setattr("tracedensity.situation.WORDS", (frozenset(["Mary", "Anna", "Lucy", "Rose"]),))
    drawn = [prompt for seed in range(8) for prompt in swapped_prompts(lucky, NAMES_PROMPT, seed)]
    assert len(drawn) == 16
    assert all(VOCABULARY[one] != "Mary" and VOCABULARY[other] != "Anna" for _, one, other, _ in drawn)


def test_ids_that_are_a_text_are_swapped_like_it(lucky):
    ids = as_transformer(lucky).tokens(NAMES_PROMPT).tolist()
    assert swapped_prompts(lucky, ids) == swapped_prompts(lucky, NAMES_PROMPT)


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("In 1984 it was still dark and", id="no names or nouns"),
        pytest.param([500, 600, 700], id="ids that the tokenizer would not make"),
    ],
)
def test_prompts_that_nothing_can_be_swapped_in_have_no_swaps(prompt, books):
    assert swapped_prompts(books, prompt) == []


# -- complement, random circuits, other circuits ---------------------------------------------------


@alone
@pytest.mark.parametrize(
    ("kind", "running"),
    [
        ("gpt2", {}),
        ("llama", {"ablation": "mean"}),
        ("gpt2", {"keep_residual": True}),
        ("llama", {"attention": "open"}),
    ],
    ids=["plain", "mean", "skips kept", "open attention"],
)
def test_the_complement_and_the_first_random_circuit_are_what_evaluate_says(kind, running):
    model = model_of(kind)
    circuit = replace(some_circuit(model, share=0.4), **running)
    found = circuit.check(model, n_random=3, seed=5)
    assert found.complement == about(faithfulness(model, PROMPT, circuit, inverse=True))
    kept_anyhow = {"keep_residual": ("resid_attn", "resid_mlp"), "attention": ("head",)}
    others = [kind for option in running for kind in kept_anyhow.get(option, ())]  # these are counted in no size
    wanted = sum(number for kind, number in circuit.composition().items() if kind not in others)
    ranking = td.attribute(model, PROMPT, method="random-connected", seed=5).rank("top")
    places = torch.cat([ranking.rank[kind][ranking.graph.exists[kind]] for kind in ranking.rank if kind not in others])
    last = places.sort().values[wanted - 1]
    grown = {
        kind: ranking.graph.exists[kind] & (rank <= last) & torch.tensor(kind not in others)
        for kind, rank in ranking.rank.items()
    }
    expected = circuit.of_edges(grown)
    assert float(found.random[0]) == about(faithfulness(model, PROMPT, replace(expected, **running)))
    assert len({round(float(each), 4) for each in found.random}) > 1


@alone
def test_the_complement_of_components_is_what_evaluate_says(kind):
    model = model_of(kind)
    circuit = some_circuit(model, EQUAL, graph="component", share=0.4)
    found = circuit.check(model, n_random=1, seed=5)
    assert found.complement == pytest.approx(faithfulness(model, EQUAL, circuit, inverse=True), rel=1e-3)
    grown = td.attribute(model, EQUAL, graph="component", method="random-connected", seed=5).rank("top")
    expected = faithfulness(model, EQUAL, grown.circuit(circuit.n_edges))
    assert float(found.random[0]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@alone
@pytest.mark.parametrize(
    ("kind", "prompt", "options"),
    [
        ("gpt2", PROMPT, {}),
        ("llama", EQUAL, {"graph": "component"}),
        ("llama", EQUAL, {"graph": "component", "positions": True}),
    ],
    ids=["tokens", "components", "components by position"],
)
def test_random_circuits_are_connected_and_of_the_circuits_size(kind, prompt, options, monkeypatch):
    model = model_of(kind)
    circuit = some_circuit(model, prompt, share=0.3, **options)
    run: list[Tensor] = []
    tried = Ground.tried
    monkeypatch.setattr(Ground, "tried", lambda self, kept: run.append(kept) or tried(self, kept))
    circuit.check(model, n_random=7)
    (drawn,) = (kept for kept in run if len(kept) == 7)
    assert (drawn.sum(1) == circuit.n_edges).all()
    assert len({tuple(mask.tolist()) for mask in drawn}) == 7
    places = circuit.graph.edges.index
    for mask in drawn:
        flat = torch.zeros(sum(torch.Size(shape).numel() for shape in circuit.graph.shapes.values()), dtype=torch.bool)
        flat[places[mask]] = True
        counts = [torch.Size(shape).numel() for shape in circuit.graph.shapes.values()]
        parts = zip(circuit.graph.shapes.items(), flat.split(counts), strict=True)
        assert_reaches_the_output(circuit.of_edges({kind: part.view(shape) for (kind, shape), part in parts}))


def assert_reaches_the_output(circuit: td.Circuit) -> None:
    """From the target of every edge edges of the circuit lead to the output."""
    graph = circuit.graph
    everything = circuit.of_edges(dict(graph.exists))
    ends = [graph.ends(kind, tuple(i)) for kind, mask in circuit.kept.items() for i in mask.nonzero().tolist()]
    arcs = [(source, target) for source, target, _ in ends]
    if isinstance(graph, ComponentGraph):
        arcs += graph.links(everything.nodes())
        reached = {"logits" if graph.n_pos is None else f"logits@{graph.n_pos - 1}"}
    else:
        reached = {everything.nodes()[-1]}
    while more := {source for source, target in arcs if target in reached} - reached:
        reached |= more
    assert {target for _, target, _ in ends} <= reached


@pytest.mark.parametrize(("kind", "own"), [("gpt2", "norm"), ("llama", "eap")])
def test_circuits_of_other_methods_are_their_first_edges(kind, own):
    model = model_of(kind)
    circuit = td.attribute(model, PROMPT, method=own).rank().circuit(30)
    found = circuit.check(model, n_random=0).overlaps
    others = [method for method in ("norm", "flow", "eap", "eap-ig") if method != own]
    assert [each.other for each in found] == [f"{method}, the first 30 edges" for method in others]
    for method, overlap in zip(others, found, strict=True):
        other = td.attribute(model, PROMPT, method=method).rank().circuit(30)
        assert_overlaps(overlap, circuit, other)
        assert overlap.faithfulness == about(faithfulness(model, PROMPT, other))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("gpt2", {}), ("llama", {"ungroup": True}), ("llama", {"positions": True})],
    ids=["plain", "ungrouped", "positions"],
)
def test_circuits_of_other_methods_of_components_are_their_first_edges(kind, options):
    model, graph = model_of(kind), {"graph": "component", "ablation": "mean", **options}
    circuit = td.attribute(model, EQUAL, method="eap", **graph).rank().circuit(12)
    found = circuit.check(model, n_random=0).overlaps
    others = ["eap-ig-midpoint", "flow"]
    assert [each.other for each in found] == [f"{method}, the first 12 edges" for method in others]
    for method, overlap in zip(others, found, strict=True):
        other = td.attribute(model, EQUAL, method=method, **graph).rank().circuit(12)
        assert_overlaps(overlap, circuit, other)
        assert overlap.faithfulness == pytest.approx(faithfulness(model, EQUAL, other), rel=1e-3, abs=1e-3)


def test_circuits_of_neurons_are_compared_with_circuits_of_neurons(tiny_gpt2):
    circuit = td.attribute(tiny_gpt2, PROMPT, method="eap", neurons=True).rank().circuit(60)
    (overlap,) = circuit.check(tiny_gpt2, n_random=0).overlaps
    other = td.attribute(tiny_gpt2, PROMPT, method="eap-ig", neurons=True).rank().circuit(60)
    assert overlap.other == "eap-ig, the first 60 edges"
    assert_overlaps(overlap, circuit, other)


def assert_overlaps(overlap: Any, circuit: td.Circuit, other: td.Circuit) -> None:
    one, two = set(circuit.edge_names()), set(other.edge_names())
    assert (overlap.n_edges, overlap.shared) == (len(two), len(one & two))
    assert overlap.jaccard == pytest.approx(len(one & two) / len(one | two), abs=1e-12)


# -- the null --------------------------------------------------------------------------------------


def layer_of(name: str) -> str:
    """Kind and layer of an edge of the token graph: ``a0``, ``m1``, ``r1.attn``."""
    return re.sub(r"\.[hn]\d+", "", name.split("@")[0])


def reader_of(name: str) -> str:
    return name.split("->")[1].split("@")[0]


NULLS: dict[str, tuple[Any, dict[str, Any], Callable[[str], str], list[str]]] = {
    "tokens": (PROMPT, {}, layer_of, ["norm", "flow", "eap", "eap-ig"]),
    "components": (EQUAL, {"graph": "component"}, reader_of, ["eap-ig-midpoint", "eap", "flow"]),
    "components by position": (
        EQUAL, {"graph": "component", "positions": True}, reader_of, ["eap-ig-midpoint", "eap", "flow"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("null", "kind"), [("tokens", "gpt2"), ("components", "llama"), ("components by position", "gpt2")]
)
def test_a_circuit_that_is_whole_layers_or_readers_shares_with_others_what_chance_would(null, kind):
    """How many edges another circuit has there is all that matters, and draws have as many: no draw can differ."""
    model, (prompt, options, group, _) = model_of(kind), NULLS[null]
    everything = td.attribute(model, prompt, method="random", **options).rank("top")
    whole = everything.circuit(everything.n_edges)
    groups = sorted({group(name) for name in whole.edge_names()})
    assert len(groups) > 6
    some = [groups[::2], groups[1::3]]
    for chosen in some:
        found = of_names(whole, (name for name in whole.edge_names() if group(name) in chosen)).check(model, n_random=0)
        assert len(found.overlaps) >= 3
        for overlap in found.overlaps:
            assert overlap.shared > 0
            assert (overlap.null == overlap.jaccard).all()


@pytest.mark.usefixtures("all_draws")
@pytest.mark.parametrize("null", ["tokens", "components"])
def test_within_a_layer_or_reader_chance_takes_any_edge(null):
    """The number of shared edges is a sum of hypergeometric ones, whose mean and variance are known."""
    model, (prompt, options, group, methods) = model_of("gpt2"), NULLS[null]
    ranking = td.attribute(model, prompt, method=methods[0], **options).rank()
    size = ranking.n_edges // 4
    circuit = ranking.circuit(size)
    total = Counter(map(group, ranking.circuit(ranking.n_edges).edge_names()))
    ours = Counter(map(group, circuit.edge_names()))
    for method, overlap in zip(methods[1:], circuit.check(model, n_random=0).overlaps, strict=True):
        theirs = Counter(
            map(group, td.attribute(model, prompt, method=method, **options).rank().circuit(size).edge_names())
        )
        shared = overlap.null * 2 * size / (1 + overlap.null)  # since J = shared / (2 size - shared)
        assert torch.allclose(shared, shared.round(), atol=1e-9)
        mean = sum(ours[each] * theirs[each] / total[each] for each in total)
        variance = sum(
            ours[each] * theirs[each] * (n - ours[each]) * (n - theirs[each]) / (n * n * (n - 1))
            for each, n in total.items()
            if n > 1
        )
        assert len(shared) == 200 and abs(float(shared.mean()) - mean) < 4 * (variance / 200) ** 0.5
        assert float(shared.var()) == pytest.approx(variance, rel=0.5)
        assert overlap.null_high == float(overlap.null.quantile(0.95))


# -- searching again -------------------------------------------------------------------------------


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[td.Circuit]:
    """What searches from other seeds find, while a circuit is checked."""
    import tracedensity.trust

    found: list[td.Circuit] = []
    refined = tracedensity.trust.refined

    def recorded(*arguments: Any, **options: Any) -> td.Circuit:
        found.append(refined(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(tracedensity.trust, "refined", recorded)
    return found


@pytest.fixture(scope="module")
def searched(books: HookedTransformer) -> td.Circuit:
    """A circuit of a real prompt that was searched for."""
    return td.refine(books, "The dog", td.attribute(books, "The dog").rank(), 0.6, budget=150, seed=4)


def certificate_of(circuit: td.Circuit) -> td.Certificate:
    assert circuit.certificate is not None
    return circuit.certificate


def test_searching_again_starts_from_the_whole_graph_with_other_seeds(searched, books, searches):
    found = searched.check(books, n_random=0, n_seeds=2)
    assert [each.other for each in found.overlaps[:2]] == ["search with seed 5", "search with seed 6"]
    assert len(searches) == 2
    for number, (other, overlap) in enumerate(zip(searches, found.overlaps, strict=False)):
        known = certificate_of(other)
        assert (known.seed, known.target, known.start_size) == (5 + number, 0.6, searched.graph.n_edges)
        assert known.budget == 150 and known.passes <= 150
        assert_overlaps(overlap, searched, other)
        assert overlap.faithfulness == about(faithfulness(books, "The dog", other))
        assert overlap.faithfulness >= 0.6
    assert len({frozenset(each.edge_names()) for each in (searched, *searches)}) > 1


def test_methods_are_compared_as_well_with_a_circuit_that_was_searched_for(searched, books):
    names = [each.other for each in searched.check(books, n_random=0, n_seeds=0).overlaps]
    n_edges = f"{searched.n_edges} edges"
    assert names == [f"{method}, the first {n_edges}" for method in ("norm", "flow", "eap", "eap-ig")]


@alone
def test_a_search_spends_no_more_than_it_may(searched, books, searches):
    searched.check(books, n_random=0, n_seeds=1, budget=60)
    (known,) = map(certificate_of, searches)
    assert known.budget == 60 and known.passes <= 60


def test_a_circuit_that_was_not_searched_for_gets_no_search(tiny_gpt2, searches):
    found = some_circuit(tiny_gpt2).check(tiny_gpt2, n_random=0, n_seeds=2)
    assert not searches and not [each for each in found.overlaps if each.other.startswith("search")]


def test_the_same_seed_gives_the_same_check(tiny_gpt2):
    circuit = td.refine(tiny_gpt2, PROMPT, td.attribute(tiny_gpt2, PROMPT).rank(), 0.8, budget=40)
    one, again = (circuit.check(tiny_gpt2, n_random=3, n_seeds=1, seed=7) for _ in range(2))
    assert json.dumps(one.to_dict()) == json.dumps(again.to_dict())
    assert torch.equal(one.random, again.random)
    for first, second in zip(one.overlaps, again.overlaps, strict=True):
        assert torch.equal(first.null, second.null)
    other = circuit.check(tiny_gpt2, n_random=3, n_seeds=0, seed=8)
    assert not torch.equal(one.random, other.random)
    nulls = zip(one.overlaps[1:], other.overlaps, strict=True)
    assert not all(torch.equal(first.null, second.null) for first, second in nulls)
    assert one.situations[-1] != other.situations[-1]  # another token is prepended


# -- small and right, small and lucky --------------------------------------------------------------


@alone
@pytest.mark.parametrize(
    ("edges", "fails"),
    [
        pytest.param(INDUCTION, set(), id="induction is right"),
        pytest.param(PLACE, {"prepended"}, id="what stands at 2 is lucky"),
        pytest.param(HABIT, {"swapped", "drawn"}, id="what is always said is lucky"),
    ],
)
def test_a_lucky_circuit_is_told_from_the_right_one(edges, fails, lucky):
    """All three say on the prompt what the model says, and the lucky ones are smaller: see `handmade_lucky`."""
    circuit = named_circuit(lucky, NAMES_PROMPT, edges)
    found = circuit.check(lucky, prompts=["Lucy Rose Lucy"], n_random=20)
    assert found.own >= 0.95
    where = {
        "mean": [reached for name, reached in found.situations if name == "ablation: mean"],
        "drawn": [reached for name, reached in found.situations if name == "ablation: resample"],
        "swapped": [reached for name, reached in found.situations if re.fullmatch(r"prompt: '(\w+) \w+ \1'", name)],
        "prepended": [reached for name, reached in found.situations if name.endswith("prepended")],
    }
    assert [len(each) for each in where.values()] == [1, 1, 3, 1]  # two drawn swaps, and ours
    assert {name for name, reached in where.items() if max(reached) < 0.1} == fails
    assert {name for name, reached in where.items() if min(reached) >= 0.95} == set(where) - fails
    assert found.worst == min(reached for _, reached in found.situations)
    assert found.complement >= 0.99  # any of the three ways is enough, so that what is left does as well
    assert float(found.random.median()) < 0.1


@alone
def test_a_right_circuit_of_components_holds_under_all_ablations_and_a_lucky_one_only_for_its_pairs():
    """X Y X against Y X Y: two edges are enough, since queries and keys of the other prompt fit each other as well."""
    model = handmade_components.induction_model()
    pairs = td.Task(clean=[(0, 1, 0)], corrupted=[(1, 0, 1)], answer=[1], distractor=[0])
    lucky = named_circuit(model, pairs, {"input->a1.h0<v>", "a1.h0->logits"}, graph="component")
    right = named_circuit(model, pairs, handmade_components.INDUCTION_CIRCUIT, graph="component")
    task = handmade_components.INDUCTION_TASK
    checks = [circuit.check(model, prompts=[task], n_random=0) for circuit in (lucky, right)]
    assert [each.own >= 0.99 for each in checks] == [True, True]
    other = [dict(each.situations)[f"prompt: {task!r}"] for each in checks]
    assert other[0] < 0.6 and other[1] >= 0.99
    assert checks[0].worst < 0.6 and checks[1].worst >= 0.99
    at_home = named_circuit(model, task, handmade_components.INDUCTION_CIRCUIT, graph="component")
    assert at_home.check(model, n_random=0).worst >= 0.99


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n_random": -1}, "`n_random` must be at least 0, got -1."),
        ({"n_seeds": -2}, "`n_seeds` must be at least 0, got -2."),
        ({"prompts": [[1, 2, 3]]}, r"`prompts` must be as long as .* 5 tokens, got 3 for \[1, 2, 3\]: an edge leads"),
        ({"prompts": ["hello"]}, "`prompt` must be token ids: this model has no tokenizer"),
    ],
)
def test_what_cannot_be_checked_gets_one_sentence(options, sentence, tiny_gpt2):
    with pytest.raises(ValueError, match=sentence):
        some_circuit(tiny_gpt2).check(tiny_gpt2, **options)


@pytest.mark.parametrize(
    ("swaps", "got"),
    [
        pytest.param({"dragon": "cat"}, "'Once .* girl .*' of", id="no such word"),
        pytest.param({}, "'Once .* girl .*' of", id="nothing"),
        pytest.param({"girl": "girl"}, "'Once .* girl .*' of", id="itself"),
        pytest.param({"girl": "grandmother"}, "'Once .* grandmother .*' of", id="more tokens"),
    ],
)
def test_swaps_that_are_none_get_one_sentence(swaps, got, books):
    with pytest.raises(
        ValueError, match=f"`swaps` must change words of the prompt, one by one, .* as it is, got {got}"
    ):
        some_circuit(books, STORY).check(books, swaps=swaps, n_random=0)


def test_the_circuit_of_another_model_is_refused(tiny_gpt2, tiny_llama):
    with pytest.raises(ValueError, match="`model` must be the one that this was computed on"):
        some_circuit(tiny_gpt2).check(tiny_llama)


def test_unknown_changes_get_one_sentence(tiny_gpt2):
    with pytest.raises(ValueError, match=r"must be some of \['counterfactual', .*'prepend'\], got \['paraphrase'\]"):
        home_of(tiny_gpt2, some_circuit(tiny_gpt2)).situations(["mean", "paraphrase"])


def test_a_circuit_without_its_prompt_is_refused(tiny_gpt2):
    circuit = some_circuit(tiny_gpt2)
    with pytest.raises(ValueError, match="`circuit` must know its prompt or task"):
        replace(circuit, provenance=replace(circuit.provenance, token_ids=())).check(tiny_gpt2)


# -- what is shown ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(books: HookedTransformer) -> Check:
    """A check whose prompts are code."""
    prompt = "He said <script>alert(1)</script> and"
    circuit = td.attribute(books, prompt, graph="component", method="eap").rank().circuit(40)
    return circuit.check(books, prompts=["She <script>alert(2)</script> it", "&amp;"], n_random=3)


def test_prompts_are_no_code_of_the_page(shown):
    page = shown._repr_html_()
    assert "<script" not in page and "alert(2)" in page
    assert html.escape("She <script>alert(2)</script> it", quote=False) in page
    assert "&amp;amp;" in page


def test_all_numbers_are_shown(shown):
    text = repr(shown)
    rows = [*shown.situations, ("complement: all but the circuit", shown.complement)]
    rows += [("random: mean of 3 of its size", float(shown.random.mean()))]
    rows += [("random: the best of them", float(shown.random.max()))]
    for name, reached in rows:
        assert f"{reached:>12.3f}  {name}" in text.splitlines()
        assert f"{reached:.3f}" in shown._repr_html_()
    table = shown.table()
    assert list(table.itertuples(index=False, name=None)) == rows
    for each in shown.overlaps:
        assert any(line.endswith(each.other) and f"{each.jaccard:.3f}" in line for line in text.splitlines())
        assert each.other in shown._repr_html_()
    others = shown.overlap_table()
    assert others["jaccard"].tolist() == [each.jaccard for each in shown.overlaps]
    assert others["null_mean"].tolist() == [float(each.null.mean()) for each in shown.overlaps]
    assert others["null_high"].tolist() == [each.null_high for each in shown.overlaps]


def test_json_holds_all_numbers(shown):
    values = json.loads(json.dumps(shown.to_dict()))
    assert values["n_edges"] == 40 and values["worst"] == shown.worst
    reached = [each["faithfulness"] for each in values["situations"]]
    assert reached == [faithfulness for _, faithfulness in shown.situations]
    assert values["complement"] == shown.complement and values["random"] == shown.random.tolist()
    assert [each["other"] for each in values["overlaps"]] == [each.other for each in shown.overlaps]


@alone
def test_without_random_circuits_there_are_no_rows_of_them(tiny_gpt2):
    found = some_circuit(tiny_gpt2).check(tiny_gpt2, n_random=0)
    assert not [name for name in found.table()["situation"] if name.startswith("random")]
    assert len(found.random) == 0


# -- the model is left as it was -------------------------------------------------------------------


def test_the_model_is_left_as_it_was(tiny_llama):
    before, flushed = state(tiny_llama), flushes()
    ranking = td.attribute(tiny_llama, PROMPT).rank()
    circuit = td.refine(tiny_llama, PROMPT, ranking, 0.8, budget=30)
    circuit.check(tiny_llama, prompts=[OTHER_PROMPT], n_random=2, n_seeds=1)
    assert state(tiny_llama) == before
    assert flushes() == flushed


@pytest.mark.parametrize(("error", "n_passes"), [(RuntimeError, 1), (KeyboardInterrupt, 3), (RuntimeError, 9)])
def test_the_model_is_left_as_it_was_after_an_error_in_the_middle(error, n_passes, tiny_gpt2, monkeypatch):
    circuit = some_circuit(tiny_gpt2)
    before, flushed = state(tiny_gpt2), flushes()
    fail_after(monkeypatch, tiny_gpt2, n_passes, error)
    with pytest.raises(error):
        circuit.check(tiny_gpt2, n_random=2)
    assert state(tiny_gpt2) == before
    assert flushes() == flushed


# -- words that are drawn, and situations that there are not ---------------------------------------


def test_swaps_are_the_same_in_every_process():
    code = (  # words are tokens, and nothing is run: TransformerLens takes seconds to import
        "from types import SimpleNamespace as Namespace; import torch; from tracedensity.situation import Home\n"
        "model = Namespace(tokens=lambda text: torch.zeros(len(text.split())))\n"
        "print(Home(model, torch.zeros(3), Namespace(graph=None), 'tv')._drawn('Mary Anna Mary'))"
    )
    told = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        told.add(done.stdout)
    assert len(told) == 1


def test_what_is_not_swapped_stays_where_it_was(books):
    prompt = "The old king and the young queen went to the garden. The king"
    transformer = as_transformer(books)
    own = transformer.texts(transformer.tokens(prompt))
    for seed in range(10):
        for tokens in swapped_prompts(books, prompt, seed):
            other = transformer.texts(tokens)
            assert [word for word in enumerate(own) if word[1] in (" and", " went", ".")] == [
                word for word in enumerate(other) if word[1] in (" and", " went", ".")
            ]


def test_different_words_become_different_ones(lucky, monkeypatch):
    monkeypatch.setattr("tracedensity.situation.WORDS", (frozenset(["Mary", "Anna", "Lucy", "Rose"]),))
    for seed in range(20):
        for _, one, other, _ in swapped_prompts(lucky, NAMES_PROMPT, seed):
            assert one != other


def test_swaps_are_found_whatever_the_seed(books):
    prompt = "When Mary and John went to the store, John gave the book to"
    assert [len(swapped_prompts(books, prompt, seed)) for seed in range(8)] == [2] * 8


def test_a_prompt_that_fills_the_context_gets_no_token_prepended():
    model = random_model(act_fn="gelu_new", normalization_type="LN", n_ctx=len(PROMPT))
    found = some_circuit(model).check(model, n_random=0).situations
    assert [name for name, _ in found] == ["own: zero ablation", "ablation: mean", "ablation: resample"]


def test_a_prompt_on_the_component_graph_has_words_swapped_and_a_token_prepended(lucky):
    circuit = some_circuit(lucky, NAMES_PROMPT, graph="component")
    names = [name for name, _ in circuit.check(lucky, n_random=0).situations]
    assert [name.startswith("prompt: ") for name in names] == [False] * 3 + [True] * 3


def test_a_situation_in_which_nothing_can_be_measured_is_left_out():
    model, task = handmade_components.and_model(), handmade_components.AND_TASK
    circuit = named_circuit(model, task, handmade_components.TWO_BITS_CIRCUIT, graph="component")
    with pytest.warns(UserWarning, match="ablation: mean was left out: by logit_diff the model is there"):
        found = circuit.check(model, n_random=0)
    assert found.own >= 0.99
    assert [name for name, _ in found.situations if name.startswith("ablation: mean")] == []


def test_a_circuit_that_is_more_than_faithful_can_be_checked():
    model = random_model(act_fn="gelu_new", normalization_type="LN", n_layers=1, n_heads=2)
    curve = td.density(model, EQUAL, graph="component", method="exhaustive", baselines=False)
    assert isinstance(curve, td.TightCurve)
    best = curve.refined[-1]
    assert best.faithfulness is not None and best.faithfulness > 1.01
    best.check(model, n_random=0)


def test_swaps_of_what_is_no_text_are_refused(tiny_gpt2):
    with pytest.raises(ValueError, match=r"`swaps` must be a dictionary of words .* got some for a task or"):
        some_circuit(tiny_gpt2).check(tiny_gpt2, swaps={"girl": "boy"})


def test_edges_that_are_kept_anyhow_are_in_no_other_circuit(books):
    curve = td.density(books, "The dog", thresholds=(0.5,), keep_residual=True, refine=True, budget=60)
    found = curve.circuit(faithfulness=0.5).check(books, n_random=2)
    assert {each.n_edges for each in found.overlaps if "first" in each.other} == {found.circuit.n_edges}
