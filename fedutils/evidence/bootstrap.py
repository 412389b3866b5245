"""The bootstrap over patients: AUROC and average precision in every resample."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..base.rng import generator
from ..base.scores import both_classes, labelled
from .tables import METRICS

# Resamples handled at once: bounds memory, whatever their number, and suits the cache.
RESAMPLES_AT_ONCE = 100


class Resamples(NamedTuple):
    """Patients drawn with replacement, the same for all models, findings and subgroups.

    `owner` (n,) numbers the patient of each film; `times` (patients, 1 + repeats) says how often
    each patient was drawn. Column 0 is the test set as it is: every patient once.
    """

    owner: np.ndarray
    times: np.ndarray


def patient_resamples(patients: np.ndarray, repeats: int, seed: int) -> Resamples:
    """Draw the patients of each bootstrap resample.

    `patients` (n,) holds one id a film. Whole patients are drawn with replacement, as many as
    there are, and all films of a drawn patient come along: films of one patient are not
    independent (Field and Welsh 2007, "Bootstrapping clustered data"). No film: ValueError.
    """
    ids, owner = np.unique(np.asarray(patients), return_inverse=True)
    if not len(ids):
        raise ValueError("no patients to resample: the test set holds no film")
    draw = generator(seed, "bootstrap").multinomial
    times = draw(len(ids), np.full(len(ids), 1 / len(ids)), size=repeats)
    # Counts of films stay far below 2**24, so that sums of them are exact in float32.
    return Resamples(owner, np.vstack([np.ones_like(times[:1]), times]).T.astype(np.float32))


def _segments(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Films by falling score, and the number (n,) of each one's segment, so that areas stay exact.

    A segment ends only between different scores, so ties stay whole; stretches without any
    positive are one segment, since nothing changes within them.
    """
    order = np.argsort(-score, kind="stable")
    first = np.r_[True, np.diff(score[order]) != 0]
    mixed = np.bincount(np.cumsum(first) - 1, weights=truth[order]) > 0
    first[first] = mixed | np.r_[True, mixed[:-1]]
    return order, np.cumsum(first) - 1


def _areas(positive: np.ndarray, negative: np.ndarray, wanted: Sequence[str]) -> np.ndarray:
    """AUROC, and average precision if wanted, of films by segment (segments, repeats)."""
    above, false = positive.cumsum(axis=0), negative.cumsum(axis=0)
    pairs = above[-1].astype(float) * false[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        below = np.einsum("sr,sr->r", above - positive / 2, negative, dtype=float)
        areas = [below / pairs]
        if "average_precision" in wanted:
            mixed = positive.any(axis=1)
            share = above[mixed] / np.maximum(above[mixed] + false[mixed], 1, dtype=float)
            total = np.where(pairs > 0, above[-1], np.nan)
            areas.append(np.einsum("sr,sr->r", share, positive[mixed], dtype=float) / total)
    return np.array(areas)


def bootstrap(
    truth: np.ndarray,
    score: np.ndarray,
    resamples: Resamples,
    films: np.ndarray | None = None,
    wanted: Sequence[str] = METRICS,
) -> np.ndarray:
    """AUROC and average precision of one finding in every resample: (len(wanted), 1 + repeats).

    `truth` and `score` (n,) as in `auroc`. Column 0 is the value on the films themselves. Equal to
    scikit-learn's with the number of draws as sample weights, but films are sorted only once, and
    counted by a sparse product. NaN in a resample that lacks a positive or a negative. Two models
    given the same resamples are compared on the same patients; `films` (n,) is a mask that keeps
    a part of the test set. Raises ValueError as `auroc` does.
    """
    from scipy.sparse import csr_matrix  # only here: it takes a third of a second

    films = np.ones(len(truth), dtype=bool) if films is None else films
    films = np.flatnonzero(films & ~np.isnan(np.asarray(truth, dtype=float)))
    truth, score = labelled(np.asarray(truth)[films], np.asarray(score)[films])
    repeats = resamples.times.shape[1]
    if not both_classes(truth):
        return np.full((len(wanted), repeats), np.nan)
    order, segment = _segments(truth, score)
    owner, truth = resamples.owner[films[order]], truth[order]
    shape = (segment[-1] + 1, len(resamples.times))
    classes = [truth.astype(np.float32), (1 - truth).astype(np.float32)]
    counts = [csr_matrix((weight, (segment, owner)), shape) for weight in classes]
    for count in counts:
        count.eliminate_zeros()
    areas = []
    for start in range(0, repeats, RESAMPLES_AT_ONCE):
        times = resamples.times[:, start : start + RESAMPLES_AT_ONCE]
        areas.append(_areas(*(count @ times for count in counts), wanted))
    return np.concatenate(areas, axis=1)


def interval(resampled: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap values (repeats,) (Efron and Tibshirani 1993, ch. 13).

    Undefined resamples (NaN) are left out; where they are the majority, the interval is NaN.
    """
    if np.isnan(resampled).mean() > 0.5:
        return np.nan, np.nan
    low, high = np.nanpercentile(resampled, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def variance(draws: np.ndarray) -> np.ndarray:
    """Return the variance over patients of bootstrap draws (..., 1 + repeats); NaN without any."""
    return np.ma.filled(np.ma.masked_invalid(draws[..., 1:]).var(axis=-1), np.nan)
