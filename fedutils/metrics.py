"""AUROC and average precision for 14 findings, with intervals from a bootstrap over patients.

A label may be missing (NaN): the film is then left out for that finding. A metric that is not
defined, for want of a positive or of a negative film, is NaN and keeps its row.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pandas as pd

from fedutils.findings import FINDINGS
from fedutils.rng import generator

MEAN = "mean"
ALL_FILMS, ONE_FILM = "all", "one film a patient"  # test sets beside the clients and the subgroups
SHOWN, NOT_SHOWN = "shown", "no difference shown"
LEAST_PATIENTS = 10  # with a positive film, for a finding to count in the mean
LEAST_POSITIVES = 30  # films of a subgroup, for anything to be concluded from it
METRICS = ("auroc", "average_precision")
# Resamples handled at once: bounds memory, whatever their number, and suits the cache.
CHUNK = 100

# Published mean AUROC over the 14 findings on NIH's official test split, with the 2017 labels.
# To be shown only beside results on that very split: random patient splits score higher.
YARDSTICKS_OFFICIAL: dict[str, float] = {
    "Wang 2017, ResNet-50": 0.745,  # ChestX-ray8, CVPR 2017
    "ResNet-18, full fine-tune": 0.789,  # public fine-tuning on the official lists
    "Baltruschat 2019, ResNet-38 + metadata": 0.806,  # Scientific Reports 9:6381
    "Guendel 2018, DenseNet-121": 0.807,  # location-aware DenseNet, CIARP 2018
    "Xiao 2023, masked autoencoder ViT-B": 0.830,  # Delving into Masked Autoencoders, WACV 2023
}


def _sklearn() -> ModuleType:
    """Import scikit-learn's metrics at the first use: with SciPy they take a second."""
    from sklearn import metrics

    return metrics


