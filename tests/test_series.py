"""Density from sweep to sweep: changes that were planted, nulls, and the order of checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted import planted
from scipy.stats import kstest, spearmanr

import tracedensity as td
from training.train import kept_steps


def shifted(shift: float, seed: int, n: int = 80, text_seed: int = 0) -> pd.DataFrame:
    """Prompts of one text seed, which share what makes them dense, and noise of their own."""
    shared = np.random.default_rng(100).normal(-1.5, 0.4, n)
    return planted(
        n, seed, text_seed=text_seed, density=lambda _, generator: shared + shift + generator.normal(0, 0.1, n)
    )


def test_a_planted_change_is_found_and_paired_by_text():
    before, after = shifted(0, 1), shifted(0.3, 2).sample(frac=1, random_state=0)
    options: dict[str, Any] = {"outcome": "auc", "n_bootstrap": 200, "n_permutations": 500}
    found = td.study.trend({"a": before, "b": after}, **options).table.set_index("name")
    ours = after.set_index("text_hash").loc[before["text_hash"], "auc"].to_numpy() - before["auc"].to_numpy()
    row = found.loc["b"]
    assert row["change"] == pytest.approx(ours.mean()) and row["paired"] == 80
    assert 0 < row["change_low"] < row["change"] < row["change_high"] and row["p"] == pytest.approx(1 / 501)
    rho = spearmanr(before["auc"], after.set_index("text_hash").loc[before["text_hash"], "auc"]).statistic
    assert found.loc["a", "rho"] == pytest.approx(rho) and found.loc["b", "rho"] == pytest.approx(1)
    assert np.isnan(found.loc["a", "change"]) and found.loc["a", "mean"] == pytest.approx(before["auc"].mean())


def test_p_of_changes_is_uniform_where_nothing_changes():
    p = []
    for seed in range(200):
        tables = {"a": shifted(0, 2 * seed + 1, 40), "b": shifted(0, 2 * seed + 2, 40)}
        p.append(td.study.trend(tables, n_bootstrap=0, n_permutations=300, seed=seed).table["p"][1])
    assert kstest(p, "uniform").pvalue > 0.01


def test_changes_against_the_first_and_other_outcomes():
    tables = {name: shifted(shift, seed) for seed, (name, shift) in enumerate({"a": 0, "b": 0.2, "c": 0.2}.items())}
    few = {"n_bootstrap": 50, "n_permutations": 200}
    previous = td.study.trend(tables, outcome="size", threshold=0.5, **few).table["change"]
    first = td.study.trend(tables, outcome="size", threshold=0.5, against="first", **few).table["change"]
    assert first[1] == pytest.approx(previous[1]) and first[2] == pytest.approx(previous[1] + previous[2])
    assert first[1] > 0.1


def test_other_texts_are_compared_by_their_means():
    before, after = shifted(0, 1), shifted(0.3, 2, text_seed=9)
    row = td.study.trend({"a": before, "b": after}, outcome="auc", n_bootstrap=200, n_permutations=200).table.iloc[1]
    assert row["change"] == pytest.approx(after["auc"].mean() - before["auc"].mean())
    assert row["paired"] == 0 and np.isnan(row["p"]) and row["change_low"] < row["change"] < row["change_high"]


def test_checkpoints_are_models_in_the_order_of_their_steps(tmp_path: Path):
    for name in ("step-9", "step-10", "log", "step-100"):
        (tmp_path / name).mkdir()
        if name != "log":
            (tmp_path / name / "config.json").write_text("{}")
    assert [path.name for path in td.study.checkpoints(tmp_path)] == ["step-9", "step-10", "step-100"]
    with pytest.raises(ValueError, match=r"must be folders with a config\.json in"):
        td.study.checkpoints(tmp_path / "log")


def test_steps_that_are_kept_grow_fourfold():
    assert sorted(kept_steps(1024, 6)) == [0, 4, 16, 64, 256, 1024]
    assert kept_steps(100, 0) == set() and sorted(kept_steps(3, 3)) == [0, 1, 3]


def test_what_is_no_series_is_refused():
    with pytest.raises(ValueError, match="two or more sweeps"):
        td.study.trend({"a": shifted(0, 1)})
    with pytest.raises(ValueError, match="`against` must be one of"):
        td.study.trend({"a": shifted(0, 1), "b": shifted(0, 2)}, against="last")
    failed = shifted(0, 2)
    failed["error"] = "too long"
    with pytest.raises(ValueError, match="prompts with numbers, got none"):
        td.study.trend({"a": shifted(0, 1), "b": failed})
