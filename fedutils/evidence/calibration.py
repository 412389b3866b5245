"""What a probability is worth, and where to cut it: calibration and operating points.

Cuts come from validation films, all figures from test films. A label may be missing (NaN): the film
is then left out for that finding. Probabilities are those of the model that leaves: rescaling them
by what validation films say brings little (RESULTS, "Statistics"), and the file holds no factors.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from ..base.findings import findings_of
from ..base.scores import both_classes, labelled
from .bootstrap import Resamples, interval, patient_resamples
from .intervals import Z, share_interval
from .metrics import REPEATS, count_patients
from .tables import LEAST_PATIENTS, MEAN, OWNER, check_once, name_model, truth_of

BINS = 15
YOUDEN, SENSITIVE = "Youden", "sensitivity 0.9"
ENDS = ("", "_low", "_high")


def _known(truth: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep the known labels, flat; raise ValueError on other shapes, labels or probabilities."""
    shapes = np.shape(truth), np.shape(probability)
    if shapes[0] != shapes[1]:
        raise ValueError(f"truth {shapes[0]} and probability {shapes[1]} must be alike")
    truth, probability = labelled(np.ravel(truth), np.ravel(probability))
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError("probabilities must be between 0 and 1")
    return truth, probability


def brier(truth: np.ndarray, probability: np.ndarray) -> float:
    """Mean squared difference of probability and label (Brier 1950); NaN without any label.

    Both of one shape; `truth` holds 0, 1 or NaN. Defined with one class alone, too. Raises
    ValueError on unequal shapes, other labels, or probabilities outside of 0 to 1.
    """
    truth, probability = _known(truth, probability)
    return float(np.mean((probability - truth) ** 2)) if len(truth) else np.nan


def reliability(truth: np.ndarray, probability: np.ndarray) -> pd.DataFrame:
    """Compare predicted with observed shares in 15 bins of equal width; arguments as in `brier`.

    Returns the bins that hold films: `films`, `predicted` (mean probability) and `observed` (share
    with the finding). Bin k holds (k - 1)/15 < p <= k/15, the first one 0 as well.
    """
    truth, probability = _known(truth, probability)
    films = {"bin": _bin(probability), "predicted": probability, "observed": truth}
    table = pd.DataFrame(films).groupby("bin")
    return table.mean().assign(films=table.size()).reset_index(drop=True)


def _bin(probability: np.ndarray) -> np.ndarray:
    return np.digitize(probability, np.linspace(0, 1, BINS + 1)[1:-1], right=True)


def calibration_error(truth: np.ndarray, probability: np.ndarray) -> float:
    """Expected calibration error: the mean gap in `reliability`, weighted by films.

    Naeini et al. (AAAI 2015), with the 15 bins of equal width of Guo et al. (ICML 2017), for the
    probability of the finding. Of a rare finding nearly all films are in the first bin, so that
    it mostly compares the mean probability with the prevalence. It is never 0, however right the
    probabilities are: see `chance_error`. NaN without any label.
    """
    table = reliability(truth, probability)
    gap = (table["predicted"] - table["observed"]).abs()
    return float(np.average(gap, weights=table["films"])) if len(table) else np.nan


def chance_error(probability: np.ndarray) -> float:
    """Return the calibration error to expect if these probabilities (n,) were right.

    Then the gap of a bin has the variance of its films' draws, which is taken to be normal; films
    of one patient that go together make it larger. NaN without any film.
    """
    variances = np.bincount(_bin(probability), probability * (1 - probability), BINS)
    expected = np.sqrt(2 / np.pi * variances).sum()
    return float(expected / len(probability)) if len(probability) else np.nan


def recalibrate(truth: np.ndarray, probability: np.ndarray, owners: np.ndarray) -> dict[str, float]:
    """Return slope and intercept of a logistic recalibration of films (n,), with their intervals.

    Slope: of the logit; under 1 the model is too sure. Intercept: with the slope held at 1; above 0
    it says too little (Van Calster et al., BMC Medicine 2019). Standard errors are over patients,
    `owners` (n,). NaN with too few of them, or where all positives lie above all negatives.
    """
    p = np.clip(probability, 1e-9, 1 - 1e-9)
    logit = np.log(p / (1 - p))
    ones, found = np.ones((len(p), 1)), {}
    for name, design, offset in (
        ("slope", np.c_[logit, ones], 0.0), ("intercept", ones, logit),
    ):  # fmt: skip
        value, error = _logistic(design, offset, truth, owners)
        found |= {name: value, f"{name}_low": value - Z * error, f"{name}_high": value + Z * error}
    return found


