"""Intervals that hold with few positive patients, and with few training seeds."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from .tables import LEAST_PATIENTS

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
PRIOR = 3  # patients that the model of an AUROC's variance counts for, beside the positive ones
GRID = np.r_[np.linspace(1e-4, 0.9, 1800, endpoint=False), 1 - np.geomspace(0.1, 1e-7, 4000)]


def auroc_interval(
    value: float, variance: float, positive: int, negative: int
) -> tuple[float, float]:
    """Score interval (95 %) of an AUROC, of which `positive` and `negative` count the patients.

    `variance` is that over patients, such as the bootstrap's. A percentile or Wald interval is too
    short with few positives, since near 1 the variance vanishes with its estimate. Here the ends
    are the AUROCs from which `value` lies 1.96 of *their* standard errors away (Newcombe, Stat.
    Med. 2006, method 5), by the variance of Hanley and McNeil (1982) with patients as units,
    times how much `variance` differs from it, which counts `positive` patients against PRIOR.
    NaN without a value.
    """
    if np.isnan(value):
        return np.nan, np.nan
    inside = float(np.clip(value, GRID[0], GRID[-1]))
    corrected = variance * positive / max(1, positive - 1)
    seen = corrected / hanley_mcneil(inside, positive, negative)
    scale = (positive * seen + PRIOR) / (positive + PRIOR)
    reach = Z * np.sqrt(scale * hanley_mcneil(GRID, positive, negative))
    held = GRID[np.abs(GRID - inside) <= reach]
    low, high = (held[0], held[-1]) if len(held) else (inside, inside)
    return float(min(low, value)), float(max(high, value))


def mean_auroc_interval(value: float, variance: float, fewest: int) -> tuple[float, float]:
    """Interval (95 %) of a mean AUROC on the scale of its logit, on which it is symmetric.

    `variance` is the bootstrap's over patients; `fewest` counts the positive patients of that
    finding of the mean that has fewest. NaN without a value, nothing wider than the value at 1.
    """
    inside = np.clip(value, GRID[0], GRID[-1])
    error = np.sqrt(variance * fewest / max(1, fewest - 1)) / (inside * (1 - inside))
    middle = np.log(inside / (1 - inside))
    low, high = 1 / (1 + np.exp(-(middle + np.array([-Z, Z]) * error)))
    return float(min(low, value)), float(max(high, value))


def hanley_mcneil(auroc: ArrayLike, positive: int, negative: int) -> np.ndarray:
    """Return the variance of an AUROC of so many independent films of each kind (their Q1, Q2)."""
    area, half = np.asarray(auroc, dtype=float), (positive + negative) / 2 - 1
    pairs = 1 + half * (1 - area) / (2 - area) + half * area / (1 + area)
    return area * (1 - area) * pairs / (positive * negative)


def cluster_sums(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Return what intervals over patients want of values (n,) by film: sums, of 6 numbers.

    Patients, films, values, and over patients the squares of their values, of their films, and the
    products of both; `owners` (n,) names each film's patient. Sums over hospitals add up.
    """
    patients, place = np.unique(owners, return_inverse=True)
    own, films = np.bincount(place, values, len(patients)), np.bincount(place)
    return np.array([len(patients), len(values), own.sum(), own @ own, films @ films, own @ films])


def cluster_mean(sums: np.ndarray) -> tuple[float, float, int]:
    """Return of `cluster_sums` the mean by film, its variance over patients, and their number.

    The variance is that of a ratio of sums over patients, linearised (Liang and Zeger 1986); NaN
    with fewer than two.
    """
    patients, films, total, values, squares, products = map(float, sums)
    mean = total / films if films else np.nan
    if patients < 2:
        return mean, np.nan, int(patients)
    apart = max(values - 2 * mean * products + mean**2 * squares, 0.0)
    return mean, apart / films**2 * patients / (patients - 1), int(patients)


def share_interval(hits: np.ndarray, owners: np.ndarray) -> tuple[float, float]:
    """Return `share_ends` of hits (n,), 0 or 1 by film; `owners` (n,) names each film's patient."""
    return share_ends(cluster_sums(np.asarray(hits, dtype=float), owners))


