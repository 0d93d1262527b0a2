"""Rank correlations against scipy and statsmodels, on data where the answer is known, and against nulls."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import kstest, rankdata, spearmanr
from statsmodels.stats.multitest import multipletests

from tracedensity.study.statistics import (
    Pair,
    Sample,
    exchanged,
    holm,
    p_of_signs,
    partial,
    rank_correlations,
    resampled,
    strata_of,
)

N = 120


def draw(seed: int, *names: str, n: int = N) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=n) for name in names}


def sample(n: int = N, per_document: int = 3, **options: int) -> Sample:
    document = np.arange(n) // per_document
    return Sample(document, {"": np.zeros(n, dtype=np.int64)}, **{"n_bootstrap": 100, "n_permutations": 200, **options})


@pytest.mark.parametrize("digits", [8, 0], ids=["no ties", "many ties"])
def test_plain_correlations_are_those_of_scipy(digits):
    columns = {name: values.round(digits) for name, values in draw(0, "x", "y").items()}
    columns["y"] = (columns["y"] + columns["x"]).round(digits)
    found = sample().correlations(columns, [Pair("x", "y")])[0]
    assert found.rho == pytest.approx(spearmanr(columns["x"], columns["y"]).statistic, abs=1e-12)


def test_partial_correlations_are_those_of_residuals_of_ranks():
    columns = draw(1, "x", "y", "a", "b")
    columns["y"] += columns["x"] + columns["a"] ** 3
    columns["x"] += columns["b"]
    found = sample().correlations(columns, [Pair("x", "y", ("a", "b"))])[0]
    ranked = {name: rankdata(values) for name, values in columns.items()}
    controls = sm.add_constant(np.stack([ranked["a"], ranked["b"]], axis=1))
    left = [sm.OLS(ranked[name], controls).fit().resid for name in "xy"]
    assert found.rho == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-10)


def test_a_constant_control_changes_nothing_and_a_constant_column_has_no_correlation():
    columns = {**draw(2, "x", "y", "z"), "k": np.ones(N)}
    asked = [Pair("x", "y", ("z",)), Pair("x", "y", ("z", "k")), Pair("k", "y"), Pair("x", "y", ("x",))]
    with_z, with_k, of_k, of_itself = sample().correlations(columns, asked)
    assert with_k == with_z
    assert np.isnan([of_k.rho, of_k.low, of_k.p, of_itself.rho, of_itself.p]).all()


def test_rows_in_which_something_is_unknown_are_left_out():
    columns = draw(3, "x", "y")
    columns["x"][:20] = np.nan
    found = sample().correlations(columns, [Pair("x", "y")])[0]
    assert found.n == N - 20
    assert found.rho == pytest.approx(spearmanr(columns["x"][20:], columns["y"][20:]).statistic)


def test_documents_are_resampled_whole():
    document = np.repeat(np.arange(5), [1, 2, 3, 4, 5])
    for rows in resampled(document, 20, seed=0):
        counts = np.bincount(rows, minlength=15)
        for number in range(5):
            assert len(set(counts[document == number])) == 1  # all rows of a document as often
        assert sum(counts[document == number][0] for number in range(5)) == 5


def test_intervals_of_clustered_rows_are_as_wide_as_those_of_their_documents():
    columns = draw(4, "x", "y", n=40)
    alone = Sample(np.arange(40), {"": np.zeros(40, dtype=np.int64)}, 400, 0).correlations(columns, [Pair("x", "y")])[0]
    repeated = {name: np.repeat(values, 10) for name, values in columns.items()}
    together = Sample(np.repeat(np.arange(40), 10), {"": np.zeros(400, dtype=np.int64)}, 400, 0)
    clustered = together.correlations(repeated, [Pair("x", "y")])[0]
    assert (clustered.low, clustered.high) == pytest.approx((alone.low, alone.high), abs=1e-9)


def test_one_document_says_nothing_of_others():
    found = sample(per_document=N).correlations(draw(5, "x", "y"), [Pair("x", "y")])[0]
    assert np.isnan(found.low) and np.isnan(found.high) and np.isfinite(found.p)


def test_rows_are_exchanged_within_strata_only():
    stratum = np.array([3, 1, 1, 3, 3, 2, 1])
    seen = np.concatenate([*exchanged(stratum, 300, seed=0)])
    assert (stratum[seen] == stratum).all()
    assert (np.sort(seen) == np.arange(7)).all()
    assert len(np.unique(seen, axis=0)) == 36  # 3! of each of two strata


@pytest.mark.parametrize("controls", [(), ("z",)], ids=["plain", "partial"])
def test_p_is_uniform_where_there_is_nothing(controls):
    found = []
    for seed in range(200):
        columns = draw(seed, "x", "y", "z", n=30)
        columns["y"] += columns["z"] * bool(controls)
        columns["x"] += columns["z"] * bool(controls)
        options = {"n_bootstrap": 0, "n_permutations": 199, "seed": seed}
        found.append(sample(30, **options).correlations(columns, [Pair("x", "y", controls)])[0].p)
    assert kstest(found, "uniform").pvalue > 0.01


@pytest.mark.parametrize("strata", [1, 2])
def test_p_is_uniform_where_controls_are_many_and_rows_are_few(strata: int):
    """An exchanged residual is no longer free of controls: what they explain of it makes it shorter."""
    controls, found = tuple("abcdefgh"), []
    for seed in range(500):
        columns = draw(seed, "x", "y", *controls, n=18)
        own = Sample(np.arange(18), {"": np.arange(18) % strata}, 0, 199, seed)
        found.append(own.correlations(columns, [Pair("x", "y", controls)])[0].p)
    assert kstest(found, "uniform").pvalue > 0.01
    assert 0.03 < np.mean(np.array(found) <= 0.05) < 0.075


def test_what_depends_on_length_alone_is_no_finding_within_lengths():
    """Density that falls with length, and a covariate that grows with it but says nothing else."""
    raw, within = 0, 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        length = generator.integers(8, 13, size=100).astype(float)
        columns = {"x": length + generator.normal(size=100), "y": generator.lognormal(size=100) / length**2}
        strata = {"": strata_of(length), "none": np.zeros(100, dtype=np.int64)}
        kept, free = Sample(np.arange(100), strata, 0, 199, seed).correlations(
            columns, [Pair("x", "y"), Pair("x", "y", within="none")]
        )
        raw, within = raw + (free.p < 0.05), within + (kept.p < 0.05)
    assert raw > 50
    assert within <= 12  # 5 are expected; more than 12 would come in 2 of 1,000 such tests


def test_what_domains_differ_in_is_no_finding_within_domains():
    generator = np.random.default_rng(0)
    domain, length = np.repeat([0, 1], 100), generator.integers(8, 10, 200).astype(float)
    columns = {name: 3 * domain + generator.normal(size=200) for name in "xy"}
    stratum = strata_of(length, domain=domain)
    assert all(len({*domain[stratum == each]}) == 1 for each in np.unique(stratum)) and len(np.unique(stratum)) == 4
    both = Sample(np.arange(200), {"": stratum, "length": strata_of(length)}, 0, 199, 0)
    kept, raw = both.correlations(columns, [Pair("x", "y"), Pair("x", "y", within="length")])
    assert kept.p > 0.05 > raw.p


def test_p_of_signs_is_that_of_all_signs_and_of_no_number_is_none():
    by_document = np.array([1.0, 2.0, -0.5, 3.0])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1).T
    exact = (np.abs(signs @ by_document) >= by_document.sum()).mean()
    assert p_of_signs(by_document, 20_000, np.random.default_rng(0)) == pytest.approx(exact, abs=0.01)
    assert np.isnan(p_of_signs(np.array([1.0, -np.inf]), 100, np.random.default_rng(0)))


def test_what_strata_are_made_of_may_be_exchanged_over_all_of_them():
    generator = np.random.default_rng(0)
    length = generator.integers(8, 13, size=100).astype(float)
    columns = {"length": length, "y": length + generator.normal(size=100)}
    strata = {"": strata_of(length, least=2), "none": np.zeros(100, dtype=np.int64)}
    kept, free = Sample(np.arange(100), strata, 0, 199).correlations(
        columns, [Pair("length", "y"), Pair("length", "y", within="none")]
    )
    assert kept.p == 1
    assert free.p == pytest.approx(1 / 200)


def test_neighbouring_lengths_share_a_stratum_where_there_are_few_of_one():
    length = np.array([5.0] * 20 + [6.0] * 3 + [7.0] * 18 + [9.0] * 4)
    assert strata_of(length).tolist() == [0] * 20 + [1] * 25
    assert strata_of(np.array([4.0, 8.0])).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_holm_is_that_of_statsmodels(seed):
    p = np.random.default_rng(seed).random(20) ** 3
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])


def test_holm_by_hand():
    p = np.array([0.01, np.nan, 0.04, 0.03])
    # sorted 0.01, 0.03, 0.04 times 3, 2, 1, never falling
    np.testing.assert_allclose(holm(p), [0.03, np.nan, 0.06, 0.06])


def test_partial_from_a_stack_of_matrices_is_each_by_itself():
    stack = np.stack([rank_correlations(np.random.default_rng(seed).normal(size=(30, 4))) for seed in range(5)])
    np.testing.assert_allclose(partial(stack, 0, 1, 2, 3), [partial(each[None], 0, 1, 2, 3)[0] for each in stack])
