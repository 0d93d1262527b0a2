"""The package against `oracle`, which computes the same numbers another way: plain loops in float64, no hooks."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import oracle
import pytest
import torch
from conftest import hooked_only
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Edge, Oracle, Shape

import tracedensity as td
from benchmarks.lens import HAS_HOOKED, HookedTransformer, HookedTransformerConfig, parameters_of
from tracedensity.choices import Attention, Method
from tracedensity.graph import Graph, flatten, unflatten
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.token import TokenGraph
from tracedensity.model import as_transformer, idle
from tracedensity.provenance import Provenance
from tracedensity.run import Conditions, run_circuits, run_family
from tracedensity.score.baseline import arrival_scores
from tracedensity.setting import token_setting

pytestmark = [
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated"),
    pytest.mark.usefixtures("unexamined"),
]

LLAMA: dict[str, Any] = {
    "act_fn": "silu",
    "gated_mlp": True,
    "normalization_type": "RMS",
    "final_rms": True,
    "positional_embedding_type": "rotary",
    "rotary_dim": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN"},
    "gpt2 folded": {"act_fn": "gelu_new", "normalization_type": "LNPre"},
    "llama": LLAMA,
    "grouped": {**LLAMA, "n_key_value_heads": 0},  # drawn: a divisor of the number of heads
    "gemma2": {
        **LLAMA,
        "n_key_value_heads": 0,
        "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 5.0,
        "output_logits_soft_cap": 4.0,
    },
    "olmo2": {**LLAMA, "original_architecture": "Olmo2ForCausalLM"},
    "no norm": {"act_fn": "relu", "normalization_type": None},
    "attention only": {"attn_only": True, "normalization_type": "LN"},
    "attention only, rms": {"attn_only": True, "normalization_type": "RMS", "final_rms": True},
    "attention only, norm after": {
        "attn_only": True,
        "normalization_type": "RMS",
        "final_rms": True,
        "use_normalization_before_and_after": True,
    },
}
HOOKED_KINDS = {"gemma2", "olmo2", "attention only, norm after"}  # a native bridge has no norms after sublayers
CONTRIBUTION_METHODS: tuple[Method, ...] = ("norm", "norm-l2", "norm-ratio", "flow", "flow-shifted", "cosine")
CONDITIONS = [
    Conditions(inverse, keep_residual, attention)
    for inverse, keep_residual in ((False, False), (False, True), (True, False))
    for attention in get_args(Attention)
]
# What is drawn does not change between runs, and small examples come first when one fails.
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
fewer = settings(few, max_examples=7)
fewest = settings(few, max_examples=4)


def each_of(kinds: Iterable[str]) -> pytest.MarkDecorator:
    """A test of each kind that the installed TransformerLens has."""
    marks = {kind: hooked_only if kind in HOOKED_KINDS else () for kind in kinds}
    return pytest.mark.parametrize("kind", [pytest.param(kind, marks=mark) for kind, mark in marks.items()])


each_kind = each_of(KINDS)
per_kind = settings(few, max_examples=2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other take longer than tensors as small as these."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(autouse=True, scope="module")
def nothing_is_too_small():
    """What is left out where heads bring nothing is left out of models as small as these, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idle, "_WORTHWHILE", 0)
        yield


@dataclass(frozen=True)
class Case:
    """A random model and prompt."""

    kind: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    tokens: tuple[int, ...]
    seed: int

    @property
    def shape(self) -> Shape:
        return Shape(self.n_layers, self.n_heads, len(self.tokens), not KINDS[self.kind].get("attn_only", False))

    @property
    def graph(self) -> TokenGraph:
        return TokenGraph(*self.shape)

    def model(self, dtype: torch.dtype = torch.float64) -> HookedTransformer:
        """All weights and biases random; large enough for attention to have favourites."""
        options: dict[str, Any] = {"n_layers": self.n_layers, "n_heads": self.n_heads}
        options |= {"d_model": 12, "d_head": 4, "d_mlp": 10}
        options |= {"n_ctx": 8, "d_vocab": 11, "device": "cpu", "dtype": dtype, "init_weights": False}
        options |= KINDS[self.kind]
        if "n_key_value_heads" in options:
            options["n_key_value_heads"] = self.n_kv_heads
        if self.kind == "olmo2":  # which normalises the queries of all heads as one vector of d_model
            options["d_head"] = 12 // self.n_heads
        model = HookedTransformer(HookedTransformerConfig(**options))
        generator = torch.Generator().manual_seed(self.seed)
        spread = 0.25 if self.kind == "no norm" else 0.4  # streams that nothing keeps small grow with depth
        with torch.no_grad():
            for name, parameter in parameters_of(model).items():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(1 + noise / 3 if name.endswith(".w") else noise * spread)
        return model


