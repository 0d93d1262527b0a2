"""Minimal sizes by hand, and curves of small models."""

import itertools

import pytest
import torch

import tracedensity as td
from tracedensity.curve import Points
from tracedensity.estimation import _bracketed, density
from tracedensity.evaluation import paper_sizes
from tracedensity.pooling import alone

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def curve(tiny_gpt2):
    return density(tiny_gpt2, PROMPT)


def with_points(curve, sizes, faithfulness):
    import dataclasses

    sizes = [*sizes[:-1], curve.n_edges]
    return dataclasses.replace(curve, sizes=torch.tensor(sizes), faithfulness=torch.tensor(faithfulness).double())


@pytest.mark.parametrize(
    ("threshold", "stable", "expected"),
    [
        pytest.param(0.75, False, 2, id="the early peak counts"),
        pytest.param(0.75, True, 8, id="the early peak does not count"),
        pytest.param(0.25, True, 1, id="equal is reached"),
        pytest.param(1, False, 300, id="the whole graph always reaches"),
    ],
)
def test_minimal_size_by_hand(curve, threshold, stable, expected):
    by_hand = with_points(curve, [1, 2, 4, 8, 300], [0.25, 0.75, 0.5, 0.8, 0.9999999])
    assert by_hand.minimal_size(threshold, stable=stable) == min(expected, curve.n_edges)


def test_minimal_size_never_shrinks_as_the_threshold_rises(curve):
    for stable in (False, True):
        sizes = [curve.minimal_size(threshold / 100, stable) for threshold in range(1, 101)]
        assert sizes == sorted(sizes)
    assert all(curve.minimal_size(t) <= curve.minimal_size(t, stable=True) for t in curve.thresholds)


@pytest.mark.parametrize("seed", range(5))
def test_refinement_brackets_every_crossing_to_two_percent(seed):
    """On a made-up faithfulness that goes up and down, against a scan of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    n_edges = 20_000
    steps = torch.randn(n_edges + 1, generator=generator).double()
    truth = torch.linspace(0, 1, n_edges + 1).double().pow(0.2) + steps.cumsum(0) / n_edges**0.5 / 60
    truth[-1] = 1.0
    other = truth.pow(3)  # a second curve, whose crossings are elsewhere
    calls = []

    def measure(sizes):  # which asks nobody
        calls.append(len(sizes))
        yield from ()
        return torch.stack([truth, other], dim=1)[sizes]

    thresholds = (0.5, 0.8, 0.9, 0.99)
    points = alone(_bracketed(measure, paper_sizes(n_edges).unique(), thresholds))
    sizes = points.sizes.tolist()
    assert points.faithfulness.tolist() == truth[sizes].tolist()
    for threshold, curve in itertools.product(thresholds, (truth, other)):
        reached = [value >= threshold - 1e-6 for value in curve[sizes].tolist()]
        reached[-1] = True
        first = reached.index(True)
        last_failure = max(i for i, ok in enumerate(reached) if not ok)
        for low, high in ((first - 1, first), (last_failure, last_failure + 1)):
            if low >= 0:
                assert sizes[high] - sizes[low] == 1 or sizes[high] <= sizes[low] * 1.02
    assert len(calls) < 12  # a round measures all brackets together


def test_all_sizes_make_minimal_sizes_exact(tiny_gpt2):
    short = PROMPT[:3]
    n_edges = td.TokenGraph(2, 4, 3).n_edges
    curve = density(tiny_gpt2, short, sizes=range(n_edges), baselines=False)
    assert curve.sizes.tolist() == list(range(n_edges + 1))
    truth = 1 - td.evaluate(tiny_gpt2, short, curve.ranking, range(n_edges + 1)).metrics["tv"]
    for threshold in curve.thresholds:
        reached = truth >= threshold - 1e-6
        assert curve.minimal_size(threshold) == int(reached.nonzero()[0])
        assert curve.minimal_size(threshold, stable=True) == int((~reached).nonzero()[-1]) + 1


def test_points_must_increase_and_be_finite():
    with pytest.raises(ValueError, match="must strictly increase"):
        Points(torch.tensor([1, 1]), torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match=r"NaN or infinity at sizes \[2\]"):
        Points(torch.tensor([1, 2]), torch.tensor([0.5, float("nan")]))


def test_area_by_hand(curve):
    """Faithfulness 0 up to a tenth of the graph and 1 from there: seven decades, and the last step's triangle."""
    sizes = paper_sizes(curve.n_edges).unique()
    tenth = int(0.1 * curve.n_edges)
    made = with_points(curve, sizes.tolist(), [float(size >= tenth) for size in sizes.tolist()])
    before = sizes[sizes < tenth].max() / curve.n_edges
    expected = (before.log10() + 8) + (torch.tensor(tenth / curve.n_edges).log10() - before.log10()) / 2
    assert made.auc == pytest.approx(float(expected), abs=1e-5)


