"""Where to cut a probability, and what that does: operating points.

Cuts come from validation films, all figures from test films. A label may be missing (NaN): the film
is then left out for that finding.
"""

from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from ..base.findings import findings_of
from ..base.scores import FINE_STEPS, cell_of, count_coarse, edge_of, span_of
from .calibration import known_films
from .intervals import cluster_sums, share_ends
from .metrics import count_patients
from .tables import LEAST_PATIENTS, OWNER, check_once

YOUDEN, SENSITIVE = "Youden", "sensitivity 0.9"
CUTS = (YOUDEN, SENSITIVE)


def choose_threshold(truth: np.ndarray, probability: np.ndarray, rule: str) -> float:
    """Choose where to cut, from validation films (n,): at or above it a film is called positive.

    The cut is the lower edge of a cell of the grid `cell_of`; see `choose_cut`.
    NaN where there is no positive or no negative film.
    """
    truth, probability = known_films(truth, probability)
    span = span_of(count_coarse(probability))
    cells = cell_of(probability, span)
    counts = (np.bincount(cells, weight, FINE_STEPS) for weight in (truth, 1 - truth))
    return threshold_of(choose_cut(*counts, rule), span)


def choose_cut(positive: np.ndarray, negative: np.ndarray, rule: str) -> int:
    """Choose the cell to cut at from films with and without the finding on each, rising.

    "Youden" maximises sensitivity + specificity (Youden 1950), "sensitivity 0.9" is the highest
    cut that still finds 90 % of the positives; of equal cuts the highest on which a film lies. -1
    where there is no positive or no negative film.
    """
    with_it, without = positive.sum(), negative.sum()
    if not (with_it and without):
        return -1
    filled = np.flatnonzero(positive + negative)[::-1]
    true = positive[filled].cumsum() / with_it
    gain = np.round(true - negative[filled].cumsum() / without, 12)  # so that equal cuts are equal
    return int(filled[np.argmax(gain if rule == YOUDEN else true >= 0.9)])


def threshold_of(cut: int, span: tuple[float, float]) -> float:
    """Return the probability at which a chosen cell of a grid begins; NaN of none."""
    return float(edge_of(cut, span)) if cut >= 0 else np.nan


def rate_sums(truth: np.ndarray, called: np.ndarray, owners: np.ndarray) -> dict[str, np.ndarray]:
    """Return of films (n,), some called positive, what each of RATES is made of, as `cluster_sums`.

    `owners` (n,) names each film's patient.
    """
    positive = np.asarray(truth) == 1
    parts = {
        "sensitivity": (called, positive), "specificity": (~called, ~positive),
        "ppv": (positive, called), "npv": (~positive, ~called),
    }  # fmt: skip
    return {name: cluster_sums(hits[on] * 1.0, owners[on]) for name, (hits, on) in parts.items()}


def rates_at(
    truth: np.ndarray, probability: np.ndarray, threshold: float, owners: np.ndarray
) -> dict[str, Any]:
    """Sensitivity, specificity, PPV, NPV of films (n,) at a cut, and the prevalence they hold at.

    Each with `_low` and `_high`, its 95 % interval over patients, `owners` (n,); none with fewer
    than LEAST_PATIENTS with the finding, or without. NaN where there is nothing to divide by, and
    everywhere if there is no cut. With another prevalence PPV and NPV are others.
    """
    owners = np.asarray(owners)[~np.isnan(np.asarray(truth, dtype=float))]
    truth, probability = known_films(truth, probability)
    judged = min(*count_patients(truth[:, None], owners)) >= LEAST_PATIENTS
    sums = rate_sums(truth, probability >= threshold, owners)
    return tabulate_rates(sums, threshold, judged, len(truth), int((truth == 1).sum()))


def tabulate_rates(
    sums: dict[str, np.ndarray], threshold: float, judged: bool, films: int, positives: int
) -> dict[str, Any]:
    """Return what `rates_at` does, from `rate_sums`; intervals only where it is to be `judged`."""
    found = {}
    for name, one in sums.items():
        known = one[1] > 0 and not np.isnan(threshold)
        ends = share_ends(one) if judged and known else (np.nan, np.nan)
        found |= {name: one[2] / one[1] if known else np.nan}
        found |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
    share = positives / films if films else np.nan
    return found | {"prevalence": share, "n": films, "positives": positives}


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
        for finding, rule in product(findings_of(index), CUTS):
            truth = known[finding].to_numpy(float)
            cut = choose_threshold(truth, seen[finding].to_numpy(), rule)
            row = {"finding": finding, "rule": rule, "threshold": cut}
            row |= {"val_positives": int((truth == 1).sum())}
            scores = tested[finding].to_numpy()
            labels = np.where(np.isnan(scores), np.nan, films[finding].to_numpy(float))
            row |= rates_at(labels, scores, cut, films["patient_id"].to_numpy())
            rows.append(dict(zip(OWNER, owner, strict=True)) | row)
    return pd.DataFrame(rows)