@st.composite
def cases(draw: st.DrawFn, kinds: Iterable[str] = KINDS, max_pos: int = 6) -> Case:
    n_heads = draw(st.integers(1, 4))
    return Case(
        kind=draw(st.sampled_from([kind for kind in kinds if HAS_HOOKED or kind not in HOOKED_KINDS])),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads,
        n_kv_heads=draw(st.sampled_from([n for n in range(1, n_heads + 1) if n_heads % n == 0])),
        tokens=tuple(draw(st.lists(st.integers(0, 10), min_size=1, max_size=max_pos))),
        seed=draw(st.integers(0, 2**16)),
    )


def of_kind(kind: str, case: Case) -> Case:
    """A case made one of a kind; where heads share keys and values, with several heads in several groups."""
    return replace(case, kind=kind, **({"n_heads": 4, "n_kv_heads": 2} if kind == "grouped" else {}))


shapes = st.builds(Shape, st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.none())


def by_edge(graph: Graph, values: Mapping[str, torch.Tensor]) -> dict[Edge, Any]:
    """The entries of tensors that are edges."""
    found: dict[Edge, Any] = {}
    for kind, exists in graph.exists.items():
        for index in map(tuple, exists.nonzero().tolist()):
            found[kind, index] = values[kind][index].item()
    return found


