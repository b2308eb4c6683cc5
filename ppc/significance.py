"""Whether a variant differs from the baseline by more than its seeds do: paired t-tests, corrected by Holm. Pure.

A pair is a seed that both have: the same order of samples and the same draws, so what they share cancels out. The test
is two-sided and asks whether the mean difference is 0. Several variants are several chances to be lucky, hence the
correction over all tests of a table (Holm 1979): it keeps the chance of one star too many below ALPHA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

FEWEST_PAIRS = 3  # with two there is one degree of freedom, and no star below t = 12.7
FEW_PAIRS = 6  # below it a star is a reason to run more seeds, not a finding: their spread may be small by chance
ALPHA = 0.05
STARS = ((0.001, "***"), (0.01, "**"), (ALPHA, "*"))
EQUAL = 1e-9  # of the values: differences that agree to this are rounding of one number, not evidence


@dataclass(frozen=True)
class PairedTest:
    """A variant against the baseline: p-values, or in words why there are none."""

    pairs: int
    t: float | None = None
    p: float | None = None
    p_holm: float | None = None  # corrected over all tests of the table
    why_not: str | None = None

    @property
    def stars(self) -> str:
        """`*` below 0.05, `**` below 0.01, `***` below 0.001, of the corrected p."""
        if self.p_holm is None:
            return ""
        return next((stars for below, stars in STARS if self.p_holm < below), "")


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> PairedTest:
    """The test of one variant over the seeds that both have; a value that is not finite is no value."""
    shared = [seed for seed in values if math.isfinite(values[seed]) and math.isfinite(reference.get(seed, math.nan))]
    differences = [values[seed] - reference[seed] for seed in sorted(shared)]
    pairs = len(differences)
    if pairs < FEWEST_PAIRS:
        return PairedTest(pairs, why_not=f"{pairs} shared seed(s), a test needs {FEWEST_PAIRS}")
    largest = max(max(abs(values[seed]), abs(reference[seed])) for seed in shared)
    spread = stdev(differences)
    if spread <= EQUAL * largest:
        same = "all differences are 0" if abs(fmean(differences)) <= EQUAL * largest else "all differences are equal"
        return PairedTest(pairs, why_not=f"{same}, which tells nothing of the noise")
    from scipy.special import stdtr  # slow to import, and only reports need it

    t = fmean(differences) / (spread / math.sqrt(pairs))
    return PairedTest(pairs, t, p=2 * float(stdtr(pairs - 1, -abs(t))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given: the smallest of m times m, the next times m - 1, never falling."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def against_baseline(
    values_by_variant: Mapping[str, Mapping[int, float]], baseline: str, same_as: Mapping[str, str] | None = None
) -> dict[str, PairedTest]:
    """The test of each variant of {variant: {seed: value}} but the baseline, corrected over those that could be made.

    `same_as` are variants whose trials are those of another: they are no evidence of their own and get no test.
    ValueError when the baseline is not among the variants.
    """
    if baseline not in values_by_variant:
        raise ValueError(f"the baseline '{baseline}' is not among the variants: {', '.join(values_by_variant)}")
    reference, twins = values_by_variant[baseline], same_as or {}
    tests = dict[str, PairedTest]()
    for variant, values in values_by_variant.items():
        if variant in twins:
            tests[variant] = PairedTest(len(values), why_not=f"its trials are those of {twins[variant]}")
        elif variant != baseline:
            tests[variant] = paired(values, reference)
    made = {variant: test.p for variant, test in tests.items() if test.p is not None}
    for variant, p_holm in zip(made, holm(list(made.values())), strict=True):
        test = tests[variant]
        tests[variant] = PairedTest(test.pairs, test.t, test.p, p_holm)
    tests.pop(baseline, None)
    return tests


def rule(tests: Mapping[str, PairedTest]) -> list[str]:
    """What a reader must know of the tests of a table, in sentences; none where there is nothing to test."""
    if not tests:
        return []
    made = [test for test in tests.values() if test.p is not None]
    words = []
    if made:
        words.append(
            f"p: two-sided paired t-test over the seeds shared with the baseline, Holm's correction over "
            f"{len(made)} test(s); * below 0.05, ** below 0.01, *** below 0.001."
        )
    few = [variant for variant, test in tests.items() if test.stars and test.pairs < FEW_PAIRS]
    if few:
        words.append(
            f"Fewer than {FEW_PAIRS} pairs: {', '.join(few)}. The differences of so few seeds can lie close together "
            "by chance, and then p is small: run these rows again with seeds that were not looked at before you rely "
            "on a star."
        )
    without = dict[str, list[str]]()
    for variant, test in tests.items():
        if test.why_not is not None:
            without.setdefault(test.why_not, []).append(variant)
    for why, variants in without.items():
        who = ", ".join(variants) if made or len(without) > 1 else "any variant"
        words.append(f"No test, hence no star, for {who}: {why}.")
    return words
