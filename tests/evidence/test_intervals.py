"""Intervals cover what they say, and a difference that is none is seldom shown."""

import numpy as np
import pytest
from scipy.stats import norm

from fedutils.evidence.bootstrap import bootstrap, patient_resamples
from fedutils.evidence.intervals import (
    auroc_interval,
    detectable,
    difference_interval,
    mean_auroc_interval,
    seed_variance,
)


def films_of(rng, positive_patients, auroc, patients=120):
    """Draw labels, scores and patients: one to five films each, alike within a patient."""
    owner = np.repeat(np.arange(patients), rng.integers(1, 6, patients))
    first = np.r_[True, np.diff(owner) > 0]
    truth = (owner < positive_patients) & (first | (rng.random(len(owner)) < 0.7))
    noise = rng.standard_normal(patients)[owner] + rng.standard_normal(len(owner))
    return truth, noise / np.sqrt(2) + np.sqrt(2) * norm.ppf(auroc) * truth, owner


@pytest.mark.parametrize("auroc", (0.75, 0.9, 0.97))
@pytest.mark.parametrize("positive", (10, 20, 50))
def test_auroc_intervals_cover_and_miss_on_both_sides(positive, auroc):
    rng, below, above, times = np.random.default_rng(0), 0, 0, 400
    for _ in range(times):
        truth, score, owner = films_of(rng, positive, auroc)
        draws = bootstrap(truth, score, patient_resamples(owner, 200, 0), wanted=["auroc"])[0]
        negative = len(np.unique(owner[~truth]))
        low, high = auroc_interval(draws[0], np.nanvar(draws[1:]), positive, negative)
        assert low <= draws[0] <= high
        below, above = below + (high < auroc), above + (low > auroc)
    # 92 to 98 %, and four standard errors of this simulation's own.
    slack = 4 * np.sqrt(0.05 * 0.95 / times)
    assert 0.92 - slack <= 1 - (below + above) / times <= 0.98 + slack
    assert below and (above or (positive, auroc) == (10, 0.97))


RATIOS = [(0, 0), (0.5, 0.5), (1, 1), (2, 2), (6, 6), (2, 0.5), (4, 1), (1, 6), (6, 0)]


@pytest.mark.parametrize("ratios", RATIOS)
@pytest.mark.parametrize("seeds", [(2, 2), (3, 3), (5, 5), (2, 5), (2, 10), (3, 5)])
def test_under_the_null_at_most_seven_percent_are_shown(seeds, ratios):
    """Whatever the deviation of a seed on either side, in units of the patients' error."""
    rng, times = np.random.default_rng(1), 20_000
    sides = [r * rng.standard_normal((n, times)) for n, r in zip(seeds, ratios, strict=True)]
    value = rng.standard_normal(times) + sides[0].mean(axis=0) - sides[1].mean(axis=0)
    low, high, p = difference_interval(value, np.ones(times), [seed_variance(s) for s in sides])
    shown = (low > 0) | (high < 0)
    assert shown.mean() <= 0.07
    assert np.array_equal(shown, p < 0.05)
    if not any(ratios):
        assert shown.mean() > 0.04


@pytest.mark.parametrize("seeds", (3, 5))
def test_the_detectable_difference_is_shown_in_four_of_five_repetitions(seeds):
    rng, times, deviation = np.random.default_rng(2), 40_000, 2.0
    size = detectable(1.0, deviation**2, seeds)
    sides = deviation * rng.standard_normal((2, seeds, times))
    value = size + rng.standard_normal(times) + sides[0].mean(axis=0) - sides[1].mean(axis=0)
    low, _, _ = difference_interval(value, np.ones(times), [seed_variance(s) for s in sides])
    assert 0.72 < (low > 0).mean() < 0.88


def test_with_one_seed_nothing_is_known():
    one = [seed_variance(np.array([[0.8]])), seed_variance(np.array([[0.7], [0.71]]))]
    low, high, p = difference_interval(np.array([0.1]), np.array([1e-9]), one)
    assert np.isnan([low, high, p]).all()


@pytest.mark.parametrize(("auroc", "positive", "findings"), [(0.75, 12, 6), (0.97, 12, 6)])
def test_the_interval_of_a_mean_covers_and_misses_on_both_sides(auroc, positive, findings):
    rng, times, missed = np.random.default_rng(7), 200, np.zeros(2)
    for _ in range(times):
        films = [films_of(rng, positive, auroc) for _ in range(findings)]
        draws = [
            bootstrap(truth, score, patient_resamples(owner, 200, 0), wanted=["auroc"])[0]
            for truth, score, owner in films
        ]
        mean = np.mean(draws, axis=0)
        spread = sum(np.nanvar(one[1:]) for one in draws) / findings**2  # of other patients each
        low, high = mean_auroc_interval(mean[0], spread, positive)
        assert low <= mean[0] <= high
        missed += high < auroc, low > auroc
    slack = 4 * np.sqrt(0.05 * 0.95 / times)
    assert 0.92 - slack <= 1 - missed.sum() / times and missed.max() / times < 0.05 + slack