def share_ends(sums: np.ndarray) -> tuple[float, float]:
    """Wilson's interval (95 %, 1927) of a share, over patients; NaN with few.

    `sums` are `cluster_sums` of hits, 0 or 1 by film. It counts patients, times how much their
    variance (`cluster_mean`) is below that of one film a patient, shrunk as in `auroc_interval`:
    a share of 1 gets an interval, too.
    """
    share, variance, patients = cluster_mean(sums)
    if patients < LEAST_PATIENTS:
        return np.nan, np.nan
    alone = share * (1 - share) / patients
    seen = variance / alone if alone else 1.0
    count = patients / ((patients * seen + PRIOR) / (patients + PRIOR))
    middle, whole = share + Z**2 / (2 * count), 1 + Z**2 / count
    half = Z * np.sqrt(share * (1 - share) / count + (Z / count) ** 2 / 4)
    return float((middle - half) / whole), float((middle + half) / whole)


def seed_variance(by_seed: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the variance of the mean over seeds (seeds, ...), and its degrees of freedom."""
    count = len(by_seed)
    if count < 2:
        return np.full(by_seed.shape[1:], np.nan), 0
    return by_seed.var(axis=0, ddof=1) / count, count - 1


def difference_interval(
    value: np.ndarray, patients: np.ndarray, seeds: list[tuple[np.ndarray, int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ends of the interval (95 %) of differences, and their two-sided p.

    `patients` is their variance over patients, `seeds` that of each side over training seeds, with
    its degrees of freedom, as from `seed_variance`. See `reach_of`; p is 1e-12 at least. NaN where
    a side has one seed: then nothing is known of how another would have ended.
    """
    reach = reach_of(1 - LEVEL, patients, seeds)
    low, high = np.full_like(reach, -12.0), np.zeros_like(reach)  # of log10 p
    for _ in range(50):
        middle = (low + high) / 2
        inside = np.abs(value) < reach_of(10**middle, patients, seeds)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    p = np.where(np.isnan(reach), np.nan, 10**high)
    return value - reach, value + reach, np.where((reach == 0) & (value == 0), 1, p)


def reach_of(
    p: ArrayLike, patients: ArrayLike, seeds: Sequence[tuple[ArrayLike, int]]
) -> np.ndarray:
    """Return how far a difference must lie from 0 for this two-sided p.

    Patients and seeds have each their own quantile, normal and t, and the two reaches add as
    squares do (Howe 1974), so that a variance of few seeds that came out small by luck narrows
    nothing else. Seeds have Satterthwaite's degrees of freedom (1946), or where the sides are not
    alike those of the smaller. Arguments as in `difference_interval`.
    """
    from scipy.stats import norm, t

    (one, of_one), (two, of_two) = seeds
    spread = np.asarray(one + two)
    with np.errstate(divide="ignore", invalid="ignore"):
        alike = spread**2 / (one**2 + two**2) * of_one
    freedom = alike if of_one == of_two else np.full_like(alike, min(of_one, of_two))
    freedom = np.where(spread == 0, 1, freedom)
    half = np.asarray(p) / 2
    return np.sqrt(norm.isf(half) ** 2 * patients + t.isf(half, freedom) ** 2 * spread)


def detectable(patients: float, one_seed: float, count: int) -> float:
    """Return the difference that is shown in 80 % of all repetitions with `count` seeds a side.

    `patients` is the variance over patients, `one_seed` that of a single training on either side.
    The power is averaged over how the variance of the seeds may come out, by its chi square.
    """
    from scipy.optimize import brentq
    from scipy.stats import chi2, norm

    error = np.sqrt(patients + 2 * one_seed / count)
    if not error > 0:
        return float(error)
    seen = one_seed / count * chi2.ppf((np.arange(20) + 0.5) / 20, count - 1) / (count - 1)
    sides = [(side, count - 1) for side in np.meshgrid(seen, seen)]
    reach = reach_of(1 - LEVEL, patients, sides)
    return brentq(lambda d: norm.cdf((d - reach) / error).mean() - 0.8, 0, reach.max() + 9 * error)
