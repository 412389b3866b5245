"""What a probability is worth: calibration, on test films.

A label may be missing (NaN): the film is then left out for that finding. Probabilities are those of
the model that leaves: rescaling them by what validation films say brings little (RESULTS,
"Statistics"), and the file holds no factors.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..base.findings import findings_of
from ..base.scores import labelled, logit_of
from .bootstrap import Resamples, interval, patient_resamples
from .intervals import Z
from .metrics import REPEATS, count_patients
from .tables import LEAST_PATIENTS, MEAN, OWNER, check_once, name_model, truth_of

BINS = 15
ENDS = ("", "_low", "_high")
Fit = tuple[np.ndarray, np.ndarray]  # weights, and the inverse of the slopes at them


def known_films(truth: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
    truth, probability = known_films(truth, probability)
    return float(np.mean((probability - truth) ** 2)) if len(truth) else np.nan


def reliability(truth: np.ndarray, probability: np.ndarray) -> pd.DataFrame:
    """Compare predicted with observed shares in 15 bins of equal width; arguments as in `brier`.

    Returns the bins that hold films: `films`, `predicted` (mean probability) and `observed` (share
    with the finding). Bin k holds (k - 1)/15 < p <= k/15, the first one 0 as well.
    """
    truth, probability = known_films(truth, probability)
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
    probabilities are: see `tabulate_errors`. NaN without any label.
    """
    table = reliability(truth, probability)
    gap = (table["predicted"] - table["observed"]).abs()
    return float(np.average(gap, weights=table["films"])) if len(table) else np.nan


def recalibrate(truth: np.ndarray, probability: np.ndarray, owners: np.ndarray) -> dict[str, float]:
    """Return slope and intercept of a logistic recalibration of films (n,), with their intervals.

    Slope: of the logit; under 1 the model is too sure. Intercept: with the slope held at 1; above 0
    it says too little (Van Calster et al., BMC Medicine 2019). Standard errors are over patients,
    `owners` (n,). NaN with too few of them, or where all positives lie above all negatives.
    """
    logit = logit_of(probability)
    fits = fit_recalibration(logit, np.ones(len(logit)), truth)
    return recalibration_ends(fits, spreads(logit, truth, owners, [w for w, _ in fits]))


def recalibration_ends(fits: Sequence[Fit], spread: Sequence[np.ndarray]) -> dict[str, float]:
    """Return slope and intercept of both `fit_recalibration` and their intervals, by `spreads`.

    The error is a sandwich over patients (Liang and Zeger 1986).
    """
    found = {}
    for name, (weights, inverse), inside in zip(("slope", "intercept"), fits, spread, strict=True):
        error = np.sqrt(np.diag(inverse @ inside @ inverse))[0]
        value = float(weights[0])
        found |= {name: value, f"{name}_low": value - Z * error, f"{name}_high": value + Z * error}
    return found


def fit_recalibration(logit: np.ndarray, films: np.ndarray, positive: np.ndarray) -> list[Fit]:
    """Fit slope and intercept to films and those with the finding, (k,) each, at logits (k,).

    Returns the weights of each fit and the inverse of its slopes, NaN where it does not converge.
    """
    designs = _designs(logit)
    return [_logistic(design, offset, films, positive) for design, offset in designs]


