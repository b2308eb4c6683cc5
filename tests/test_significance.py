"""The paired test against scipy and a table worked out by hand, and what has no test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ppc.significance import PairedTest, against_baseline, holm, paired, rule

BASE = {0: 0.40, 1: 0.42, 2: 0.47}


def test_a_table_by_hand() -> None:
    # differences 1, 2, 3: mean 2, deviation 1, t = 2 / (1 / sqrt 3) = 3.4641; for two degrees of freedom
    # p = 1 - t / sqrt(t^2 + 2) = 1 - 3.4641 / sqrt 14 = 0.0742
    test = paired({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert test.t == pytest.approx(2 * math.sqrt(3)) and test.p == pytest.approx(1 - 2 * math.sqrt(3) / math.sqrt(14))
    # 0.01 x 4, 0.02 x 3, 0.03 x 2 which is not above 0.06, 0.5 x 1
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("seeds", [3, 5, 20])
def test_as_scipy(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    base = rng.normal(0.5, 0.02, seeds)
    tables = {name: base + rng.normal(shift, 0.01, seeds) for name, shift in (("a", 0.0), ("b", 0.03), ("c", -0.01))}
    values = {name: dict(enumerate(map(float, row))) for name, row in {"base": base, **tables}.items()}
    tests = against_baseline(values, "base")
    expected = [stats.ttest_rel(row, base) for row in tables.values()]
    assert list(tests) == list(tables)
    for test, by_scipy, p_holm in zip(tests.values(), expected, holm([e.pvalue for e in expected]), strict=True):
        assert (test.t, test.p) == pytest.approx((by_scipy.statistic, by_scipy.pvalue), rel=1e-9)
        assert test.p_holm == pytest.approx(p_holm, rel=1e-9) and test.pairs == seeds


@pytest.mark.parametrize(
    ("p_holm", "stars"), [(0.05, ""), (0.0499, "*"), (0.01, "*"), (0.0099, "**"), (0.001, "**"), (1e-9, "***")]
)
def test_stars_are_below_their_bound(p_holm: float, stars: str) -> None:
    assert PairedTest(3, 1.0, p_holm / 2, p_holm).stars == stars


@pytest.mark.parametrize(
    ("values", "pairs", "why"),
    [
        ({0: 0.5, 1: 0.52}, 2, "2 shared seed(s), a test needs 3"),
        ({0: 0.5, 7: 0.52, 8: 0.6, 9: 0.7}, 1, "1 shared seed(s)"),
        ({0: 0.5, 1: 0.52, 2: math.nan}, 2, "2 shared seed(s)"),
        ({}, 0, "0 shared seed(s)"),
        (dict(BASE), 3, "all differences are 0"),
        ({seed: value + 0.1 for seed, value in BASE.items()}, 3, "all differences are equal"),
    ],
)
def test_what_has_no_test_says_why(values: dict[int, float], pairs: int, why: str) -> None:
    test = paired(values, BASE)
    assert (test.pairs, test.p, test.stars) == (pairs, None, "") and why in str(test.why_not)


def test_only_tests_that_were_made_are_corrected_for() -> None:
    better = {seed: value + 0.05 + 0.001 * seed for seed, value in BASE.items()}
    tests = against_baseline({"base": BASE, "a": better, "few": {0: 0.1}, "again": better}, "base", {"again": "a"})
    assert tests["a"].p_holm == tests["a"].p and tests["a"].stars == "***"
    assert tests["again"].p is None and tests["again"].why_not == "its trials are those of a"
    words = rule(tests)
    assert "over 1 test(s)" in words[0]
    assert words[2] == "No test, hence no star, for few: 1 shared seed(s), a test needs 3."
    assert rule(against_baseline({"base": BASE, "few": {0: 0.1}}, "base"))[0].startswith(
        "No test, hence no star, for any variant: 1 shared"
    )
    assert rule({}) == []
    with pytest.raises(ValueError, match="baseline 'b' is not among"):
        against_baseline({"a": {}}, "b")


@pytest.mark.parametrize(("pairs", "warned"), [(3, True), (5, True), (6, False)])
def test_a_star_of_few_seeds_asks_for_fresh_ones(pairs: int, warned: bool) -> None:
    base = {seed: 0.4 + 0.01 * seed for seed in range(pairs)}
    starred = {seed: value + 0.05 + 0.001 * (seed % 2) for seed, value in base.items()}
    unclear = {seed: value + 0.05 * (-1) ** seed for seed, value in base.items()}
    tests = against_baseline({"base": base, "starred": starred, "unclear": unclear}, "base")
    assert tests["starred"].stars and not tests["unclear"].stars
    said = [line for line in rule(tests) if "seeds that were not looked at before" in line]
    assert len(said) == warned and all("Fewer than 6 pairs: starred." in line for line in said)