def _logistic(
    design: np.ndarray, offset: np.ndarray | float, truth: np.ndarray, owners: np.ndarray
) -> tuple[float, float]:
    """Fit a logistic regression by Newton's steps; return its first coefficient and that's error.

    The error is a sandwich over patients (Liang and Zeger 1986). NaN where it does not converge.
    """
    weights = np.zeros(design.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-np.clip(offset + design @ weights, -30, 30)))
        slopes = design.T @ (design * (p * (1 - p))[:, None])
        if np.linalg.cond(slopes) > 1e12:
            break
        step = np.linalg.solve(slopes, design.T @ (truth - p))
        weights += step
        if np.abs(step).max() < 1e-9:
            place = np.unique(owners, return_inverse=True)[1]
            scores = np.stack([np.bincount(place, c * (truth - p)) for c in design.T])
            inverse = np.linalg.inv(slopes)
            errors = np.sqrt(np.diag(inverse @ scores @ scores.T @ inverse))
            return float(weights[0]), float(errors[0])
    return np.nan, np.nan


def calibrate(
    predictions: pd.DataFrame, index: pd.DataFrame, seed: int, repeats: int = REPEATS
) -> pd.DataFrame:
    """Tabulate calibration on test films, all and by hospital, with intervals: calibration.csv.

    `predictions` are `arm, seed, client, image_index` and a probability a finding,
    `index` has `image_index, patient_id, client` and the labels. Returns a row for each model,
    hospital (empty: all films) and finding, and the mean over the findings with patients enough:
    `arm, seed, client, hospital, finding, n, positives, prevalence`, then `brier, ece, slope,
    intercept`, each with `_low` and `_high`, and `ece_chance`, the ECE to expect of right
    probabilities. No interval, slope or mean with fewer than LEAST_PATIENTS of a kind.
    """
    check_once(predictions)
    index = index.set_index("image_index").loc[predictions["image_index"].unique()]
    hospitals, truth = index["client"].to_numpy(), truth_of(index)
    resamples = patient_resamples(index["patient_id"].to_numpy(), repeats, seed)
    tables, findings = [], findings_of(index)
    for owner, rows in predictions.fillna({"client": ""}).groupby(OWNER, sort=False):
        probability = truth_of(rows.set_index("image_index").loc[index.index])
        for name in ("", *sorted(set(hospitals) - {""})):
            films = np.flatnonzero(hospitals == name) if name else np.arange(len(index))
            table = _calibrate(findings, truth[films], probability[films], films, resamples)
            tables.append(name_model(table.assign(hospital=name), owner))
    order = [*OWNER, "hospital"]
    table = pd.concat(tables, ignore_index=True)
    return table[[*order, *(name for name in table if name not in order)]]


def _calibrate(
    findings: Sequence[str],
    truth: np.ndarray,
    probability: np.ndarray,
    films: np.ndarray,
    resamples: Resamples,
) -> pd.DataFrame:
    """Tabulate the calibration of one model on some films: a row a finding, then their mean."""
    truth = np.where(np.isnan(probability), np.nan, truth)  # what it was not taught, nobody judges
    owners, rows, draws = resamples.owner[films], [], {"brier": [], "ece": []}
    enough = np.minimum(*count_patients(truth, owners)) >= LEAST_PATIENTS
    for finding, y, p, judged in zip(findings, truth.T, probability.T, enough, strict=True):
        known = ~np.isnan(y)
        y, p, who = y[known], p[known], owners[known]
        row = {"finding": finding, "n": len(y), "positives": int(y.sum())}
        row |= {"prevalence": y.mean() if len(y) else np.nan}
        row |= {"brier": brier(y, p), "ece": calibration_error(y, p), "ece_chance": chance_error(p)}
        if judged:
            for name, values in zip(draws, _draw_errors(y, p, who, resamples), strict=True):
                draws[name].append(values)
                row |= _ends(name, values)
            row |= recalibrate(y, p, who)
        rows.append(row)
    mean = {"finding": MEAN, "n": len(truth), "positives": len(draws["brier"])}
    for name, values in draws.items():
        if values:
            of_all = np.mean(values, axis=0)
            mean |= {name: of_all[0]} | _ends(name, of_all)
    others = pd.DataFrame(rows).reindex(columns=["ece_chance", "slope", "intercept"])[enough]
    mean |= others.mean().to_dict()
    columns = [f"{c}{end}" for c in ("brier", "ece", "slope", "intercept") for end in ENDS]
    columns.append("ece_chance")
    return pd.DataFrame([*rows, mean]).reindex(
        columns=["finding", "n", "positives", "prevalence", *columns]
    )