def spreads(
    logit: np.ndarray, truth: np.ndarray, owners: np.ndarray, weights: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Return of each fit the sum over patients of their scores' products: what errors are made of.

    Of films (n,) with their patients' names (n,). Sums over hospitals add up.
    """
    place, found = np.unique(owners, return_inverse=True)[1], []
    for (design, offset), fitted in zip(_designs(logit), weights, strict=True):
        p = 1 / (1 + np.exp(-np.clip(offset + design @ fitted, -30, 30)))
        scores = np.stack([np.bincount(place, c * (truth - p)) for c in design.T])
        found.append(scores @ scores.T)
    return found


def _designs(logit: np.ndarray) -> list[tuple[np.ndarray, np.ndarray | float]]:
    """Return what slope and intercept multiply, and what stands beside it."""
    ones = np.ones((len(logit), 1))
    return [(np.c_[logit, ones], 0.0), (ones, logit)]


def _logistic(
    design: np.ndarray, offset: np.ndarray | float, films: np.ndarray, positive: np.ndarray
) -> Fit:
    """Fit a logistic regression by Newton's steps; NaN where it does not converge."""
    weights = np.zeros(design.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-np.clip(offset + design @ weights, -30, 30)))
        slopes = design.T @ (design * (films * p * (1 - p))[:, None])
        if np.linalg.cond(slopes) > 1e12:
            break
        step = np.linalg.solve(slopes, design.T @ (positive - films * p))
        weights += step
        if np.abs(step).max() < 1e-9:
            return weights, np.linalg.inv(slopes)
    return weights * np.nan, slopes * np.nan


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
    owners, rows = resamples.owner[films], []
    enough = np.minimum(*count_patients(truth, owners)) >= LEAST_PATIENTS
    for finding, y, p, judged in zip(findings, truth.T, probability.T, enough, strict=True):
        known = ~np.isnan(y)
        y, p, who = y[known], p[known], owners[known]
        found = recalibrate(y, p, who) if judged else {}
        sums = error_sums(y, p, who, resamples)
        rows.append({"finding": finding, "positives": int(y.sum())} | sums | found)
    return tabulate_errors(rows, enough, len(truth))


def tabulate_errors(
    found: Sequence[dict[str, Any]], enough: np.ndarray, films: int
) -> pd.DataFrame:
    """Tabulate calibration: a row a finding, then the mean of those that have patients enough.

    `found` holds of each finding its name, `positives`, its `error_sums` and, of those that have
    `enough` patients, its recalibration; `films` counts all. `ece_chance` is the error to expect if
    probabilities were right: then the gap of a bin has the variance of its films' draws, which is
    taken to be normal; films of one patient that go together make it larger.
    """
    rows, draws = [], {"brier": [], "ece": []}
    for row, judged in zip(found, enough, strict=True):
        sums = {name: row[name] for name in ("drawn", "squares", "gaps", "chance")}
        rest = {name: value for name, value in row.items() if name not in sums}
        n, drawn = sums["drawn"][0], np.maximum(sums["drawn"], 1)
        errors = sums["squares"] / drawn, np.abs(sums["gaps"]).sum(axis=0) / drawn
        chance = np.sqrt(2 / np.pi * sums["chance"]).sum() / drawn[0]
        row = rest | {"n": int(n), "prevalence": row["positives"] / n if n else np.nan}
        row |= {"ece_chance": chance if n else np.nan}
        for name, values in zip(draws, errors, strict=True):
            row[name] = values[0] if n else np.nan
            if judged:
                draws[name].append(values)
                row |= _ends(name, values)
        rows.append(row)
    mean = {"finding": MEAN, "n": films, "positives": len(draws["brier"])}
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


def error_sums(
    truth: np.ndarray, probability: np.ndarray, owners: np.ndarray, resamples: Resamples
) -> dict[str, np.ndarray]:
    """Return what Brier score and calibration error in every resample are made of, as sums.

    Of films (n,) whose patients `resamples` number in `owners` (n,): `drawn` (1 + repeats,) films,
    `squares` (1 + repeats,) of what a probability misses, `gaps` (BINS, 1 + repeats), and `chance`
    (BINS,), the variance of a bin if probabilities are right. Sums over hospitals add up.
    """
    count, gap, bins = len(resamples.times), probability - truth, _bin(probability)
    sums = np.zeros((BINS, count))
    np.add.at(sums, (bins, owners), gap)
    films, squares = (np.bincount(owners, w, count) for w in (np.ones(len(gap)), gap**2))
    return {
        "drawn": films @ resamples.times,
        "squares": squares @ resamples.times,
        "gaps": sums @ resamples.times,
        "chance": np.bincount(bins, probability * (1 - probability), BINS),
    }


def _ends(name: str, draws: np.ndarray) -> dict[str, float]:
    """Return the percentile interval, moved by the draws' bias: resampled, a gap is larger."""
    low, high = interval(draws[1:] - draws[1:].mean() + draws[0])
    return {f"{name}_low": max(0.0, low), f"{name}_high": high}
