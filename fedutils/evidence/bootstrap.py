"""The bootstrap over patients: AUROC and average precision in every resample."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..base.rng import generator
from ..base.scores import both_classes, labelled
from .tables import METRICS

# Resamples handled at once: bounds memory, whatever their number, and suits the cache.
RESAMPLES_AT_ONCE = 100
SEGMENTS = 256  # of scores, at most, in which resamples are counted


class Resamples(NamedTuple):
    """How often each patient counts in each resample, the same for all models and subgroups.

    `owner` (n,) numbers the patient of each film; `times` (patients, 1 + repeats) says how often
    each patient counts. Column 0 is the test set as it is: every patient once.
    """

    owner: np.ndarray
    times: np.ndarray


def patient_resamples(patients: np.ndarray, repeats: int, seed: int) -> Resamples:
    """Draw how often each patient counts in each bootstrap resample.

    `patients` (n,) holds one id a film. Whole patients are drawn, and all films of a patient come
    along: films of one patient are not independent (Field and Welsh 2007, "Bootstrapping clustered
    data"). Each counts as often as a Poisson variable of mean 1 says, drawn from the seed and the
    patient's id alone (Chamandy et al. 2012, "Estimating uncertainty for massive data streams"), so
    that hospitals which share nothing draw as one place with all films does. No film: ValueError.
    """
    ids, owner = np.unique(np.asarray(patients), return_inverse=True)
    if not len(ids):
        raise ValueError("no patients to resample: the test set holds no film")
    # Counts of films stay far below 2**24, so that sums of them are exact in float32.
    times = np.ones((len(ids), 1 + repeats), np.float32)
    for row, patient in zip(times, ids, strict=True):
        row[1:] = generator(seed, "bootstrap", client=str(patient)).poisson(1, repeats)
    return Resamples(owner, times)


def join_scores(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Number the segments that scores are counted in, from the films at each: (scores,) all three.

    Scores fall. Stretches without any positive are one segment, since nothing changes within them;
    so are those without a film. Where more than SEGMENTS are left, neighbours are joined that hold
    together at most 2 / SEGMENTS of the positives and of the negatives.
    """
    first = positive + negative > 0
    mixed = positive[first] > 0
    first[first] = mixed | np.r_[True, mixed[:-1]]
    segment = (np.cumsum(first) - 1).clip(0)
    if segment[-1] >= SEGMENTS:
        whole = sum(part / max(part.sum(), 1) for part in (positive, negative))
        share = np.bincount(segment, whole)
        middle = share.cumsum() - share / 2
        segment = np.unique(middle * (SEGMENTS / 2) // 1, return_inverse=True)[1][segment]
    return segment


def count_segments(
    segment: np.ndarray, owner: np.ndarray, positive: np.ndarray, resamples: Resamples
) -> Iterator[list[np.ndarray]]:
    """Count films (n,) with and without a finding by segment: (segments, some resamples) each.

    `segment` (n,) and `owner` (n,) number each film's segment and patient. Resamples come some at a
    time, in their order; the last segment is the highest that any film has.
    """
    from scipy.sparse import csr_matrix  # only here: it takes a third of a second

    shape = (segment.max(initial=-1) + 1, len(resamples.times))
    classes = [positive.astype(np.float32), (1 - positive).astype(np.float32)]
    counts = [csr_matrix((weight, (segment, owner)), shape) for weight in classes]
    for count in counts:
        count.eliminate_zeros()
    for start in range(0, resamples.times.shape[1], RESAMPLES_AT_ONCE):
        times = resamples.times[:, start : start + RESAMPLES_AT_ONCE]
        yield [count @ times for count in counts]


def areas(positive: np.ndarray, negative: np.ndarray, wanted: Sequence[str]) -> np.ndarray:
    """AUROC, and average precision if wanted, of films by segment (segments, repeats)."""
    above, false = positive.cumsum(axis=0), negative.cumsum(axis=0)
    pairs = above[-1].astype(float) * false[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        below = np.einsum("sr,sr->r", above - positive / 2, negative, dtype=float)
        found = [below / pairs]
        if "average_precision" in wanted:
            mixed = positive.any(axis=1)
            share = above[mixed] / np.maximum(above[mixed] + false[mixed], 1, dtype=float)
            total = np.where(pairs > 0, above[-1], np.nan)
            found.append(np.einsum("sr,sr->r", share, positive[mixed], dtype=float) / total)
    return np.array(found)


def bootstrap(
    truth: np.ndarray,
    score: np.ndarray,
    resamples: Resamples,
    films: np.ndarray | None = None,
    wanted: Sequence[str] = METRICS,
) -> np.ndarray:
    """AUROC and average precision of one finding in every resample: (len(wanted), 1 + repeats).

    `truth` and `score` (n,) as in `auroc`. Column 0 is the value on the films themselves. Equal to
    scikit-learn's with the number of draws as sample weights, but scores are sorted only once, and
    films counted by a sparse product; of more than SEGMENTS segments, deviations from the value
    are those of joined ones. NaN in a resample that lacks a positive or a negative. Two models
    given the same resamples are compared on the same patients; `films` (n,) is a mask that keeps
    a part of the test set. Raises ValueError as `auroc` does.
    """
    films = np.ones(len(truth), dtype=bool) if films is None else films
    films = np.flatnonzero(films & ~np.isnan(np.asarray(truth, dtype=float)))
    truth, score = labelled(np.asarray(truth)[films], np.asarray(score)[films])
    if not both_classes(truth):
        return np.full((len(wanted), resamples.times.shape[1]), np.nan)
    place = np.unique(-score, return_inverse=True)[1]
    whole = [np.bincount(place, weight) for weight in (truth, 1 - truth)]
    segment = join_scores(*whole)[place]
    counted = count_segments(segment, resamples.owner[films], truth, resamples)
    draws = np.concatenate([areas(*part, wanted) for part in counted], axis=1)
    return around(areas(*(part[:, None] for part in whole), wanted), draws)


def around(value: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Move draws (metrics, 1 + repeats) so that the first, of joined scores, is the value."""
    return draws + (value - draws[:, :1])


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