def _labelled(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep the films whose label is known; raise ValueError on other shapes, labels or scores."""
    truth, score = np.asarray(truth, dtype=float), np.asarray(score, dtype=float)
    if truth.ndim != 1 or truth.shape != score.shape:
        raise ValueError(f"truth {truth.shape} and score {score.shape} must be of one length")
    known = ~np.isnan(truth)
    if not np.isfinite(score[known]).all() or not np.isin(truth[known], (0, 1)).all():
        raise ValueError("labels must be 0, 1 or NaN, and scores finite")
    return truth[known], score[known]


def _defined(truth: np.ndarray) -> bool:
    """Whether there is a positive and a negative among known labels."""
    return bool(0 < truth.sum() < len(truth))


def auroc(truth: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve of one finding, ties counted half; NaN where not defined.

    `truth` (n,) holds 0, 1 or NaN (not labelled), `score` (n,) grows with suspicion.
    Raises ValueError on unequal lengths, other labels or scores that are not finite.
    """
    truth, score = _labelled(truth, score)
    return float(_sklearn().roc_auc_score(truth, score)) if _defined(truth) else np.nan


def average_precision(truth: np.ndarray, score: np.ndarray) -> float:
    """Area under the stepwise precision-recall curve of one finding; arguments as in `auroc`."""
    truth, score = _labelled(truth, score)
    return float(_sklearn().average_precision_score(truth, score)) if _defined(truth) else np.nan


def roc_points(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rate along the ROC curve; empty arrays where not defined."""
    truth, score = _labelled(truth, score)
    return _sklearn().roc_curve(truth, score)[:2] if _defined(truth) else (np.empty(0), np.empty(0))


def pr_points(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision along the PR curve (falling recall); empty arrays where not defined."""
    truth, score = _labelled(truth, score)
    empty = (np.empty(0), np.empty(0))
    return _sklearn().precision_recall_curve(truth, score)[1::-1] if _defined(truth) else empty


def undefined(positives: float, known: float) -> str:
    """Say why a metric has no value, from the numbers of positive and of labelled films."""
    if not known:
        return "not labelled"
    return f"not defined ({'0 negatives' if positives else '0 positives'})"


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
    truth, score = _labelled(np.asarray(truth)[films], np.asarray(score)[films])
    repeats = resamples.times.shape[1]
    if not _defined(truth):
        return np.full((len(wanted), repeats), np.nan)
    order, segment = _segments(truth, score)
    owner, truth = resamples.owner[films[order]], truth[order]
    shape = (segment[-1] + 1, len(resamples.times))
    classes = [truth.astype(np.float32), (1 - truth).astype(np.float32)]
    counts = [csr_matrix((weight, (segment, owner)), shape) for weight in classes]
    for count in counts:
        count.eliminate_zeros()
    parts = [resamples.times[:, part : part + CHUNK] for part in range(0, repeats, CHUNK)]
    areas = [_areas(*(count @ part for count in counts), wanted) for part in parts]
    return np.concatenate(areas, axis=1)


def interval(resampled: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap values (repeats,) (Efron and Tibshirani 1993, ch. 13).

    Undefined resamples (NaN) are left out; where they are the majority, the interval is NaN.
    """
    if np.isnan(resampled).mean() > 0.5:
        return np.nan, np.nan
    low, high = np.nanpercentile(resampled, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def _positive_patients(truth: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Patients with a positive film, by finding (14,); 0 where no film is negative."""
    counts = [len(np.unique(patients[column == 1])) for column in truth.T]
    return np.where((truth == 0).any(axis=0), counts, 0)


def evaluable_findings(
    truth: np.ndarray,
    patients: np.ndarray,
    groups: Sequence[np.ndarray] | None = None,
    minimum: int = LEAST_PATIENTS,
) -> list[str]:
    """Return the findings that the macro mean is taken over, in canonical order.

    Those with positive films of at least `minimum` different patients, and a negative film, in
    each of the `groups` (masks (n,); none: all films are one group), so that groups are compared
    over the same findings. A group that has no such finding is passed over. Where nothing is left
    (a tiny test set), those that are defined at all. `truth` is (n, 14) of 0, 1 or NaN, `patients`
    (n,). It depends on the labels alone, never on a model.
    """
    truth, patients = np.asarray(truth), np.asarray(patients)
    masks = [np.ones(len(truth), dtype=bool)] if groups is None else groups
    counts = np.array([_positive_patients(truth[mask], patients[mask]) for mask in masks])
    for least in (minimum, 1):
        enough = counts[(counts >= least).any(axis=1)] >= least
        if len(enough) and enough.all(axis=0).any():
            return [f for f, kept in zip(FINDINGS, enough.all(axis=0), strict=True) if kept]
    return []


def with_mean(values: np.ndarray, findings: Sequence[str]) -> np.ndarray:
    """Append the mean over some findings to values (..., 14, repeats): NaN if one is NaN."""
    chosen = [FINDINGS.index(finding) for finding in findings]
    mean = (
        values[..., chosen, :].mean(axis=-2) if chosen else np.full_like(values[..., 0, :], np.nan)
    )
    return np.concatenate([values, mean[..., None, :]], axis=-2)


def tabulate_draws(
    draws: np.ndarray, truth: np.ndarray, findings: Sequence[str], wanted: Sequence[str] = METRICS
) -> pd.DataFrame:
    """Tabulate the values of a model with 95 % intervals: for each metric 14 findings, then `mean`.

    `draws` (len(wanted), 15, 1 + repeats) is `bootstrap` by finding and `with_mean` over
    `findings`; `truth` (n, 14) are the labels it was taken on. Columns: `finding, metric, value,
    ci_low, ci_high, n, positives`. `n` is the number of labelled films, `positives` that of
    positive films; in the row `mean` the number of films, and of findings in the mean.
    """
    count = {
        "n": [*(~np.isnan(truth)).sum(axis=0), len(truth)],
        "positives": [*(truth == 1).sum(axis=0), len(findings)],
    }
    tables = []
    for metric, values in zip(wanted, draws, strict=True):
        table = pd.DataFrame({"finding": [*FINDINGS, MEAN], "metric": metric})
        table["value"] = values[:, 0]
        table[["ci_low", "ci_high"]] = [interval(row[1:]) for row in values]
        tables.append(table.assign(**count))
    return pd.concat(tables, ignore_index=True)


def bootstrap_p(draws: np.ndarray) -> float:
    """Two-sided p of the hypothesis that a difference is 0, from its bootstrap values (repeats,).

    Twice the smaller share of resamples on either side of 0, never below 2 / (repeats + 1) (Davison
    and Hinkley 1997, ch. 4); NaN where most resamples are undefined.
    """
    known = draws[~np.isnan(draws)]
    if len(known) < len(draws) / 2:
        return np.nan
    side = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (side + 1) / (len(known) + 1)))


def holm(p: np.ndarray) -> np.ndarray:
    """Adjust p values (k,) for their number, step down (Holm 1979); NaN does not count."""
    adjusted, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted


def tabulate_differences(
    draws: np.ndarray, by_seed: np.ndarray, wanted: Sequence[str] = METRICS
) -> pd.DataFrame:
    """Tabulate paired differences: for each metric 14 findings, then `mean`.

    `draws` (len(wanted), 15, 1 + repeats) is the mean over seeds of one model's draws minus the
    other's on the same resamples, `by_seed` (seeds, len(wanted), 15) its value in each seed. A
    difference is `shown` where its interval excludes 0 and every seed has its sign; of the 14
    findings, p adjusted by `holm` must be below 0.05 too.
    """
    tables = []
    for k, metric in enumerate(wanted):
        table = pd.DataFrame({"finding": [*FINDINGS, MEAN], "metric": metric})
        table["value"] = draws[k, :, 0]
        table[["ci_low", "ci_high"]] = [interval(row[1:]) for row in draws[k]]
        table["p"] = [bootstrap_p(row[1:]) for row in draws[k]]
        table["p_holm"] = [*holm(table["p"].to_numpy()[:-1]), table["p"].iloc[-1]]
        table["seeds"] = len(by_seed)
        table["seeds_agree"] = (np.sign(by_seed[:, k]) == np.sign(draws[k, :, 0])).sum(axis=0)
        table["seed_low"], table["seed_high"] = by_seed[:, k].min(axis=0), by_seed[:, k].max(axis=0)
        apart = (table["ci_low"] > 0) | (table["ci_high"] < 0)
        adjusted = (table["p_holm"] < 0.05) | (table["finding"] == MEAN)
        shown = apart & adjusted & (table["seeds_agree"] == table["seeds"])
        table["verdict"] = np.where(shown, SHOWN, NOT_SHOWN)
        table.loc[table["value"].isna(), "verdict"] = "not defined"
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def log_loss(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean binary cross-entropy over the known labels; both (N, 14); computed in float64."""
    x, known = logits.astype(np.float64), ~np.isnan(labels)
    loss = np.logaddexp(0, x) - x * np.nan_to_num(labels)
    return float(loss[known].mean()) if known.any() else float("nan")


def mean_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean AUROC over the findings for which it is defined, (N, 14) each; NaN if there is none."""
    values = [auroc(*pair) for pair in zip(labels.T, scores.T, strict=True)]
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")