def _draw_errors(
    truth: np.ndarray, probability: np.ndarray, owners: np.ndarray, resamples: Resamples
) -> tuple[np.ndarray, np.ndarray]:
    """Return Brier score and calibration error in every resample of patients, (1 + repeats,)."""
    count, gap = len(resamples.times), probability - truth
    sums = np.zeros((BINS, count))
    np.add.at(sums, (_bin(probability), owners), gap)
    films, squares = (np.bincount(owners, w, count) for w in (np.ones(len(gap)), gap**2))
    drawn = np.maximum(films @ resamples.times, 1)
    return squares @ resamples.times / drawn, np.abs(sums @ resamples.times).sum(axis=0) / drawn


def _ends(name: str, draws: np.ndarray) -> dict[str, float]:
    """Return the percentile interval, moved by the draws' bias: resampled, a gap is larger."""
    low, high = interval(draws[1:] - draws[1:].mean() + draws[0])
    return {f"{name}_low": max(0.0, low), f"{name}_high": high}


def choose_threshold(truth: np.ndarray, probability: np.ndarray, rule: str) -> float:
    """Choose where to cut, from validation films (n,): at or above it a film is called positive.

    "Youden" maximises sensitivity + specificity (Youden 1950), "sensitivity 0.9" is the highest
    cut that still finds 90 % of the positives; of equal cuts the highest. NaN where there is no
    positive or no negative film.
    """
    from sklearn.metrics import roc_curve

    truth, probability = _known(truth, probability)
    if not both_classes(truth):
        return np.nan
    false, true, cuts = roc_curve(truth, probability, drop_intermediate=False)
    # The first cut is infinity, which calls nothing positive.
    gain = np.round(true - false, 12)  # so that equal cuts are equal
    best = np.argmax(gain[1:] if rule == YOUDEN else true[1:] >= 0.9)
    return float(cuts[1:][best])


def rates_at(
    truth: np.ndarray, probability: np.ndarray, threshold: float, owners: np.ndarray
) -> dict[str, Any]:
    """Sensitivity, specificity, PPV, NPV of films (n,) at a cut, and the prevalence they hold at.

    Each with `_low` and `_high`, its 95 % interval over patients, `owners` (n,); none with fewer
    than LEAST_PATIENTS with the finding, or without. NaN where there is nothing to divide by, and
    everywhere if there is no cut. With another prevalence PPV and NPV are others.
    """
    owners = np.asarray(owners)[~np.isnan(np.asarray(truth, dtype=float))]
    truth, probability = _known(truth, probability)
    judged = min(*count_patients(truth[:, None], owners)) >= LEAST_PATIENTS
    called, positive = probability >= threshold, truth == 1
    parts = {
        "sensitivity": (called, positive), "specificity": (~called, ~positive),
        "ppv": (positive, called), "npv": (~positive, ~called),
    }  # fmt: skip
    found = {}
    for name, (hits, films) in parts.items():
        hits = hits[films] if not np.isnan(threshold) else hits[:0]
        ends = (np.nan, np.nan)
        if judged:
            ends = share_interval(hits, owners[films][: len(hits)])
        found |= {name: hits.mean() if len(hits) else np.nan}
        found |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
    share = positive.mean() if len(positive) else np.nan
    return found | {"prevalence": share, "n": len(truth), "positives": int(positive.sum())}


def operating_points(
    validation: pd.DataFrame, test: pd.DataFrame, index: pd.DataFrame
) -> pd.DataFrame:
    """Choose cuts on validation, and tabulate what they do on test: operating_points.csv.

    `validation` and `test` are predictions, `index` as in `calibrate`. A local model is cut by its
    own hospital's validation films alone: it has no others. Returns a row for each model, finding
    and rule: `arm, seed, client, finding, rule, threshold, val_positives`, then as `rates_at`.
    """
    index, rows = index.set_index("image_index"), []
    validation, test = (check_once(part).fillna({"client": ""}) for part in (validation, test))
    for owner, tested in test.groupby(OWNER, sort=False):
        seen = validation[(validation[OWNER] == list(owner)).all(axis=1)]
        if owner[2]:
            seen = seen[(index.loc[seen["image_index"], "client"] == owner[2]).to_numpy()]
        known, films = (index.loc[part["image_index"]] for part in (seen, tested))
        for finding, rule in product(findings_of(index), (YOUDEN, SENSITIVE)):
            truth = known[finding].to_numpy(float)
            cut = choose_threshold(truth, seen[finding].to_numpy(), rule)
            row = {"finding": finding, "rule": rule, "threshold": cut}
            row |= {"val_positives": int((truth == 1).sum())}
            scores = tested[finding].to_numpy()
            labels = np.where(np.isnan(scores), np.nan, films[finding].to_numpy(float))
            row |= rates_at(labels, scores, cut, films["patient_id"].to_numpy())
            rows.append(dict(zip(OWNER, owner, strict=True)) | row)
    return pd.DataFrame(rows)