def by_kind(graph: Graph, values: Mapping[Edge, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors with these entries, and zeros elsewhere."""
    tensors = {kind: torch.zeros(shape, dtype=dtype) for kind, shape in graph.shapes.items()}
    for (kind, index), value in values.items():
        tensors[kind][index] = value
    return tensors


def order(ranking: td.Ranking) -> list[Edge]:
    """The edges, first to enter first."""
    place = by_edge(ranking.graph, ranking.rank)
    assert sorted(place.values()) == list(range(ranking.n_edges))
    for kind, exists in ranking.graph.exists.items():
        assert (ranking.rank[kind][~exists] == -1).all()
    return sorted(place, key=place.__getitem__)


def made_up(graph: TokenGraph, values: Mapping[Edge, float]) -> td.Scores:
    """Scores of no model."""
    return td.Scores(graph, by_kind(graph, values, torch.float64), Provenance("none", "", (), (), "made up"))


def tied_scores(shape: Shape, seed: int, lowest: int) -> dict[Edge, float]:
    """One of few values for each edge, so that most of them are equal to others."""
    generator = np.random.default_rng(seed)
    return {edge: float(generator.integers(lowest, 5)) for edge in oracle.all_edges(shape)}


def some_sizes(n_edges: int) -> torch.Tensor:
    """A few numbers of edges, none and all among them."""
    return torch.tensor([0, 2, n_edges // 8, n_edges // 3, 2 * n_edges // 3, n_edges - 1, n_edges]).unique()


def assert_close(actual: torch.Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    """Equal up to a share of the largest number, or of 1 if all are smaller."""
    expected = np.asarray(expected)
    difference = np.abs(actual.double().numpy() - expected).max(initial=0.0)
    assert difference <= tolerance * max(1.0, np.abs(expected).max(initial=0.0))


# -- the oracle itself -------------------------------------------------------------------------------


@each_kind
@per_kind
@given(case=cases())
def test_the_oracle_runs_the_model(kind, case):
    case = of_kind(kind, case)
    model = case.model()
    expected = model(torch.tensor([case.tokens]))[0, -1].detach()
    assert_close(expected, Oracle(model, case.tokens).run().logits)


@few
@given(case=cases(kinds=set(KINDS) - HOOKED_KINDS))
def test_contributions_add_up_to_the_state_but_for_the_bias_of_attention(case):
    truth = Oracle(case.model(), case.tokens)
    run = truth.run()
    for node in oracle.nodes(case.shape):
        if edges := oracle.in_edges(case.shape, node):
            rest = run.stream[node] - sum(run.vectors[edge] for edge in edges)
            into_attention = edges[-1][0] == "head"
            bias = truth.weight(edges[0][1][0], "attn.b_O") if into_attention else np.zeros(12)
            np.testing.assert_allclose(rest, bias, atol=1e-9)


# -- the graph ---------------------------------------------------------------------------------------


@given(shape=shapes)
@few
def test_edges_are_those_with_a_path_to_the_output(shape):
    graph = TokenGraph(*shape)
    expected = oracle.all_edges(shape)
    assert set(by_edge(graph, graph.exists)) == set(expected)
    assert graph.n_edges == len(expected)
    assert graph.n_nodes == len(oracle.nodes(shape))


@given(shape=shapes)
@few
def test_number_of_edges_is_the_papers(shape):
    n_layers, n_heads, n_pos, *_ = shape
    full = n_heads * n_pos * (n_pos + 1) // 2 + 3 * n_pos
    assert TokenGraph(n_layers, n_heads, n_pos).n_edges == (n_layers - 1) * full + n_heads * n_pos + 3


@given(shape=shapes)
@few
def test_canonical_order_is_the_order_of_pushing(shape):
    graph = TokenGraph(*shape)
    numbers = {edge: i for i, edge in enumerate(oracle.all_edges(shape))}
    assert flatten(graph, by_kind(graph, numbers, torch.long)).tolist() == list(range(graph.n_edges))


@given(shape=shapes)
@few
def test_flatten_and_unflatten_are_inverses(shape):
    graph = TokenGraph(*shape)
    flat = torch.arange(graph.n_edges) + 1
    values = unflatten(graph, flat, -7)
    assert (flatten(graph, values) == flat).all()
    for kind, exists in graph.exists.items():
        assert values[kind].shape == graph.shapes[kind]
        assert (values[kind][~exists] == -7).all() and (values[kind][exists] > 0).all()


@given(shape=shapes)
@few
def test_names_and_indices_are_inverses(shape):
    graph = TokenGraph(*shape)
    edges = oracle.all_edges(shape)
    names = [graph.edge_name(*edge) for edge in edges]
    assert len(set(names)) == len(edges)
    assert [graph.edge_index(name) for name in names] == edges


# -- scores ------------------------------------------------------------------------------------------


@each_kind
@per_kind
@given(case=cases())
def test_scores_are_the_oracles(kind, case):
    case = of_kind(kind, case)
    model = case.model()
    truth = Oracle(model, case.tokens)
    for method in CONTRIBUTION_METHODS:
        scores, expected = td.attribute(model, case.tokens, method=method), truth.scores(method)
        flat = flatten(scores.graph, scores.values)
        assert flat.dtype == torch.float64
        assert_close(flat, [expected[edge] for edge in oracle.all_edges(case.shape)])
        for kind, exists in scores.exists.items():
            assert (scores.values[kind][~exists] == 0).all()


@each_kind
@per_kind
@given(case=cases())
def test_scores_in_single_precision_are_near_the_oracles(kind, case):
    case = of_kind(kind, case)
    model = case.model(torch.float32)
    truth = Oracle(model, case.tokens)
    for method in CONTRIBUTION_METHODS:
        scores, expected = td.attribute(model, case.tokens, method=method), truth.scores(method)
        flat = flatten(scores.graph, scores.values)
        assert flat.dtype == torch.float32
        assert_close(flat, [expected[edge] for edge in oracle.all_edges(case.shape)], 1e-5)


@fewer
@given(case=cases(), workspace=st.sampled_from([1, 100, 1000, 5000]))
def test_scores_do_not_depend_on_the_workspace(case, workspace):
    model = case.model()
    for method in CONTRIBUTION_METHODS:
        usual = td.attribute(model, case.tokens, method=method)
        small = td.attribute(model, case.tokens, method=method, workspace=workspace)
        assert_close(flatten(small.graph, small.values), flatten(usual.graph, usual.values), 1e-12)


# -- rankings ----------------------------------------------------------------------------------------


def assert_ranked_as_described(scores: td.Scores, shape: Shape) -> None:
    values = by_edge(scores.graph, scores.values)
    edges = oracle.all_edges(shape)
    for family in ("greedy", "threshold", "nucleus"):  # whatever its size, a circuit holds together
        reached = {oracle.output(shape)}
        for edge in order(scores.rank(family)):
            assert oracle.target(shape, edge) in reached
            reached.add(oracle.source(shape, edge))
    by_growth = order(scores.rank("greedy"))
    assert by_growth == oracle.greedy(shape, values)
    assert order(scores.rank("top")) == sorted(edges, key=lambda edge: -values[edge])

    ranking = scores.rank("threshold")
    by_threshold = order(ranking)
    circuits = oracle.thresholds(shape, values)
    for circuit in circuits:
        assert set(by_threshold[: len(circuit)]) == circuit
        # Best-first growth takes all that it can get above a threshold before it takes anything below.
        assert set(by_growth[: len(circuit)]) == circuit
    assert ranking.natural_sizes is not None
    assert ranking.natural_sizes.tolist() == sorted({len(circuit) for circuit in circuits} - {0})

    ranking = scores.rank("nucleus")
    by_nucleus = order(ranking)
    assert ranking.natural_sizes is not None
    for share in oracle.nucleus_cuts(shape, values):
        circuit = oracle.nucleus(shape, values, share)
        assert set(by_nucleus[: len(circuit)]) == circuit
        assert len(circuit) in ranking.natural_sizes


@few
@given(case=cases(), method=st.sampled_from(CONTRIBUTION_METHODS))
def test_rankings_of_a_models_scores(case, method):
    assert_ranked_as_described(td.attribute(case.model(), case.tokens, method=method), case.shape)


@few
@given(shape=shapes, seed=st.integers(0, 2**16))
def test_rankings_of_scores_that_are_mostly_equal(shape, seed):
    assert_ranked_as_described(made_up(TokenGraph(*shape), tied_scores(shape, seed, lowest=1)), shape)


@few
@given(shape=shapes, seed=st.integers(0, 2**16))
def test_growth_when_many_scores_are_zero_or_negative(shape, seed):
    values = tied_scores(shape, seed, lowest=-2)
    assert order(made_up(TokenGraph(*shape), values).rank("greedy")) == oracle.greedy(shape, values)


@few
@given(case=cases())
def test_a_circuit_is_the_first_edges_of_its_ranking(case):
    ranking = td.attribute(case.model(), case.tokens).rank()
    entered = order(ranking)
    for size in some_sizes(ranking.n_edges).tolist():
        circuit = ranking.circuit(size)
        kept = {edge for edge, is_kept in by_edge(circuit.graph, circuit.kept).items() if is_kept}
        assert kept == set(entered[:size]) and circuit.n_edges == size
        assert kept == oracle.connected(case.shape, kept)


# -- circuits ----------------------------------------------------------------------------------------


def as_they_are(logits, part):
    """What is wanted of circuits: their logits on the one prompt."""
    return {"logits": logits[:, 0]}


def assert_run_as_described(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """A greedy family, edges in random order, and random sets of edges, in all conditions."""
    model = case.model(dtype)
    truth, transformer = Oracle(model, case.tokens), as_transformer(model)
    graph, tokens = case.graph, torch.tensor(case.tokens)
    setting = token_setting(transformer, tokens, None, -1, 0)
    generator = torch.Generator().manual_seed(case.seed)
    shuffled = unflatten(graph, torch.randperm(graph.n_edges, generator=generator).int(), -1)
    grown = td.attribute(model, tokens).rank().rank
    sizes = torch.tensor([0, graph.n_edges // 5, graph.n_edges // 2, graph.n_edges - 1])
    for conditions in CONDITIONS:
        options = {name: value for name, value in vars(conditions).items() if name != "ablation"}
        for rank in (grown, shuffled):
            place = by_edge(graph, rank)
            logits = run_family(setting, graph, rank, sizes, conditions, as_they_are)["logits"]
            expected = [truth.circuit([e for e in place if place[e] < size], **options) for size in sizes.tolist()]
            assert_close(logits, expected, tolerance)

        masks = [torch.rand(graph.n_edges, generator=generator) < share for share in (0.3, 0.8)]
        kept = [unflatten(graph, mask, False) for mask in masks]
        circuits = [Circuit(graph, mask, Provenance("none", "", (), (), "made up")) for mask in kept]
        sets = [[edge for edge, is_kept in by_edge(graph, mask).items() if is_kept] for mask in kept]
        logits = run_circuits(setting, circuits, conditions, as_they_are)["logits"]
        assert_close(logits, [truth.circuit(edges, **options) for edges in sets], tolerance)


@each_kind
@per_kind
@given(case=cases(max_pos=5))
def test_circuits_predict_what_the_oracle_says(kind, case):
    assert_run_as_described(of_kind(kind, case), torch.float64, 1e-9)


@each_kind
@settings(few, max_examples=1)
@given(case=cases(max_pos=5))
def test_circuits_in_single_precision_predict_nearly_what_the_oracle_says(kind, case):
    assert_run_as_described(of_kind(kind, case), torch.float32, 1e-5)


@few
@given(case=cases())
def test_all_edges_together_are_the_model(case):
    model, graph = case.model(torch.float32), case.graph
    ranking = td.attribute(model, case.tokens).rank()
    whole = td.evaluate(model, case.tokens, ranking, [graph.n_edges])
    assert whole.metrics["tv"].item() < 1e-5 and whole.metrics["kl"].item() < 1e-5
    assert whole.metrics["top1"].item() == 1
    tokens = torch.tensor(case.tokens)
    setting = token_setting(as_transformer(model), tokens, None, -1, 0)
    circuits = [ranking.circuit(graph.n_edges)]
    logits = run_circuits(setting, circuits, Conditions(), as_they_are)["logits"]
    assert_close(logits[0], model(tokens[None])[0, -1].detach(), 1e-5)


@few
@given(case=cases())
def test_metrics_are_the_oracles(case):
    model = case.model()
    truth, ranking = Oracle(model, case.tokens), td.attribute(model, case.tokens).rank()
    entered, sizes = order(ranking), some_sizes(ranking.n_edges).tolist()
    metrics = ("tv", "kl", "top1", "nucleus", "entropy", "logprob")
    measured = td.evaluate(model, case.tokens, ranking, sizes, metrics=metrics, target=3)
    full = truth.run().logits
    circuits = [truth.circuit(entered[:size]) for size in sizes]
    assert measured.sizes.tolist() == sizes
    assert_close(measured.metrics["tv"], [oracle.total_variation(full, c) for c in circuits])
    assert_close(measured.metrics["kl"], [oracle.kl_divergence(full, c) for c in circuits])
    assert_close(measured.metrics["top1"], [float(full.argmax() == c.argmax()) for c in circuits])
    assert_close(measured.metrics["nucleus"], [oracle.nucleus_recovery(full, c) for c in circuits])
    chances = [oracle.probabilities(c) for c in circuits]
    assert_close(measured.metrics["entropy"], [-(p * np.log(p.clip(1e-300))).sum() for p in chances])
    assert_close(measured.metrics["logprob"], np.log([p[3] for p in chances]))


@fewest
@given(case=cases(), batch_size=st.integers(1, 6))
def test_metrics_do_not_depend_on_the_batch_size(case, batch_size):
    model = case.model()
    ranking = td.attribute(model, case.tokens).rank()
    sizes = some_sizes(ranking.n_edges)
    usual = td.evaluate(model, case.tokens, ranking, sizes)
    batched = td.evaluate(model, case.tokens, ranking, sizes, batch_size=batch_size)
    for name, values in usual.metrics.items():
        assert_close(batched.metrics[name], values, 1e-12)


@fewest
@given(case=cases(), later=st.lists(st.integers(0, 10), min_size=1, max_size=2))
def test_what_comes_after_the_position_is_not_read(case, later):
    model = case.model()
    prompt = [*case.tokens, *later]
    for position in (len(case.tokens) - 1, -len(later) - 1):
        ranking = td.attribute(model, prompt, position=position).rank()
        alone = td.attribute(model, case.tokens).rank()
        assert ranking.graph == case.graph and order(ranking) == order(alone)
        sizes = some_sizes(case.graph.n_edges)
        measured = td.evaluate(model, prompt, ranking, sizes, position=position)
        expected = td.evaluate(model, case.tokens, alone, sizes)
        for name, values in expected.metrics.items():
            assert (measured.metrics[name] == values).all()


# -- curves ------------------------------------------------------------------------------------------


@fewer
@given(case=cases(max_pos=4), keep_residual=st.booleans())
def test_a_density_curve_holds_what_the_oracle_measures(case, keep_residual):
    model = case.model()
    truth = Oracle(model, case.tokens)
    curve = td.density(model, case.tokens, thresholds=(0.5, 0.9), keep_residual=keep_residual)
    entered, full = order(curve.ranking), truth.run().logits

    def faithfulness(size: int, **conditions: Any) -> float:
        return 1 - oracle.total_variation(full, truth.circuit(entered[:size], **conditions))

    expected = [faithfulness(size, keep_residual=keep_residual) for size in curve.sizes.tolist()]
    assert_close(curve.faithfulness, expected)
    for threshold in (0.5, 0.9):
        size = curve.minimal_size(threshold)
        assert faithfulness(size, keep_residual=keep_residual) >= threshold - 1e-6
        before = max((s for s in curve.sizes.tolist() if s < size), default=0)
        assert size <= max(before + 1, before * 1.02)
        if size > curve.sizes[0]:
            assert faithfulness(before, keep_residual=keep_residual) < threshold
    assert curve.inverse is not None
    expected = [faithfulness(size, inverse=True) for size in curve.inverse.sizes.tolist()]
    assert_close(curve.inverse.faithfulness, expected)


# -- random baselines --------------------------------------------------------------------------------


def growths(shape: Shape, n_steps: int) -> dict[tuple[Edge, ...], float]:
    """How probable each beginning of a random growth is, from the description of the process.

    Each step picks one of the reached nodes with edges left, all alike, and one of its edges: a skip
    connection or MLP while there is one, then a head.
    """
    laws: dict[tuple[Edge, ...], float] = {(): 1.0}
    for _ in range(n_steps):
        longer: dict[tuple[Edge, ...], float] = {}
        for taken, chance in laws.items():
            reached = {oracle.output(shape), *(oracle.source(shape, edge) for edge in taken)}
            left = {node: [e for e in oracle.in_edges(shape, node) if e not in taken] for node in reached}
            frontier = [edges for edges in left.values() if edges]
            for edges in frontier:
                offered = [edge for edge in edges if edge[0] != "head"] or edges
                for edge in offered:
                    longer[(*taken, edge)] = chance / len(frontier) / len(offered)
        laws = longer
    return laws


@pytest.mark.parametrize(
    ("shape", "n_steps"),
    [
        pytest.param(Shape(1, 1, 2, True), 5, id="to the end"),
        pytest.param(Shape(2, 2, 2, True), 5, id="two layers"),
        pytest.param(Shape(2, 2, 2, False), 4, id="attention only"),
    ],
)
def test_a_random_growth_has_the_law_of_the_description(shape, n_steps):
    n_draws = 2000
    graph = TokenGraph(*shape)
    expected = growths(shape, n_steps)
    assert sum(expected.values()) == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    begun = torch.stack([flatten(graph, arrival_scores(graph, generator)) for _ in range(n_draws)])
    edges = oracle.all_edges(shape)
    first = begun.argsort(dim=1, descending=True)[:, :n_steps].tolist()
    counts = Counter(tuple(edges[i] for i in row) for row in first)
    assert set(counts) <= set(expected)
    # Pearson's statistic: its mean is the number of degrees of freedom, its variance twice that, and a bit
    # more where some counts are expected to be small
    squares = sum((counts[taken] - n_draws * chance) ** 2 / (n_draws * chance) for taken, chance in expected.items())
    freedom = len(expected) - 1
    assert squares < freedom + 5 * np.sqrt(2 * freedom)


@few
@given(case=cases(), seed=st.integers(0, 1000))
def test_a_random_growth_is_connected_at_every_size(case, seed):
    scores = td.attribute(case.model(), case.tokens, method="random-connected", seed=seed)
    entered = order(scores.rank("greedy"))
    reached = {oracle.output(case.shape)}
    for edge in entered:
        assert oracle.target(case.shape, edge) in reached
        reached.add(oracle.source(case.shape, edge))
    assert entered == order(scores.rank("top"))


@fewer
@given(case=cases(), seed=st.integers(0, 1000), method=st.sampled_from(["random", "random-connected"]))
def test_random_scores_come_from_the_seed_alone(case, seed, method):
    def flat(seed: int) -> torch.Tensor:
        scores = td.attribute(case.model(), case.tokens, method=method, seed=seed)
        return flatten(scores.graph, scores.values)

    torch.manual_seed(1)
    first = flat(seed)
    torch.manual_seed(2)
    assert (flat(seed) == first).all()
    assert (flat(seed + 1) != first).any()


def test_random_scores_are_uniform():
    case = Case("gpt2", 3, 4, 4, (1, 2, 3, 4, 5, 6), 0)
    scores = td.attribute(case.model(), case.tokens, method="random")
    flat = flatten(scores.graph, scores.values).double().sort().values
    n = len(flat)
    assert flat[0] >= 0 and flat[-1] < 1
    steps = (torch.arange(n) + 0.5) / n  # Kolmogorov and Smirnov: beyond 2 / sqrt(n) once in 1500 draws
    assert (flat - steps).abs().max() < 2 / np.sqrt(n)
