"""Robust density: circuits that are faithful in several situations at once, by the least of what they reach there."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from typing import Any

import handmade
import handmade_components
import pytest
import torch
from component_cases import EQUAL, PROMPT, model_of
from conftest import random_model
from handmade_lucky import HABIT, INDUCTION, PLACE, lucky_model
from handmade_lucky import PROMPT as NAMES_PROMPT
from test_left_as_it_was import fail_after, flushes, state
from torch import Tensor

import tracedensity as td
from benchmarks.lens import HookedTransformer
from tracedensity.evaluation import setting_for
from tracedensity.gauge import Gauge
from tracedensity.graph import flatten, unflatten
from tracedensity.ground import Ground
from tracedensity.model import as_transformer
from tracedensity.refinement import refined
from tracedensity.run import Conditions
from tracedensity.search import GRADIENT_PASSES
from tracedensity.situation import Home

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")

THRESHOLDS = (0.8, 0.95)
OWN, MEAN, RESAMPLE = "own: zero ablation", "ablation: mean", "ablation: resample"


@pytest.fixture(scope="module")
def lucky() -> HookedTransformer:
    return lucky_model()


def robust_of(curve: td.DensityCurve) -> td.DensityCurve:
    assert curve.robust is not None
    return curve.robust


def certificate_of(circuit: td.Circuit) -> td.Certificate:
    assert circuit.certificate is not None
    return circuit.certificate


def about(value: Any) -> Any:
    return pytest.approx(value, abs=2e-5)


def longer_prompt(prompt: list[int], situations: Iterable[str]) -> list[int]:
    """The prompt behind the token that was drawn; models without tokenizer write it as its id."""
    (token,) = (found[1] for name in situations if (found := re.fullmatch(r"prompt: '(\d+)' prepended", name)))
    return [int(token), *prompt]


def behind(model: object, circuit: td.Circuit, prompt: list[int]) -> td.Circuit:
    """The circuit on a prompt with one more token before it, put together from names of edges."""
    ranking = td.attribute(model, prompt, method="random").rank("top")
    whole = ranking.circuit(ranking.n_edges)
    kept = {kind: mask.clone() for kind, mask in whole.kept.items()}
    own = set(circuit.edge_names())
    for name in whole.edge_names():
        places = re.findall(r"(?<=[@>])\d+", name)
        before = re.sub(r"(?<=[@>])\d+", lambda found: str(int(found[0]) - 1), name)
        if "0" not in places and before not in own:
            kind, index = whole.graph.edge_index(name)
            kept[kind][index] = False
    return replace(circuit, graph=whole.graph, kept=kept)


def by_hand(model: object, prompt: Any, situations: Iterable[str], circuit: td.Circuit, seed: int = 0) -> list[float]:
    """Faithfulness of a circuit in each of the situations of a curve, by `td.evaluate`."""
    found = []
    for name in situations:
        other, where, options = circuit, prompt, {}
        if name.startswith("ablation: "):
            options = {"ablation": name.removeprefix("ablation: "), "seed": seed}
        elif name.endswith("prepended"):
            where = longer_prompt(prompt, [name])
            other = behind(model, circuit, where)
        elif name.startswith("prompt: "):
            where = name.removeprefix("prompt: '").removesuffix("'")
        measured = td.evaluate(model, where, other, metrics=(circuit.metric,), **options)
        found.append(float(measured.faithfulness()[0]))
    return found


def grounds_of(model: object, prompt: Any, changes: list[str], graph: str = "token", **options: Any) -> list[Ground]:
    """The situations of a prompt or task."""
    ranking = td.attribute(model, prompt, graph=graph, method="random", **options).rank("top")
    transformer, about = as_transformer(model), ranking.provenance
    setting = setting_for(transformer, ranking.graph, about.subject, about.ablation, -1, 0)
    gauge = Gauge.of(setting, ranking.graph, None)
    own = Ground(ranking.graph, Conditions(ablation=about.ablation), gauge)
    return Home(transformer, about.subject, own, gauge.metric).situations(changes)


# -- curves of rankings ----------------------------------------------------------------------------


def test_a_robust_curve_is_the_least_of_the_curves_of_its_situations(tiny_model):
    """All sizes are run in each situation, the prompt with a token before it with circuits made by hand."""
    sizes = range(0, 59, 4)
    curve = td.density(tiny_model, PROMPT, thresholds=THRESHOLDS, sizes=sizes, robust=True, baselines=False)
    robust, ranking = robust_of(curve), curve.ranking
    assert robust.situations[:2] == (OWN, MEAN) and len(robust.situations) == 3
    own = 1 - td.evaluate(tiny_model, PROMPT, ranking, robust.sizes).metrics["tv"]
    mean = 1 - td.evaluate(tiny_model, PROMPT, ranking, robust.sizes, ablation="mean").metrics["tv"]
    longer = longer_prompt(PROMPT, robust.situations)
    moved = [behind(tiny_model, ranking.circuit(size), longer) for size in robust.sizes.tolist()]
    prepended = 1 - td.evaluate(tiny_model, longer, moved, metrics=("tv",)).metrics["tv"]
    each = torch.stack([own, mean, prepended])
    assert len(each.argmin(0).unique()) > 1  # which one is the least depends on the size
    assert robust.faithfulness.tolist() == about(each.amin(0).tolist())


@pytest.mark.parametrize(
    ("kind", "prompt", "options"),
    [
        ("gpt2", PROMPT, {}),
        ("llama", PROMPT, {"keep_residual": True, "ablation": "mean", "robust": ["resample", "prepend", "zero"]}),
        ("llama", EQUAL, {"graph": "component", "robust": ["zero", "resample"]}),
        (
            "gpt2",
            EQUAL,
            {"graph": "component", "positions": True, "metric": "tv", "robust": ["zero", "mean-positional"]},
        ),
    ],
    ids=["tokens", "skips kept, mean", "components", "components by position"],
)
def test_robust_circuits_reach_each_threshold_everywhere_and_are_no_smaller(kind, prompt, options, request):
    model = request.getfixturevalue(f"tiny_{kind}")
    curve = td.density(model, prompt, **{"thresholds": THRESHOLDS, "robust": True, "baselines": False, **options})
    robust = robust_of(curve)
    for threshold in THRESHOLDS:
        assert robust.minimal_size(threshold) >= curve.minimal_size(threshold)
        circuit = robust.circuit(faithfulness=threshold)
        assert circuit.n_edges == robust.minimal_size(threshold)
        reached = by_hand(model, prompt, robust.situations, circuit)
        point = robust.sizes.tolist().index(circuit.n_edges)
        assert min(reached) >= threshold - 1e-4
        assert float(robust.faithfulness[point]) == pytest.approx(min(reached), rel=1e-3, abs=1e-4)
    assert any(robust.minimal_size(each) > curve.minimal_size(each) for each in THRESHOLDS)


def test_without_being_asked_there_is_no_robust_curve(tiny_gpt2):
    assert td.density(tiny_gpt2, PROMPT, baselines=False).robust is None
    assert td.density(tiny_gpt2, PROMPT, baselines=False, robust=[]).robust is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["mean"], [OWN, MEAN]),
        (["resample", "mean"], [OWN, MEAN, RESAMPLE]),
        (["zero", "resample"], [OWN, RESAMPLE]),
        (["counterfactual", "mean"], [OWN, MEAN]),
        (("prepend",), [OWN, "prompt: '4' prepended"]),
    ],
    ids=str,
)
def test_the_situations_are_those_that_are_asked_for_and_that_there_are(changes, expected, tiny_gpt2):
    curve = td.density(tiny_gpt2, PROMPT, thresholds=(0.5,), baselines=False, robust=changes)
    assert list(robust_of(curve).situations) == expected
    assert curve.to_dict()["situations"] == expected


def test_robust_density_leaves_the_curve_itself_as_it_is(tiny_gpt2):
    plain, both = (td.density(tiny_gpt2, PROMPT, robust=robust) for robust in (False, True))
    assert torch.equal(plain.sizes, both.sizes) and torch.equal(plain.faithfulness, both.faithfulness)
    values = both.to_dict()
    del values["robust_minimal_size"], values["situations"]
    assert values == plain.to_dict()
    assert robust_of(both).random is None and both.random is not None  # baselines are run once


def test_a_circuit_of_a_robust_curve_holds_up_when_it_is_checked(tiny_gpt2, monkeypatch):
    monkeypatch.setattr("tracedensity.trust._METHODS", {"token": ()})
    curve = td.density(tiny_gpt2, PROMPT, thresholds=(0.9,), baselines=False, robust=True)
    robust = robust_of(curve)
    found = robust.circuit(faithfulness=0.9).check(tiny_gpt2, n_random=0)
    assert min(reached for name, reached in found.situations if name in robust.situations) >= 0.9
    assert {name for name, _ in found.situations} == {*robust.situations, RESAMPLE}
    plain = dict(curve.circuit(faithfulness=0.9).check(tiny_gpt2, n_random=0).situations)
    assert min(plain[name] for name in robust.situations) < 0.9


# -- searching -------------------------------------------------------------------------------------


def test_robust_density_finds_the_right_circuit_where_lucky_ones_are_smaller(lucky):
    curve = td.density(lucky, NAMES_PROMPT, thresholds=(0.9,), refine=True, budget=600, robust=True, baselines=False)
    assert set(curve.circuit(faithfulness=0.9).edge_names()) in (PLACE, HABIT)
    circuit = robust_of(curve).circuit(faithfulness=0.9)
    assert set(circuit.edge_names()) == INDUCTION
    known = certificate_of(circuit)
    assert known.situations == robust_of(curve).situations and len(known.situations) == 5
    assert known.worst is not None and known.worst >= 0.9


@pytest.mark.parametrize(("change", "expected"), [("swap", PLACE), ("prepend", HABIT)])
def test_a_place_survives_other_names_and_a_habit_another_place(change, expected, lucky):
    start = td.attribute(lucky, NAMES_PROMPT).rank()
    found = refined(grounds_of(lucky, NAMES_PROMPT, [change]), start, 0.9, budget=400, seed=0)
    assert set(found.edge_names()) == expected and certificate_of(found).minimum


def test_no_three_edges_are_as_robust_as_induction(lucky):
    """Edges of heads that are zero left out, all circuits are run."""
    grounds = grounds_of(lucky, NAMES_PROMPT, ["mean", "swap", "prepend"])
    graph = grounds[0].graph
    live = [name for name in names_of(graph) if not re.match(r"a0\.h[12]", name)]
    assert len(live) == 27
    some = [each for size in range(4) for each in combinations(live, size)]
    masks = torch.stack([mask_of(graph, names) for names in [*some, INDUCTION]])
    worst = torch.stack([ground.tried(masks).faithfulness for ground in grounds]).amin(0)
    assert float(worst[:-1].max()) < 0.9 <= float(worst[-1])


def names_of(graph: Any) -> list[str]:
    return [graph.edge_name(kind, tuple(i)) for kind, mask in graph.exists.items() for i in mask.nonzero().tolist()]


def mask_of(graph: Any, names: Iterable[str]) -> Tensor:
    kept = {kind: torch.zeros_like(exists) for kind, exists in graph.exists.items()}
    for name in names:
        kind, index = graph.edge_index(name)
        kept[kind][index] = True
    return flatten(graph, kept)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (PROMPT, {"robust": ["mean", "prepend"]}),
        (PROMPT, {"robust": ["resample"], "keep_residual": True}),
        (EQUAL, {"graph": "component", "metric": "tv", "robust": ["zero", "mean"]}),
    ],
    ids=["tokens", "skips kept", "components"],
)
def test_the_worst_of_a_certificate_is_the_least_of_what_evaluate_says(prompt, options, tiny_gpt2):
    curve = td.density(tiny_gpt2, prompt, thresholds=(0.9,), refine=True, budget=30, baselines=False, **options)
    robust = robust_of(curve)
    assert isinstance(robust, td.TightCurve)
    (circuit,) = robust.refined
    known = certificate_of(circuit)
    reached = by_hand(tiny_gpt2, prompt, known.situations, circuit)
    assert known.situations == robust.situations and len(reached) == len(known.situations) > 1
    assert known.worst == about(min(reached)) and circuit.faithfulness == about(reached[0])
    assert min(reached) >= 0.9 - 1e-5 and known.to_dict()["worst"] == known.worst
    assert f"asked for 0.9 in {len(reached)} situations" in str(known)
    best = robust.circuit(faithfulness=0.9)
    assert curve.minimal_size(0.9) <= best.n_edges <= circuit.n_edges
    height = robust.faithfulness[robust.sizes.tolist().index(best.n_edges)]
    assert float(height) == about(min(by_hand(tiny_gpt2, prompt, known.situations, best)))


def test_what_is_faithful_in_all_situations_is_so_at_home(lucky):
    """Circuits found in several situations are on the plain curve as well, without what is known of them elsewhere."""
    options: dict[str, Any] = {"thresholds": (0.9,), "refine": True, "budget": 150, "baselines": False}
    curve = td.density(lucky, NAMES_PROMPT, robust=["prepend"], **options)
    robust = robust_of(curve)
    assert isinstance(curve, td.TightCurve) and isinstance(robust, td.TightCurve)
    (_, at_home), (circuit,) = curve.refined, robust.refined
    assert at_home.edge_names() == circuit.edge_names() and at_home.faithfulness == circuit.faithfulness
    elsewhere, known = certificate_of(circuit), certificate_of(at_home)
    assert len(elsewhere.situations) == 2 and elsewhere.minimum and elsewhere.n_needed == 2
    assert (known.situations, known.worst, known.minimum, known.n_needed) == ((), None, False, 0)
    assert curve.minimal_size(0.9) <= robust.minimal_size(0.9)


@pytest.mark.parametrize("changes", [["mean"], ["mean", "resample"]], ids=str)
def test_on_a_small_graph_the_best_circuit_of_every_size_is_the_best_of_all_of_them(changes):
    """Nine edges, 512 circuits, each of which is run by `td.evaluate` in each situation."""
    model = random_model(act_fn="gelu_new", normalization_type="LN", n_layers=1, n_heads=2)
    prompt, thresholds = [8, 9, 7], (0.6, 0.7, 0.8, 0.95)
    curve = td.density(model, prompt, method="exhaustive", thresholds=thresholds, robust=changes, baselines=False)
    robust, whole = robust_of(curve), curve.ranking.circuit(9)
    names = whole.edge_names()
    chosen = [some for size in range(10) for some in combinations(names, size)]
    circuits = [whole.of_edges(unflatten(whole.graph, mask_of(whole.graph, some), False)) for some in chosen]
    each = [1 - td.evaluate(model, prompt, circuits, ablation=name).metrics["tv"] for name in ["zero", *changes]]
    worst = torch.stack(each).amin(0)
    size = torch.tensor([len(some) for some in chosen])
    for threshold in thresholds:
        smallest = int(size[worst >= threshold].min())
        assert robust.minimal_size(threshold) == smallest >= curve.minimal_size(threshold)
        circuit = robust.circuit(faithfulness=threshold)
        known = certificate_of(circuit)
        number = chosen.index(tuple(circuit.edge_names()))
        assert known.minimum and known.worst == about(float(worst[number]))
        assert known.worst == about(float(worst[size == smallest].max()))
        assert circuit.faithfulness == about(float(each[0][number]))
    assert all(robust.minimal_size(some) > curve.minimal_size(some) for some in (0.6, 0.7, 0.8))


def test_a_known_circuit_of_components_is_the_robust_one_as_well():
    model, task = handmade_components.induction_model(), handmade_components.INDUCTION_TASK
    curve = td.density(
        model, task, graph="component", thresholds=(0.99,), refine=True, budget=60, baselines=False,
        robust=["zero", "mean", "mean-positional"],
    )  # fmt: skip
    assert len(robust_of(curve).situations) == 4
    for each in (curve, robust_of(curve)):
        assert set(each.circuit(faithfulness=0.99).edge_names()) == handmade_components.INDUCTION_CIRCUIT


# -- several grounds at once -----------------------------------------------------------------------


def test_a_circuit_refined_on_several_grounds_is_faithful_on_all_of_them(tiny_gpt2):
    grounds = grounds_of(tiny_gpt2, PROMPT, ["mean", "prepend"])
    start = td.attribute(tiny_gpt2, PROMPT).rank()
    circuit = refined(grounds, start, 0.85, budget=150, seed=0)
    alone = refined(grounds[:1], start, 0.85, budget=50, seed=0)
    kept = flatten(circuit.graph, circuit.kept)[None]
    reached = [float(ground.tried(kept).faithfulness) for ground in grounds]
    assert min(reached) >= 0.85
    assert certificate_of(circuit).worst == min(reached) and circuit.faithfulness == reached[0]
    assert reached == about(by_hand(tiny_gpt2, PROMPT, [ground.name for ground in grounds], circuit))
    assert certificate_of(alone).worst is None and certificate_of(alone).situations == ()
    elsewhere = [float(ground.tried(flatten(alone.graph, alone.kept)[None]).faithfulness) for ground in grounds]
    assert min(elsewhere) < 0.85  # which is what the other grounds are for


def test_the_same_seed_gives_the_same_robust_curve(tiny_gpt2):
    def curve(seed: int) -> td.DensityCurve:
        return td.density(
            tiny_gpt2, PROMPT, seed=seed, thresholds=(0.8,), robust=["resample", "prepend"], baselines=False
        )

    one, again, other = curve(3), curve(3), curve(4)
    assert json.dumps(one.to_dict()) == json.dumps(again.to_dict())
    assert torch.equal(robust_of(one).faithfulness, robust_of(again).faithfulness)
    assert robust_of(one).situations != robust_of(other).situations  # another token is prepended


@pytest.mark.parametrize("keep_residual", [False, True])
def test_edges_of_a_longer_prompt_stand_where_their_names_say(keep_residual, tiny_model):
    """Circuits and gradients: on the ground of a longer prompt they are those of the edges moved by one."""
    *_, ground = grounds_of(tiny_model, PROMPT, ["prepend"])
    ground = replace(ground, conditions=replace(ground.conditions, keep_residual=keep_residual))
    ranking = td.attribute(tiny_model, PROMPT, method="random").rank("top")
    circuit = ranking.circuit(ranking.n_edges // 2)
    longer = longer_prompt(PROMPT, [ground.name])
    moved = behind(tiny_model, circuit, longer)
    kept, all_kept = flatten(circuit.graph, circuit.kept), flatten(moved.graph, moved.kept)
    wide = replace(ground, places=None)
    assert ground.setting.prompts.tokens[0].tolist() == longer
    assert torch.equal(ground.tried(kept[None]).loss, wide.tried(all_kept[None]).loss)
    slopes = dict(zip(ordered_names(moved.graph), wide.slopes(all_kept).tolist(), strict=True))
    names = [re.sub(r"(?<=[@>])\d+", lambda found: str(int(found[0]) + 1), n) for n in ordered_names(circuit.graph)]
    assert ground.slopes(kept).tolist() == [slopes[name] for name in names]
    assert sum(abs(slopes[name]) > 1e-6 for name in names) > 20


def ordered_names(graph: Any) -> list[str]:
    """Names of edges in canonical order."""
    number = unflatten(graph, torch.arange(graph.n_edges), -1)
    found = {int(number[kind][tuple(i)]): (kind, tuple(i)) for kind in number for i in (number[kind] >= 0).nonzero()}
    return [graph.edge_name(kind, tuple(map(int, index))) for _, (kind, index) in sorted(found.items())]


# -- what it costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "prices"),
    [
        pytest.param(PROMPT, {"changes": ["mean", "prepend"]}, [1, 1, 1], id="a prompt"),
        pytest.param(PROMPT, {"changes": ["mean", "resample"]}, [1, 1, 8], id="drawn tokens"),
        pytest.param(EQUAL, {"graph": "component", "changes": ["zero"]}, [1, 1], id="a task is one run"),
        pytest.param(EQUAL, {"graph": "component", "changes": ["resample"]}, [1, 3], id="three times three pairs"),
        pytest.param(PROMPT, {"graph": "component", "changes": ["mean"]}, [8, 1], id="components of a prompt"),
    ],
)
def test_a_run_costs_as_often_as_its_prompts_are_run(prompt, options, prices):
    assert [ground.price for ground in grounds_of(model_of("gpt2"), prompt, **options)] == prices


@pytest.mark.parametrize("changes", [["mean", "prepend"], ["resample"]], ids=str)
def test_a_search_spends_what_its_certificate_says(changes, tiny_gpt2, monkeypatch):
    """Rows that go through the model are counted: for each circuit one per prompt, three where gradients are taken."""
    import tracedensity.ground

    rows = {"spent": 0}

    def counted(name: str, price: int) -> None:
        function = getattr(tracedensity.ground, name)

        def counting(setting: Any, graph: Any, kept: Any, *arguments: Any) -> Any:
            rows["spent"] += price * len(next(iter(kept.values()))) * len(setting.prompts)
            return function(setting, graph, kept, *arguments)

        monkeypatch.setattr(tracedensity.ground, name, counting)

    counted("run_masks", 1)
    counted("run_shares", GRADIENT_PASSES)
    grounds = grounds_of(tiny_gpt2, PROMPT, changes)
    budget = 40 * sum(ground.price for ground in grounds)
    circuit = refined(grounds, td.attribute(tiny_gpt2, PROMPT).rank(), 0.8, budget=budget, seed=0)
    known = certificate_of(circuit)
    assert known.budget == budget and known.passes == rows["spent"] <= budget
    assert known.passes > 0.7 * budget


def test_the_budget_is_that_of_one_situation_times_their_number(tiny_gpt2):
    options: dict[str, Any] = {"thresholds": (0.8, 0.9), "refine": True, "budget": 9, "baselines": False}
    curve = td.density(tiny_gpt2, PROMPT, robust=["mean", "prepend"], **options)
    robust = robust_of(curve)
    assert isinstance(curve, td.TightCurve) and isinstance(robust, td.TightCurve)
    for found, budget in ((curve.refined[:2], 9), (robust.refined, 27)):
        known = [certificate_of(circuit) for circuit in found]
        assert [certificate.budget for certificate in known] == [budget] * 2
        assert all(certificate.passes <= budget for certificate in known)
    assert robust.passes == sum(certificate_of(circuit).passes for circuit in robust.refined)


def test_too_small_a_budget_gets_one_sentence(tiny_gpt2):
    grounds = grounds_of(tiny_gpt2, PROMPT, ["mean", "resample"])
    start = td.attribute(tiny_gpt2, PROMPT).rank()
    with pytest.raises(ValueError, match="`budget` must be at least 20 passes, to measure two circuits, got 19"):
        refined(grounds, start, 0.8, budget=19, seed=0)
    assert certificate_of(refined(grounds, start, 0.8, budget=20, seed=0)).passes <= 20


def test_unknown_changes_get_one_sentence(tiny_gpt2, unchecked):
    with pytest.raises(ValueError, match=r"`robust` must be some of \[.*'swap', 'prepend'\], got \['dropout'\]"):
        td.density(tiny_gpt2, PROMPT, robust=["mean", "dropout"])


# -- what is shown and what is saved ---------------------------------------------------------------


CURVES: dict[str, dict[str, Any]] = {
    "plain": {"robust": ["mean", "prepend"]},
    "best and refined": {"robust": ["mean", "prepend"], "method": "best", "refine": True, "budget": 8},
    "exhaustive": {"robust": ["mean"], "method": "exhaustive"},
    "components": {"robust": ["zero"], "graph": "component", "refine": True, "budget": 8},
}


@pytest.fixture(scope="module", params=CURVES)
def shown(request: pytest.FixtureRequest) -> td.DensityCurve:
    """Each sort of a curve that has a robust one."""
    options = {"thresholds": THRESHOLDS, "baselines": request.param == "plain", **CURVES[request.param]}
    if request.param == "exhaustive":
        return td.density(handmade.copy_model(0.2), list(handmade.COPY_PROMPT), **options)
    return td.density(model_of("gpt2"), EQUAL if "graph" in options else PROMPT, **options)


def test_sizes_and_situations_are_shown(shown):
    robust, text, page = robust_of(shown), repr(shown), shown._repr_html_()
    sizes = [robust.minimal_size(threshold) for threshold in THRESHOLDS]
    assert shown.table()["robust_size"].tolist() == sizes
    assert "robust" in text.splitlines()[5] and "<th>robust (edges)</th>" in page
    rows = [line.split() for line in text.splitlines()[6 : 6 + len(sizes)]]
    cells = re.findall(r"<tr><td>(.*?)</td></tr>", page)
    for threshold, size, row, cell in zip(THRESHOLDS, sizes, rows, cells, strict=True):
        assert row[0] == str(threshold) and str(size) in row[1:]
        assert cell.endswith(f"<td>{size}")
    for name in robust.situations:
        assert name in text.splitlines()
        assert name.replace("'", "&#x27;") in page


def test_sizes_and_situations_are_in_the_json(shown):
    values = json.loads(json.dumps(shown.to_dict()))
    robust = robust_of(shown)
    assert values["robust_minimal_size"] == {str(each): robust.minimal_size(each) for each in THRESHOLDS}
    assert values["situations"] == list(robust.situations)


def test_a_curve_without_is_shown_without(tiny_gpt2):
    curve = td.density(tiny_gpt2, PROMPT, baselines=False)
    assert "robust" not in repr(curve) + curve._repr_html_() + json.dumps(curve.to_dict())
    assert "robust_size" not in curve.table()


def test_curves_come_back(shown, tmp_path):
    shown.save(tmp_path / "curve.safetensors")
    again = td.load(tmp_path / "curve.safetensors")
    assert type(again) is type(shown)
    assert isinstance(again, td.DensityCurve)
    assert_same(shown, again)
    assert_same(robust_of(shown), robust_of(again))
    assert repr(again) == repr(shown)
    assert again._repr_html_() == shown._repr_html_()


def assert_same(one: td.DensityCurve, other: td.DensityCurve) -> None:
    assert other.to_dict() == one.to_dict()
    assert type(other) is type(one) and other.situations == one.situations
    assert torch.equal(other.sizes, one.sizes) and torch.equal(other.faithfulness, one.faithfulness)
    for threshold in THRESHOLDS:
        assert_same_circuit(one.circuit(faithfulness=threshold), other.circuit(faithfulness=threshold))
    if isinstance(one, td.TightCurve):
        assert isinstance(other, td.TightCurve)
        assert (len(other.families), len(other.refined)) == (len(one.families), len(one.refined))
        for pair in zip(one.refined, other.refined, strict=True):
            assert_same_circuit(*pair)


def assert_same_circuit(one: td.Circuit, other: td.Circuit) -> None:
    assert other.edge_names() == one.edge_names()
    assert (other.faithfulness, other.metric, str(other)) == (one.faithfulness, one.metric, str(one))
    assert (one.certificate is None) == (other.certificate is None)
    if one.certificate is not None:
        assert certificate_of(other).to_dict() == one.certificate.to_dict()
        assert certificate_of(other).situations == one.certificate.situations
        assert all(
            torch.equal(certificate_of(other).needed[kind], mask) for kind, mask in one.certificate.needed.items()
        )


def test_a_robust_circuit_comes_back_with_what_is_known_of_it(lucky, tmp_path):
    grounds = grounds_of(lucky, NAMES_PROMPT, ["swap"])
    circuit = refined(grounds, td.attribute(lucky, NAMES_PROMPT).rank(), 0.9, budget=200, seed=0)
    circuit.save(tmp_path / "circuit.safetensors")
    again = td.load(tmp_path / "circuit.safetensors")
    assert isinstance(again, td.Circuit)
    assert_same_circuit(circuit, again)
    assert len(certificate_of(again).situations) == 3


@pytest.mark.parametrize("options", [{}, {"refine": True, "budget": 6}], ids=["plain", "tight"])
def test_situations_are_no_code_of_the_page(options, tiny_gpt2):
    curve = td.density(tiny_gpt2, PROMPT, thresholds=(0.95,), baselines=False, robust=["mean"], **options)
    situations = (OWN, "prompt: '<script>alert(1)</script> & more'")
    page = replace(curve, robust=replace(robust_of(curve), situations=situations))._repr_html_()
    assert "<script" not in page
    assert "prompt: &#x27;&lt;script&gt;alert(1)&lt;/script&gt; &amp; more&#x27;" in page


# -- the model is left as it was -------------------------------------------------------------------


def robust_work(model: object) -> None:
    td.density(model, PROMPT, thresholds=(0.8,), robust=["mean", "prepend"], refine=True, budget=12, baselines=False)


def test_the_model_is_left_as_it_was(tiny_llama):
    before, flushed = state(tiny_llama), flushes()
    robust_work(tiny_llama)
    assert state(tiny_llama) == before
    assert flushes() == flushed


@pytest.mark.filterwarnings("ignore:interrupted after")
@pytest.mark.parametrize(("error", "n_passes"), [(RuntimeError, 2), (RuntimeError, 20), (KeyboardInterrupt, 25)])
def test_the_model_is_left_as_it_was_after_an_error_in_the_middle(error, n_passes, tiny_gpt2, monkeypatch):
    """Interrupted, a search gives what it has found so far; then the next pass fails, which nobody catches."""
    before, flushed = state(tiny_gpt2), flushes()
    fail_after(monkeypatch, tiny_gpt2, n_passes, error)
    with pytest.raises(error):
        robust_work(tiny_gpt2)
    assert state(tiny_gpt2) == before
    assert flushes() == flushed


@pytest.mark.parametrize("robust", [["swap"], ["zero"], "counterfactual"], ids=str)
def test_situations_that_there_are_none_of_get_one_sentence(robust, tiny_gpt2):
    with pytest.raises(ValueError, match=r"`robust` must name something else than .* Ablations here are \['mean', 're"):
        td.density(tiny_gpt2, PROMPT, robust=robust, baselines=False)


def test_one_situation_needs_no_list(tiny_gpt2):
    curve = td.density(tiny_gpt2, PROMPT, robust="mean", thresholds=(0.5,), baselines=False)
    assert robust_of(curve).situations == ("own: zero ablation", "ablation: mean")


def test_a_robust_circuit_is_compared_with_others_as_robust(tiny_gpt2, monkeypatch):
    options: dict[str, Any] = {"thresholds": (0.8,), "refine": True, "budget": 40, "baselines": False}
    circuit = robust_of(td.density(tiny_gpt2, PROMPT, robust=["mean"], **options)).circuit(faithfulness=0.8)
    assert certificate_of(circuit).situations == ("own: zero ablation", "ablation: mean")
    found = []
    monkeypatch.setattr(
        "tracedensity.trust.refined", lambda *args, **more: found.append(refined(*args, **more)) or found[0]
    )
    assert circuit.check(tiny_gpt2, n_random=0, n_seeds=1).overlaps[0].other == "search with seed 1"
    known = certificate_of(found[0])
    assert known.situations == certificate_of(circuit).situations
    assert known.worst is not None and known.worst >= 0.8 - 1e-6
