"""What a probability is worth, and where to cut it: calibration and operating points.

Temperatures and thresholds come from validation films, their figures from test films. A label
may be missing (NaN): the film is then left out for that finding.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from ..base.findings import FINDINGS
from ..base.scores import both_classes, labelled
from .tables import MEAN, OWNER, name_model, truth_of

BINS = 15
TEMPERATURES = (0.05, 20.0)  # what is searched: beyond them there is nothing left to calibrate
YOUDEN, SENSITIVE = "Youden", "sensitivity 0.9"


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
    bin = np.digitize(probability, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    table = pd.DataFrame({"bin": bin, "predicted": probability, "observed": truth}).groupby("bin")
    return table.mean().assign(films=table.size()).reset_index(drop=True)


def calibration_error(truth: np.ndarray, probability: np.ndarray) -> float:
    """Expected calibration error: the mean gap in `reliability`, weighted by films.

    Naeini et al. (AAAI 2015), with the 15 bins of equal width of Guo et al. (ICML 2017), for the
    probability of the finding. Of a rare finding nearly all films are in the first bin, so that
    it mostly compares the mean probability with the prevalence. NaN without any label.
    """
    table = reliability(truth, probability)
    gap = (table["predicted"] - table["observed"]).abs()
    return float(np.average(gap, weights=table["films"])) if len(table) else np.nan


def rescale(probability: np.ndarray, temperature: float) -> np.ndarray:
    """Divide the logits of probabilities by a temperature; those of 0 and 1 are cut at 1e-9."""
    p = np.clip(np.asarray(probability, dtype=float), 1e-9, 1 - 1e-9)
    return 1 / (1 + np.exp(-np.log(p / (1 - p)) / temperature))


def fit_temperature(truth: np.ndarray, probability: np.ndarray) -> float:
    """Find the temperature of least cross-entropy (Guo et al., ICML 2017): one for all findings.

    `truth` (n, 14) holds 0, 1 or NaN. One number cannot change any order, so AUROC stays. It is
    searched between 0.05 and 20; without any label there is nothing to fit, and it is 1.
    """
    from scipy.optimize import minimize_scalar  # takes a second to import

    truth, probability = _known(truth, probability)
    if not len(truth):
        return 1.0

    def loss(log_temperature: float) -> float:
        """Cross-entropy of the known labels."""
        p = rescale(probability, np.exp(log_temperature))
        return -np.log(np.maximum(np.where(truth == 1, p, 1 - p), 1e-300)).mean()

    # Convex in 1 / temperature, so the one minimum is found.
    return float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))


def _models(validation: pd.DataFrame, test: pd.DataFrame, index: pd.DataFrame) -> Iterator[tuple]:
    """Yield each model's owner, then its labels and probabilities: validation's, then test's.

    A local model is given its own hospital's validation films alone: it has no others.
    """
    index = index.set_index("image_index")
    validation, test = (table.fillna({"client": ""}) for table in (validation, test))
    for owner, rows in test.groupby(OWNER, sort=False):
        seen = validation[(validation[OWNER] == list(owner)).all(axis=1)]
        if owner[2]:
            seen = seen[(index.loc[seen["image_index"], "client"] == owner[2]).to_numpy()]
        parts = []
        for part in (seen, rows):
            parts += [truth_of(index.loc[part["image_index"]]), truth_of(part)]
        yield owner, *parts


def calibrate(validation: pd.DataFrame, test: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """Tabulate calibration on test films, before and after temperature scaling: calibration.csv.

    `validation` and `test` are predictions (`arm, seed, client, image_index`, 14 probabilities),
    `index` has `image_index, client` and the 14 labels. Returns a row for each model and finding,
    and its macro mean over the findings with labels: `arm, seed, client, temperature, finding, n,
    positives, prevalence, brier, brier_scaled, ece, ece_scaled`.
    """
    tables = []
    for owner, val_truth, val_probability, truth, probability in _models(validation, test, index):
        temperature = fit_temperature(val_truth, val_probability)
        table = pd.DataFrame({"finding": FINDINGS, "n": (~np.isnan(truth)).sum(axis=0)})
        table["positives"] = (truth == 1).sum(axis=0)
        table["prevalence"] = table["positives"] / table["n"]
        for name, scores in (("", probability), ("_scaled", rescale(probability, temperature))):
            pairs = list(zip(truth.T, scores.T, strict=True))
            table[f"brier{name}"] = [brier(*pair) for pair in pairs]
            table[f"ece{name}"] = [calibration_error(*pair) for pair in pairs]
        mean = {"finding": MEAN, "n": len(truth), "positives": int(table["brier"].notna().sum())}
        table.loc[len(table)] = table.drop(columns="finding").mean().to_dict() | mean
        table.insert(0, "temperature", temperature)
        tables.append(name_model(table, owner))
    return pd.concat(tables, ignore_index=True)


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


def rates_at(truth: np.ndarray, probability: np.ndarray, threshold: float) -> dict[str, Any]:
    """Sensitivity, specificity, PPV, NPV of films (n,) at a cut, and the prevalence they hold at.

    NaN where there is nothing to divide by, and everywhere if there is no cut. With another
    prevalence PPV and NPV are others.
    """
    truth, probability = _known(truth, probability)
    called, positive = pd.Series(probability >= threshold), pd.Series(truth == 1)
    parts = {
        "sensitivity": called[positive], "specificity": ~called[~positive],
        "ppv": positive[called], "npv": ~positive[~called],
    }  # fmt: skip
    defined = {k: np.nan if np.isnan(threshold) else v.mean() for k, v in parts.items()}
    counts = {"n": len(truth), "positives": int(positive.sum())}
    return defined | {"prevalence": positive.mean()} | counts


def operating_points(
    validation: pd.DataFrame, test: pd.DataFrame, index: pd.DataFrame
) -> pd.DataFrame:
    """Choose cuts on validation, and tabulate what they do on test: operating_points.csv.

    Arguments as in `calibrate`. Returns a row for each model, finding and rule: `arm, seed, client,
    finding, rule, threshold, val_positives, sensitivity, specificity, ppv, npv, prevalence, n,
    positives`.
    """
    rows = []
    for owner, val_truth, val_probability, truth, probability in _models(validation, test, index):
        model = dict(zip(OWNER, owner, strict=True))
        for (k, finding), rule in product(enumerate(FINDINGS), (YOUDEN, SENSITIVE)):
            cut = choose_threshold(val_truth[:, k], val_probability[:, k], rule)
            found = {"threshold": cut, "val_positives": int((val_truth[:, k] == 1).sum())}
            found |= rates_at(truth[:, k], probability[:, k], cut)
            rows.append(model | {"finding": finding, "rule": rule} | found)
    return pd.DataFrame(rows)