def test_circuit_of_a_threshold_reaches_it_when_run(curve, tiny_gpt2):
    for threshold in curve.thresholds:
        circuit = curve.circuit(faithfulness=threshold)
        assert circuit.n_edges == curve.minimal_size(threshold)
        again = circuit.verify(tiny_gpt2)
        assert again.faithfulness == pytest.approx(circuit.faithfulness, abs=1e-6)
        assert again.faithfulness >= threshold - 1e-5


def test_circuit_of_a_size_that_was_not_run_has_no_faithfulness(curve):
    missing = next(size for size in range(1, curve.n_edges) if size not in curve.sizes.tolist())
    assert curve.circuit(size=missing).faithfulness is None
    with pytest.raises(ValueError, match="give one of"):
        curve.circuit()


def test_baselines_are_run_as_the_papers_do(curve, tiny_gpt2):
    assert curve.random.sizes.tolist() == curve.inverse.sizes.tolist()
    inverse = td.evaluate(tiny_gpt2, PROMPT, curve.ranking, curve.inverse.sizes, inverse=True)
    torch.testing.assert_close(
        1 - inverse.metrics["tv"].double(), curve.inverse.faithfulness.double(), rtol=0, atol=1e-5
    )
    grown = td.attribute(tiny_gpt2, PROMPT, method="random-connected").rank("top")
    random = td.evaluate(tiny_gpt2, PROMPT, grown, curve.random.sizes, keep_residual=True)
    torch.testing.assert_close(1 - random.metrics["tv"].double(), curve.random.faithfulness.double(), rtol=0, atol=1e-5)
    assert density(tiny_gpt2, PROMPT, baselines=False).random is None


@pytest.mark.parametrize("metric", ["tv", "kl", "js", "top1", "nucleus"])
def test_every_metric_of_faithfulness_ends_at_one(metric, tiny_llama):
    result = density(tiny_llama, PROMPT, metric=metric, baselines=False)
    assert result.faithfulness[-1] == pytest.approx(1.0, abs=1e-5)
    assert result.metric == metric


def test_same_seed_same_bytes(tiny_llama):
    one, two = (density(tiny_llama, PROMPT, method="random", seed=7) for _ in range(2))
    assert one.to_dict() == two.to_dict()
    other = density(tiny_llama, PROMPT, method="random", seed=8)
    assert one.ranking.rank["head"].tolist() != other.ranking.rank["head"].tolist()


def test_position_is_the_same_as_a_shorter_prompt(tiny_gpt2):
    inside, short = density(tiny_gpt2, PROMPT, position=4), density(tiny_gpt2, PROMPT[:5])
    assert inside.to_dict() == short.to_dict()
    assert density(tiny_gpt2, PROMPT, position=-4).to_dict() == short.to_dict()


def test_table_and_texts_say_the_same(curve):
    table = curve.table()
    assert table["threshold"].tolist() == list(curve.thresholds)
    assert table["size"].tolist() == [curve.minimal_size(t) for t in curve.thresholds]
    numbers = curve.to_dict()
    assert numbers["minimal_size"]["0.9"]["first"] == curve.minimal_size(0.9)
    assert numbers["minimal_size"]["0.9"]["stable"] == curve.minimal_size(0.9, stable=True)
    for text in (repr(curve), curve._repr_html_()):
        assert f"{curve.minimal_size(0.9):,}" in text


