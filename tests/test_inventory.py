"""What circuits of a corpus hold: shares by hand, recurrence against its null, and breaks that were planted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest

import tracedensity as td
from tracedensity.study.inventory import _filled, phases_of, recurrence_of
from tracedensity.study.statistics import resampled

NAMES = [f"c{number}" for number in range(12)]


def drawn(seed: int, n: int = 400) -> np.ndarray:
    """Which components each prompt has: as many as it likes, any of them."""
    generator = np.random.default_rng(seed)
    order = generator.random((n, len(NAMES))).argsort(1)
    return order < generator.integers(0, len(NAMES) + 1, n)[:, None]


def test_p_of_recurrence_is_uniform_where_components_are_drawn():
    p = [float(recurrence_of(drawn(seed), NAMES, 0, 0)[0]["p"][3]) for seed in range(200)]
    assert kstest(p, "uniform").pvalue > 0.01


def test_components_spread_beyond_their_null_in_five_of_a_hundred():
    wider = []
    for seed in range(200):
        table, null = recurrence_of(drawn(seed, 100), NAMES, 200, seed)
        wider.append(table["often"].var(ddof=0) > null)
    assert 2 <= sum(wider) <= 20  # of a binomial of 200 at 5%, with room


def test_a_component_that_always_comes_stands_out():
    present = drawn(0)
    present[:, 5] = True
    table, null = recurrence_of(present, NAMES, 200, 0)
    rows = table.set_index("component")
    assert rows["often"]["c5"] == 1 and rows["p_holm"]["c5"] < 1e-10
    assert rows["expected"]["c0"] == pytest.approx(present.mean())
    assert table["often"].var(ddof=0) > null


def test_p_of_recurrence_is_that_of_all_draws():
    present = np.array([[1, 0], [1, 0], [1, 1], [0, 0]], dtype=bool)
    table, _ = recurrence_of(present, ["a0", "a1"], 0, 0)
    # two prompts draw one of two components, one has both, one none: 1 + Binomial(2, 1/2); p doubles the smaller tail
    assert table["p"].tolist() == pytest.approx([2 * 0.25, 2 * 0.25])
    assert table["often"].tolist() == [0.75, 0.25]


def test_what_every_circuit_needs_says_nothing_of_other_kinds():
    """Skip connections that always come: drawn among all, they would make every head rare."""
    generator = np.random.default_rng(0)
    present = np.hstack([np.ones((300, 4), dtype=bool), generator.random((300, 6)).argsort(1) < 2])
    names = [*(f"r{number}" for number in range(4)), *(f"a{number}" for number in range(6))]
    table, null = recurrence_of(present, names, 200, 0)
    assert table["expected"].tolist() == pytest.approx([1.0] * 4 + [1 / 3] * 6)
    assert (table["p_holm"] > 0.05).all() and table["p"][:4].tolist() == [1.0] * 4
    assert table["often"].var(ddof=0) < null


@pytest.mark.parametrize("bend", [-3.0, -2.0, -1.0])
def test_a_planted_break_is_found_with_its_slopes(bend: float):
    x = np.linspace(-4.5, 0, 28)
    generator = np.random.default_rng(0)
    mean = 0.05 * (x + 4.5) + 0.4 * np.maximum(x - bend, 0)
    curves = mean + generator.normal(0, 0.02, (80, len(x)))
    found = phases_of(x, curves, [*resampled(np.arange(80) // 4, 100, 0)])
    assert found.break_at is not None
    step = x[1] - x[0]
    assert abs(np.log10(found.break_at) - bend) <= step
    assert found.low <= found.break_at <= found.high and found.found == 1
    assert found.slopes == pytest.approx((0.05, 0.45), abs=0.03) and found.gain > 10
    assert not found.at_edge and found.low < found.break_at < found.high  # known to half a step


def test_a_straight_curve_has_one_phase():
    x = np.linspace(-4.5, 0, 28)
    curves = 0.2 * (x + 4.5) + np.random.default_rng(0).normal(0, 0.02, (80, len(x)))
    found = phases_of(x, curves, [*resampled(np.arange(80), 50, 0)])
    assert found.break_at is None and found.gain == 0
    assert found.slopes == pytest.approx((0.2,), abs=0.02)


def test_what_was_not_run_is_filled_in_by_hand():
    nan = np.nan
    values = np.array([[0.0, nan, 1.0, nan], [nan, 0.2, nan, 0.8], [0.1, 0.2, 0.3, 0.4], [nan] * 4])
    sizes = np.array([[0.0, 5, 50, 500], [1, 10, 100, 1000], [0, 0, 1, 2], [1, 2, 3, 4]])
    filled = _filled(values, sizes)
    # none counts as half an edge, so that five are halfway to fifty; beyond what was run, the nearest that was
    np.testing.assert_allclose(filled[:3], [[0, 0.5, 1, 1], [0.2, 0.2, 0.5, 0.8], [0.1, 0.2, 0.3, 0.4]])
    assert np.isnan(filled[3]).all() and np.isnan(values[0, 1])


def prompts_of(n: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    return [
        {"prompt": generator.integers(1, 12, 5).tolist(), "document": f"d{number // 2}", "id": str(number)}
        for number in range(n)
    ]


@pytest.mark.parametrize("graph", ["token", "component"])
def test_shares_are_those_of_the_tables(graph: str, tiny_gpt2, tmp_path: Path):
    given: dict[str, Any] = {} if graph == "token" else {"method": "magnitude", "baselines": False}
    td.sweep(tiny_gpt2, prompts_of(6), tmp_path / "a", graph=graph, progress=False, **given)
    found = td.study.contents(tmp_path / "a", share=0.1, n_bootstrap=20, n_null=50)
    points: Any = td.read_sweep(tmp_path / "a", "points")
    prompts = td.read_sweep(tmp_path / "a")
    parts = {"token": ["heads", "MLPs", "skip connections"], "component": ["embedding", "heads", "MLPs"]}[graph]
    for _, row in found.by_size[found.by_size["share"] >= 0.1].iterrows():
        own = points[points["share"] == row["share"]]
        assert row["faithfulness"] == pytest.approx(own["faithfulness"].mean())
        for number, name in enumerate(parts):
            assert row[f"part={name}"] == pytest.approx(np.mean([each[number] / each.sum() for each in own["by_part"]]))
        assert row[[each for each in row.index if each.startswith("quarter=")]].sum() == pytest.approx(1)
    often = [np.mean([entered[number] <= 0.1 * n_edges for entered, n_edges in
                      zip(prompts["entered"], prompts["n_edges"], strict=True)])
             for number in range(len(found.recurrence))]  # fmt: skip
    assert found.recurrence["often"].tolist() == pytest.approx(often)
    assert found.spread == pytest.approx(np.var(often))
    assert found.recurrence["component"][0] == {"token": "a0.h0", "component": "input"}[graph]
    with pytest.raises(ValueError, match="`share` must be above 0"):
        td.study.contents(tmp_path / "a", share=0)
    with pytest.raises(ValueError, match="`n_null` must be at least 0, got -1"):
        td.study.contents(tmp_path / "a", n_null=-1)
    with pytest.raises(ValueError, match="`path` must be the folder of a sweep, got a DataFrame"):
        td.study.contents(prompts)
