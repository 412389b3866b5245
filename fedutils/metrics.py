"""AUROC and average precision for 14 findings, with intervals from a bootstrap over patients.

A label may be missing (NaN): the film is then left out for that finding. A metric that is not
defined, for want of a positive or of a negative film, is NaN and keeps its row.
"""

from types import ModuleType

import numpy as np
import pandas as pd

from fedutils.findings import FINDINGS
from fedutils.rng import generator

MEAN = "mean"
METRICS = ("auroc", "average_precision")
# Resamples handled at once: bounds memory, whatever the number of resamples.
CHUNK = 50

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


def patient_resamples(patients: np.ndarray, repeats: int, seed: int) -> np.ndarray:
    """How often each film counts in each bootstrap resample: uint8, shape (repeats, n).

    `patients` (n,) holds one id a film. Whole patients are drawn with replacement, as many as
    there are, and all films of a drawn patient come along: films of one patient are not
    independent (Field and Welsh 2007, "Bootstrapping clustered data"). No film: ValueError.
    """
    ids, owner = np.unique(np.asarray(patients), return_inverse=True)
    if not len(ids):
        raise ValueError("no patients to resample: the test set holds no film")
    draw = generator(seed, "bootstrap").multinomial
    times = draw(len(ids), np.full(len(ids), 1 / len(ids)), size=repeats)
    return times.astype(np.uint8)[:, owner]


def _segments(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Films by falling score, and where to cut them so that both areas stay exact.

    A cut falls only between different scores, so ties stay whole; stretches without any
    positive are one segment, since nothing changes within them.
    """
    order = np.argsort(-score, kind="stable")
    first = np.r_[True, np.diff(score[order]) != 0]
    mixed = np.bincount(np.cumsum(first) - 1, weights=truth[order]) > 0
    return order, np.flatnonzero(first)[mixed | np.r_[True, mixed[:-1]]]


def _areas(times: np.ndarray, truth: np.ndarray, cuts: np.ndarray) -> tuple[np.ndarray, ...]:
    """AUROC and average precision (repeats,) of weights (repeats, n) whose score falls."""
    positive = np.add.reduceat(times * truth.astype(np.uint8), cuts, axis=1, dtype=float)
    negative = np.add.reduceat(times, cuts, axis=1, dtype=float) - positive
    above, false = positive.cumsum(axis=1), negative.cumsum(axis=1)
    total, others = above[:, -1], false[:, -1]
    precision = above / np.maximum(above + false, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = ((above - positive / 2) * negative).sum(axis=1) / (total * others)
        average = (precision * positive).sum(axis=1) / total
    return area, np.where(others > 0, average, np.nan)


def bootstrap(truth: np.ndarray, score: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC and average precision of one finding in every resample: metric -> (repeats,).

    `truth` and `score` (n,) as in `auroc`, `times` (repeats, n) from `patient_resamples`. Equal
    to scikit-learn's with `times` as sample weights, but films are sorted only once. NaN in a
    resample that lacks a positive or a negative. Two models given the same `times` are compared
    on the same patients. Raises ValueError as `auroc` does.
    """
    films = np.flatnonzero(~np.isnan(np.asarray(truth, dtype=float)))
    truth, score = _labelled(truth, score)
    values = np.full((2, len(times)), np.nan)
    if _defined(truth):
        order, cuts = _segments(truth, score)
        for part in range(0, len(times), CHUNK):
            weights = np.take(times[part : part + CHUNK], films[order], axis=1)
            values[:, part : part + CHUNK] = _areas(weights, truth[order], cuts)
    return dict(zip(METRICS, values, strict=True))


def interval(resampled: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap values (repeats,) (Efron and Tibshirani 1993, ch. 13).

    Undefined resamples (NaN) are left out; where they are the majority, the interval is NaN.
    """
    if np.isnan(resampled).mean() > 0.5:
        return np.nan, np.nan
    low, high = np.nanpercentile(resampled, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def evaluable_findings(truth: np.ndarray, patients: np.ndarray, minimum: int = 10) -> list[str]:
    """Return the findings that the macro mean is taken over, in canonical order.

    Those with positive films of at least `minimum` different patients, and a negative film;
    where no finding reaches that (a tiny test set), those that are defined at all. `truth` is
    (n, 14) of 0, 1 or NaN, `patients` (n,). It depends on the labels alone, never on a model.
    """
    truth, patients = np.asarray(truth), np.asarray(patients)
    counts = [len(np.unique(patients[column == 1])) for column in truth.T]
    counts = np.where((truth == 0).any(axis=0), counts, 0)
    enough = counts >= minimum if (counts >= minimum).any() else counts > 0
    return [f for f, kept in zip(FINDINGS, enough, strict=True) if kept]


def _with_mean(values: np.ndarray, chosen: list[int]) -> np.ndarray:
    """Append the mean over the chosen findings (first axis): NaN where one is not defined."""
    mean = values[chosen].mean(axis=0) if chosen else np.full(values.shape[1:], np.nan)
    return np.concatenate([values, [mean]])


def evaluate(
    truth: np.ndarray, probability: np.ndarray, patients: np.ndarray, seed: int, repeats: int = 1000
) -> pd.DataFrame:
    """Tabulate AUROC and average precision by finding, with 95 % intervals over patients.

    `truth` (n, 14) holds 0, 1 or NaN, `probability` is (n, 14), `patients` (n,). Columns:
    `finding, metric, value, ci_low, ci_high, n, positives`; for each metric 14 findings, then
    `mean`. `n` is the number of labelled films, `positives` that of positive films. The row
    `mean` is the macro mean over `evaluable_findings(truth, patients)`; its `n` is the number
    of films, its `positives` the number of findings in the mean. Raises ValueError on other
    shapes, labels or scores, and where there is no film.
    """
    truth, probability = np.asarray(truth, dtype=float), np.asarray(probability, dtype=float)
    if truth.shape != (len(patients), len(FINDINGS)) or truth.shape != probability.shape:
        raise ValueError(f"truth {truth.shape}, probability {probability.shape}: want (n, 14) both")
    times = patient_resamples(patients, repeats, seed)
    columns = list(zip(truth.T, probability.T, strict=True))
    resampled = [bootstrap(*column, times) for column in columns]
    chosen = [FINDINGS.index(finding) for finding in evaluable_findings(truth, patients)]
    tables = []
    for metric, point in zip(METRICS, (auroc, average_precision), strict=True):
        table = pd.DataFrame({"finding": [*FINDINGS, MEAN], "metric": metric})
        table["value"] = _with_mean(np.array([point(*column) for column in columns]), chosen)
        draws = _with_mean(np.stack([values[metric] for values in resampled]), chosen)
        table[["ci_low", "ci_high"]] = [interval(values) for values in draws]
        table["n"] = [*(~np.isnan(truth)).sum(axis=0), len(truth)]
        table["positives"] = [*(truth == 1).sum(axis=0), len(chosen)]
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
