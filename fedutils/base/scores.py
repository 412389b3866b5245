"""AUROC, average precision and sums of one set of scores; NaN labels are left out."""

import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

LOSS_PARTS = 1 << 24  # parts of a loss, which is added up as a whole number
BOUNDLESS = 1 << 52  # parts: of thousands of hospitals they add up to less than 2^63
FINE_STEPS = 1 << 16  # cells of a grid of probabilities
COARSE_STEPS = 1 << 9  # of the one that tells where it is to lie
REACH = 16.0  # logits, either way
TINY = 1e-9  # the lowest probability that has a logit


def labelled(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep the films whose label is known; raise ValueError on other shapes, labels or scores.

    Of a model that was never taught the finding, whose scores are all NaN, no film is kept.
    """
    truth, score = np.asarray(truth, dtype=float), np.asarray(score, dtype=float)
    if truth.ndim != 1 or truth.shape != score.shape:
        raise ValueError(f"truth {truth.shape} and score {score.shape} must be of one length")
    known = ~np.isnan(truth) & ~np.isnan(score).all()
    if not np.isfinite(score[known]).all() or not np.isin(truth[known], (0, 1)).all():
        raise ValueError("labels must be 0, 1 or NaN, and scores finite")
    return truth[known], score[known]


def only_of(labels: np.ndarray, findings: Collection[int]) -> np.ndarray:
    """Return labels (n, k) in which those of all other findings are unknown."""
    return np.where(np.isin(np.arange(labels.shape[1]), list(findings)), labels, np.nan)


def logit_of(chance: np.ndarray) -> np.ndarray:
    """Return the logits of probabilities, those of 0 and 1 bounded."""
    p = np.clip(chance, TINY, 1 - TINY)
    return np.log(p / (1 - p))


def count_coarse(chance: np.ndarray) -> np.ndarray:
    """Count probabilities (n,) on COARSE_STEPS even steps of the logit: what tells their span."""
    steps = (logit_of(chance) + REACH) * (COARSE_STEPS / 2 / REACH)
    return np.bincount(steps.clip(0, COARSE_STEPS - 1).astype(int), minlength=COARSE_STEPS)


def span_of(coarse: np.ndarray) -> tuple[float, float]:
    """Return between which logits a grid of probabilities is to lie, by `count_coarse` of some.

    As wide again as those that were counted, for others may lie beside; all where there is none.
    """
    filled = np.flatnonzero(coarse)
    if not len(filled):
        return -REACH, REACH
    ends = np.array([filled[0], filled[-1] + 1]) * (2 * REACH / COARSE_STEPS) - REACH
    low, high = ends.tolist()
    beside = (high - low) / 2
    return low - beside, high + beside


def cell_of(chance: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Return on which cell of a grid probabilities lie, 0 the lowest: even steps of the logit.

    Where probabilities must not leave, films are counted on it: those of one cell are then ties.
    """
    steps = (logit_of(chance) - span[0]) / (span[1] - span[0]) * FINE_STEPS
    return np.nan_to_num(steps).clip(0, FINE_STEPS - 1).astype(np.int64)


def edge_of(cell: Any, span: tuple[float, float], middle: float = 0.0) -> Any:
    """Return the lowest probability on a cell; or with 0.5 one in its middle."""
    logit = span[0] + (np.asarray(cell) + middle) * ((span[1] - span[0]) / FINE_STEPS)
    chance = 1 / (1 + np.exp(-logit))
    return np.where((np.asarray(cell) == 0) | (chance <= TINY), middle * TINY, chance)


def both_classes(truth: np.ndarray) -> bool:
    """Whether there is a positive and a negative among known labels."""
    return bool(0 < truth.sum() < len(truth))


def _metric(name: str, truth: np.ndarray, score: np.ndarray, otherwise: Any) -> Any:
    """Return a metric of scikit-learn's by its name, or something else where a class is missing."""
    from sklearn import metrics  # at the first use: with SciPy it takes a second

    truth, score = labelled(truth, score)
    return getattr(metrics, name)(truth, score) if both_classes(truth) else otherwise


def auroc(truth: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve of one finding, ties counted half; NaN where not defined.

    `truth` (n,) holds 0, 1 or NaN (not labelled), `score` (n,) grows with suspicion.
    Raises ValueError on unequal lengths, other labels or scores that are not finite.
    """
    return float(_metric("roc_auc_score", truth, score, np.nan))


def average_precision(truth: np.ndarray, score: np.ndarray) -> float:
    """Area under the stepwise precision-recall curve of one finding; arguments as in `auroc`."""
    return float(_metric("average_precision_score", truth, score, np.nan))


def roc_points(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rate along the ROC curve; empty arrays where not defined."""
    return _metric("roc_curve", truth, score, np.empty((2, 0)))[:2]


def pr_points(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision along the PR curve (falling recall); empty arrays where not defined."""
    return _metric("precision_recall_curve", truth, score, np.empty((2, 0)))[1::-1]


def undefined(positives: float, known: float) -> str:
    """Say why a metric has no value, from the numbers of positive and of labelled films."""
    if not known:
        return "not labelled"
    return "all films show it" if positives else "no film shows it"


def validation_sums(labels: np.ndarray, logits: np.ndarray) -> dict[str, np.ndarray]:
    """Return what is added up of one hospital's films, (N, k) each: whole numbers, int64.

    Of the binary cross-entropy 2^-24 parts, the known labels, and for each finding the pairs of a
    film with and one without it, and twice those that are ordered right, ties as halves. Where a
    logit is not finite, the loss is BOUNDLESS, and the finding has no pairs.
    """
    x, known = logits.astype(np.float64), ~np.isnan(labels)
    with np.errstate(invalid="ignore"):
        loss = (np.logaddexp(0, x) - x * np.nan_to_num(labels))[known].sum() * LOSS_PARTS
    sound = np.isfinite(x).all(axis=0)
    pairs = (labels == 1).sum(axis=0) * (labels == 0).sum(axis=0) * sound
    scores = np.where(sound, x, 0)
    areas = [auroc(truth, score) for truth, score in zip(labels.T, scores.T, strict=True)]
    ordered = np.rint(2 * np.nan_to_num(areas) * pairs)
    sums = {
        "loss": np.rint(np.nan_to_num(loss, nan=BOUNDLESS).clip(0, BOUNDLESS)),
        "labels": known.sum(),
        "pairs": pairs,
        "ordered": ordered,
    }
    return {name: np.asarray(value, np.int64) for name, value in sums.items()}


def judge(sums: Iterable[dict[str, np.ndarray]]) -> tuple[float, float]:
    """Return mean loss and mean AUROC of several hospitals' `validation_sums`; NaN without any.

    Pairs are of one hospital: a model that only tells hospitals apart has an AUROC of 0.5. The loss
    is NaN, too, where one was BOUNDLESS.
    """
    total: dict[str, Any] = {"loss": 0, "labels": 0, "pairs": np.zeros(0), "ordered": np.zeros(0)}
    for k, found in enumerate(sums):
        total = {name: value + total[name] if k else value for name, value in found.items()}
    some = total["pairs"] > 0
    areas = total["ordered"][some] / total["pairs"][some] / 2
    known = total["labels"] and total["loss"] < BOUNDLESS
    loss = float(total["loss"] / LOSS_PARTS / total["labels"]) if known else math.nan
    return loss, float(areas.mean()) if some.any() else math.nan