def test_numbers_of_every_kind_are_taken(tiny_gpt2):
    """What numpy, torch and plain Python call numbers gives the same results."""
    import numpy as np

    curve = density(tiny_gpt2, np.array(PROMPT), thresholds=[0.5, 1], sizes=np.array([3, 5]), baselines=False)
    assert curve.to_dict() == density(tiny_gpt2, PROMPT, thresholds=(1.0, 0.5), sizes=[3, 5], baselines=False).to_dict()
    assert set(curve.to_dict()["minimal_size"]) == {"0.5", "1"}
    assert curve.ranking.circuit(np.int64(4)).n_edges == 4
    one, two = (
        td.evaluate(tiny_gpt2, PROMPT, curve.ranking, sizes, metrics=["tv"]) for sizes in ([2, 9], np.array([2, 9]))
    )
    assert one.metrics["tv"].tolist() == two.metrics["tv"].tolist()


@pytest.mark.parametrize(
    ("circuits", "sizes", "sentence"),
    [
        pytest.param("scores", None, "must be a ranking, a circuit or a list", id="scores are no ranking"),
        pytest.param([], None, "got an empty list", id="no circuit"),
        pytest.param("ranking", [10**6], r"`sizes` must be from 0 to .* got \[1000000\]", id="too large"),
        pytest.param("ranking", [0.5], "`sizes` must be a list of whole numbers", id="shares"),
        pytest.param("circuit", [3], "`sizes` must be left out for circuits", id="sizes of a circuit"),
        pytest.param("other prompt", [3], "must belong to this model and prompt", id="another prompt"),
    ],
)
def test_what_cannot_be_evaluated_gets_one_sentence(tiny_gpt2, unchecked, circuits, sizes, sentence):
    scores = td.attribute(tiny_gpt2, PROMPT)
    things = {"scores": [scores], "ranking": scores.rank(), "circuit": scores.rank().circuit(9)}
    things["other prompt"] = td.attribute(tiny_gpt2, PROMPT[:4]).rank()
    thing = things[circuits] if isinstance(circuits, str) else circuits
    with pytest.raises(ValueError, match=sentence):
        td.evaluate(tiny_gpt2, PROMPT, thing, sizes)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param({"thresholds": (0.5, 1.2)}, r"`thresholds` must be .* got \[1.2\]", id="threshold above 1"),
        pytest.param({"thresholds": (0.0,)}, r"`thresholds` must be .* got \[0.0\]", id="threshold 0"),
        pytest.param({"thresholds": ("0.9",)}, r"`thresholds` must be .* got \['0.9'\]", id="threshold as text"),
        pytest.param({"sizes": [0.1, 0.5]}, "must be a list of whole numbers of edges; for shares", id="shares"),
        pytest.param({"batch_size": 0}, "`batch_size` must be at least 1, got 0", id="batch size"),
        pytest.param({"seed": 2**70}, "`seed` must be from 0 to", id="seed"),
        pytest.param({"method": "norms"}, "`method` must be one of .* got 'norms'", id="method"),
        pytest.param({"family": "best"}, "`family` must be one of .* got 'best'", id="family"),
        pytest.param({"metric": "logprob"}, "`metric` must be one of .* got 'logprob'", id="metric"),
        pytest.param({"ablation": "counterfactual"}, "`ablation` must be one of .* on the token graph", id="ablation"),
        pytest.param({"attention": "shut"}, "`attention` must be one of .* got 'shut'", id="attention"),
        pytest.param({"graph": "layers"}, "`graph` must be one of .* got 'layers'", id="graph"),
        pytest.param({"thresholds": ()}, "`thresholds` must be .* got none", id="no threshold"),
        pytest.param({"sizes": [5, 10**6]}, r"`sizes` must be from 0 to .* got \[1000000\]", id="size"),
        pytest.param({"position": 8}, "`position` must be a token of the prompt, from -8 to 7, got 8", id="position"),
    ],
)
def test_bad_arguments_get_one_sentence(tiny_gpt2, unchecked, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        density(tiny_gpt2, PROMPT, **arguments)
