"""The page of findings: its rules, its statistics, and that every number it asks for is made."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from pandas import DataFrame
from planted import N_EDGES, bent, curve, planted, straight, write_sweep
from safetensors.torch import load_file
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

import tracedensity as td
from studies.corpora import ASSETS, CORPORA, LENGTHS, NULL, TRAINED, Places, shuffle, studies
from studies.findings import FINDINGS, Finding, Sweeps, dense, phases
from studies.findings.answer import details_of, verdict_of
from studies.findings.dynamic import intraclass, ratio_given_length
from studies.reproduce import ROOT, draw, written


def test_verdicts_say_what_holds_everywhere_and_where_all_of_it_does():
    yes, no, some = {"a": True, "b": True}, {"a": False, "b": False}, {"a": False, "b": True}
    assert verdict_of({"x": yes, "y": {"a": True}}) == "Reproduced"
    assert verdict_of({"x": no, "y": {"a": False}}) == "Not reproduced"
    assert verdict_of({"x": yes, "y": some, "z": no}) == "It depends: everywhere x; nowhere z"
    assert verdict_of({"x": yes, "y": some}) == "It depends: everywhere x; all of it b"
    assert verdict_of({"x": {**yes, "c": False}}) == "It depends: all of it a, b"
    # what was not asked of a sweep is not so of it
    assert verdict_of({"x": {**yes, "c": False}, "y": no}) == "Not reproduced"
    assert verdict_of({"x": {**yes, "c": False}, "y": {"a": False}}) == "Not reproduced"
    # a few that are so make no rule
    many = {str(number): number in (0, 1) for number in range(12)}
    assert verdict_of({"x": many, "y": {**many, "0": False, "1": False, "2": True}}) == "Not reproduced"


def test_details_say_where_each_thing_holds():
    yes, no, some = {"a": True, "b": True}, {"a": False, "b": False}, {"a": False, "b": True, "c": False}
    many = {str(number): number == 0 for number in range(12)}
    holds = {"x": yes, "y": some, "z": no, "u": {**yes, "c": False}, "v": many, "w": no}
    assert details_of(holds, {"x": {"n": False}, "y": {"n": True}}).splitlines() == [
        "* yes: x", "* only for b: y", "* no: z, w", "* yes, but for c: u", "* in 1 of 12: v",
        "* with shuffled weights as well: y",
    ]  # fmt: skip


def test_a_ratio_given_length_leaves_out_what_length_makes():
    generator = np.random.default_rng(0)
    length, own = generator.integers(10, 80, 4000).astype(float), generator.normal(0, 0.1, 4000)
    both = np.stack([own - 0.7 * np.log10(length), np.log(length)], axis=1)
    expected = 10 ** np.diff(np.quantile(own, [0.1, 0.9]))[0]
    assert ratio_given_length(both) == pytest.approx(expected, rel=0.02)
    assert ratio_given_length(np.stack([own, np.full(4000, 3.0)], axis=1)) == pytest.approx(expected)


def test_the_null_control_has_the_entries_of_a_trained_model_elsewhere(tmp_path: Path):
    shuffle(ASSETS / "books-gpt2", tmp_path / "null")
    trained, null = (load_file(folder / "model.safetensors") for folder in (ASSETS / "books-gpt2", tmp_path / "null"))
    for name, each in trained.items():
        assert null[name].shape == each.shape
        assert null[name].flatten().sort().values.equal(each.flatten().sort().values)
        assert each.unique().numel() < 2 or not null[name].equal(each)
    tokens = torch.arange(20)
    predicted = td.load_model(str(tmp_path / "null"))(tokens).detach()[0, -1].double().log_softmax(-1)
    assert 1 < float(-(predicted.exp() * predicted).sum()) < 7  # of 8.3 nats, about as certain as a trained model


def test_intraclass_is_that_of_the_analysis_of_variance():
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 10)
    values = generator.normal(0, 1, 40)[group] + generator.normal(0, 2, 400)
    squares = anova_lm(ols("values ~ C(group)", DataFrame({"values": values, "group": group})).fit())["mean_sq"]
    between, within = squares["C(group)"], squares["Residual"]
    assert intraclass(values, group) == pytest.approx((between - within) / (between + 9 * within))
    uneven = np.repeat(np.arange(80), np.arange(80) % 10 + 1)
    shared = intraclass(generator.normal(0, 2, 80)[uneven] + generator.normal(0, 1, len(uneven)), uneven)
    assert shared == pytest.approx(0.8, abs=0.1)


@pytest.fixture
def given(monkeypatch) -> dict[str, Any]:
    """What sweeps hold, by kind and table: two contexts of each of two documents, so that draws are known by hand."""
    tables: dict[str, Any] = {}
    monkeypatch.setattr(
        Sweeps, "rows", lambda self, model, corpus="wikitext", kind="norm", table="prompts": tables[f"{kind} {table}"]
    )
    return tables


SWEEPS = Sweeps(Path("none"), n_draws=200)  # one in four draws has the first document twice, another the second
TWO = ["d0", "d0", "d1", "d1"]


def test_the_ratio_of_estimators_is_the_geometric_mean_over_common_contexts(given):
    def at(size: list[int], threshold: float, **more: Any) -> DataFrame:
        return DataFrame({"id": [*"abcdefg"][: len(size)], "threshold": threshold, "size": size, **more})

    given["tight thresholds"] = pd.concat([at([2, 5, 1, 3], each, document=TWO) for each in (0.5, 0.9)])
    given["norm thresholds"] = pd.concat([at([9] * 5, 0.5), at([8, 5, 16, 12, 1], 0.9)])  # e has no tight circuit
    # ratios of 4 and 1, of 16 and 4: 2 ** (2 + 0) / 2, 2 ** (4 + 2) / 2
    assert dense._ratio(SWEEPS, "any") == "4.0 (2.0 to 8.0)"


def test_what_the_order_of_edges_gains_is_the_mean_difference_of_areas(given):
    given["norm prompts"] = DataFrame({"auc_random": [3.0, 4, 1, 2], "auc_coarse": 2.0, "document": TWO})
    assert dense._gain(SWEEPS, "any") == "0.50 (-0.50 to 1.50, above zero for 50%)"


def test_how_near_circuits_come_to_the_frequencies_by_hand(given):
    """In each draw at the size that is best there, among those of which a path can be made."""
    prompts = DataFrame({"index": range(4), "document": TWO, "n_edges": [80, 90, 110, 120]})
    prompts.attrs["sweep"] = {"components": ["a0.h0", "r0.attn", "m0", "r0.mlp", "r1.attn"]}
    # one edge is nearest of all, but three are the fewest that lead anywhere
    distance = {0: [0.0, 0.1, 0.5, 0.6], 1: [0.0, 0.1, 0.5, 0.6], 2: [0.0, 0.6, 0.4, 0.6], 3: [0.0, 0.6, 0.6, 0.6]}
    rows = [(index, share, tv) for index, row in distance.items()
            for share, tv in zip((0.01, 0.03, 0.1, 1.0), row, strict=True)]  # fmt: skip
    given["norm prompts"] = prompts
    given["norm points"] = DataFrame(rows[::-1], columns=["index", "share", "unigram_tv"])
    share, nearer = phases._nearer(SWEEPS, "any", "wikitext")
    # by 0.5 and 0 at a share of 0.03, by 0.1 and 0.1 at 0.1
    assert (share, *nearer) == pytest.approx((0.03, 0.25, 0.1, 0.5))


def test_every_model_is_swept_for_every_question(tmp_path: Path):
    found = studies(1000)
    assert len({study.name for study in found}) == len(found)
    for model in TRAINED:
        kinds = {(study.corpus, study.kind) for study in found if study.model == model}
        both = {(corpus, kind) for corpus in CORPORA for kind in ("norm", "flow")}
        assert kinds == both | {("wikitext", "nested"), ("wikitext", "tight")}
    assert all(study.limit >= 1000 for study in found if study.kind == "norm")
    assert all(study.limit % len(LENGTHS) == 0 for study in found if study.kind == "nested")
    places = Places(tmp_path, tmp_path, tmp_path)
    assert places.model("stories260K") is None and places.model("books-gpt2") == "books-gpt2"
    with pytest.raises(ValueError, match="`--data` must hold wikitext2"):
        places.text("wikitext")
    assert (ROOT / "studies" / "page.md").is_file()


N = 120


def nested(seed: int, slope: float) -> DataFrame:
    """Contexts of several lengths for each target, whose log10 of size changes by `slope` per doubling."""
    own = np.random.default_rng(seed).normal(-1.5, 0.3, N // 4)
    place = np.arange(N) % 4
    table = planted(N, seed, density=lambda _, generator: own[np.arange(N) // 4] + slope * place)
    table["group"] = [f"t{number // 4}" for number in range(N)]
    table["id"] = [f"t{number // 4}:{LENGTHS[number % 4]}" for number in range(N)]
    table["document"] = table["group"]  # few documents have few patterns of signs
    table["n_tokens"] = np.array(LENGTHS)[place]
    return table


def test_what_has_all_components_in_half_of_the_contexts_is_at_its_ceiling_and_not_judged(tmp_path: Path):
    for model, (always, at_most) in {"books-gpt2": (90, 90), NULL: (48, 90)}.items():
        table = nested(0, -0.3)
        reached = [min(size for size, height in zip(*each, strict=True) if height >= 0.9)
                   for each in zip(table["sizes"], table["faithfulness"], strict=True)]  # fmt: skip
        # some enter with the first edge, some at 90% faithfulness, some never
        last = [1 if row < always else size if row < at_most else N_EDGES + 1 for row, size in enumerate(reached)]
        table["entered"] = [[1] * 19 + [each] for each in last]
        write_sweep(tmp_path / f"{model}-wikitext-nested", table)
    (tmp_path / "books-gpt2-wikitext-norm").mkdir()
    found = FINDINGS["e"](Sweeps(tmp_path, n_draws=20))
    head, _, *rows = ([cell.strip() for cell in line.split("|")] for line in found.table.splitlines())
    said = [row[head.index("component share")].partition(", at its ceiling in ")[2] for row in rows]
    assert said == ["75%"] * 3 + ["", "", "75%"]
    assert "component share" not in found.verdict.partition(";")[0]


def planted_sweeps(folder: Path, *, rarity: float, shared: float, slope: float) -> Sweeps:
    """Sweeps of all models, in which density is what rarity, what all models share, and length make of it."""
    common = np.random.default_rng(99).normal(0, 1, N)

    def of(rarity: float, shared: float, shift: float = 0.0) -> Any:
        def density(covariates: Any, generator: np.random.Generator) -> np.ndarray:
            rare = covariates["rarity_target"] - covariates["rarity_target"].mean()
            return -1.6 + shift + rarity * rare + shared * common + generator.normal(0, 0.15, N)

        return density

    for number, model in enumerate((*TRAINED, NULL)):
        cause = of(rarity, shared) if model != NULL else of(0, 0)
        kinds = {"wikitext-norm": 0, "wikitext-flow": 0, "books-norm": 9, "books-flow": 9, "wikitext-tight": 0}
        for kind, text_seed in kinds.items():
            seed = 10 * number + (text_seed if text_seed else 0)
            shape = curve
            if rarity and kind.endswith("norm"):
                shape = straight if model == NULL else bent
            table = planted(N, seed, density=cause, text_seed=text_seed, shape=shape)
            write_sweep(folder / f"{model}-{kind}", table, shallow=bool(rarity))
        write_sweep(folder / f"{model}-wikitext-nested", nested(number, slope if model != NULL else 0.0))
    for step in range(3):
        cause = of(0.0, 0.4, 0.5 * (step == 2))
        write_sweep(folder / "steps" / f"step-{step}", planted(N, 50 + step, density=cause))
    return Sweeps(folder, n_draws=200)


@pytest.fixture(scope="module", params=[True, False], ids=["planted", "nothing"])
def answers(request, tmp_path_factory) -> tuple[bool, dict[str, Finding]]:
    """What is found where everything was planted, and where nothing was."""
    folder = tmp_path_factory.mktemp("sweeps")
    causes = {"rarity": 0.5, "shared": 0.8, "slope": -0.3}
    sweeps = planted_sweeps(folder, **{name: cause * request.param for name, cause in causes.items()})
    assert sweeps.trained == list(TRAINED)
    return request.param, {letter: of(sweeps) for letter, of in FINDINGS.items()}


def test_verdicts_are_those_of_what_was_planted(answers):
    planted_there, found = answers
    verdicts = {letter: each.verdict for letter, each in found.items()}
    # 10 ** (-1.6 + log(9) / 1.5) of all edges are 72%; where curves are bent, 10 ** (-2.6 / 2) are 5%
    assert verdicts["a"] == (
        f"It depends: published sparse; tight (of {N} contexts) dense"
        if planted_there
        else f"Reproduced: published dense; tight (of {N} contexts) dense"
    )
    assert verdicts["g"] == "The area, from checkpoint to checkpoint: no clear change, up"
    control = {letter: each.details.partition("* with shuffled weights as well: ")[2] for letter, each in found.items()}
    if planted_there:
        assert verdicts["b"] == verdicts["f"] == "Reproduced"
        assert control["b"] == "sizes differ at 0.5, sizes differ at 0.8, beyond noise by halves"
        # the planted points of all models are shallow
        assert control["f"] == "small circuits nearer to the frequencies"
        assert verdicts["c"].startswith("Reproduced; ")
        assert verdicts["d"] == (
            "It depends: everywhere rarity of the target, rarity of the target given entropy; nowhere rarity of the "
            "prediction, rarity of the prediction given entropy, expected rarity, expected rarity given entropy"
        )
        # of twenty components that enter anywhere, few are in small circuits: chance says in how many of the sweeps
        fall = "fraction, size, per token, later fraction, area, area of one edge or more"
        assert re.match(rf"It depends: everywhere {fall}(; all of it |$)", verdicts["e"])
        assert re.match(rf"\* yes: {fall}\n\* (yes, but for [^:;]+|in \d of 9): component share\n", found["e"].details)
        assert control["e"] == "per token"
    else:
        assert verdicts["d"] == verdicts["f"] == "Not reproduced"
        assert verdicts["c"].startswith("Not reproduced; ")
        # what stays as it is, is less per token
        assert verdicts["e"] == (
            "It depends: everywhere per token; nowhere fraction, size, component share, later fraction, area, area of "
            "one edge or more"
        )
        # sizes of contexts are a normal's, of deviation 0.15 in log10, and both scorings find the same
        noise = "beyond noise by halves, beyond noise by another scoring"
        assert verdicts["b"] == (
            f"It depends: everywhere {noise}; nowhere sizes differ at 0.5, sizes differ at 0.8, sizes differ at 0.9"
        )
        assert control["b"] == noise and control["e"] == "per token"


def test_tables_have_a_row_for_each_sweep_and_no_unknown_number(answers):
    _, found = answers
    rows = {letter: each.table.splitlines()[2:] for letter, each in found.items()}
    assert [len(rows[letter]) for letter in "abcdefg"] == [11, 8, 12, 16, 12, 8, 3]
    assert len(found["e"].also["areas"].splitlines()) == 2 + 4
    for each in found.values():
        assert "nan" not in each.table.lower() and all(len(figure.data) for figure in each.figures.values())
        assert all(line.count("|") == each.table.splitlines()[0].count("|") for line in each.table.splitlines())


def test_the_page_asks_for_what_is_found(answers, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(go.Figure, "write_image", lambda self, path, **_: Path(path).write_bytes(b""))
    about = {"contexts": 1, "sweeps": 2, "prompts": 3, "tokens": 4, "took": "long", "stories": ""}
    images = tmp_path / "docs" / "images"
    draw(answers[1], images)
    page = written(answers[1], about)
    assert "$" not in page and "long" in page
    shown = set(re.findall(r"\(images/(finding[^)]+)\)", page))
    assert shown == {path.name for path in images.iterdir()}
    for each in answers[1].values():
        assert each.verdict in page and each.details in page and each.table in page
