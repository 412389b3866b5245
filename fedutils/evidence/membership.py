"""Was a patient in the training? An attack by the size of the loss, which anyone can run.

Yeom et al., CSF 2018: a model tends to have a lower loss on films that it learned from. The unit is
the patient, by the mean loss over that patient's films. This attack is a weak one: what it finds is
there, what it does not find may be found by a stronger one (Carlini et al., S&P 2022, who also say
why the rate at few false positives matters more than the area under the curve).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..base.findings import findings_of
from ..base.rng import generator
from ..dataset import ChestXrayDataset
from .bootstrap import bootstrap, interval, patient_resamples
from .tables import OWNER, name_model

FEWEST = 300  # non-members below which the rate at 1 % false positives is not stated
FALSE = 0.01
RATE = "tpr_at_1pct_fpr"


def attack_films(films: ChestXrayDataset, seed: int, most: int = 1000) -> ChestXrayDataset:
    """Draw as many training as validation patients of each hospital, `most` of each at the most.

    Members and non-members then differ in nothing but membership. `films.index` carries `client`
    and `split`; all films of a drawn patient come along.
    """
    drawn: list[str] = []
    for client, rows in films.index.groupby("client"):
        parts = [sorted(rows["patient_id"][rows["split"] == s].unique()) for s in ("train", "val")]
        count = min(most, *map(len, parts))
        choice = generator(seed, "attack", 0, client).choice
        drawn += [name for part in parts for name in choice(part, count, replace=False)]
    return films.where(films.index["patient_id"].isin(drawn))


def attack_models(
    predictions: Sequence[pd.DataFrame], films: ChestXrayDataset, seed: int
) -> pd.DataFrame:
    """Attack every model; return the rows of `membership.csv`, with 95 % intervals over patients.

    `predictions` are those of `predict_films` for the films of `attack_films`, of training and of
    validation. Columns: `arm, seed, client, metric, value, ci_low, ci_high, members,
    non_members`; the metrics are `auroc` (0.5: no better than guessing) and the share of members
    that are found while 1 % of the others are accused. That is NaN below 300 non-members. A local
    model is judged on its own hospital's patients.
    """
    about = films.index.set_index("image_index")
    tables = []
    for owner, rows in pd.concat(predictions).groupby(OWNER, sort=False):
        index = about.loc[rows["image_index"]]
        patients = _patients(index, rows[findings_of(rows)].to_numpy())
        if owner[2]:
            patients = patients[patients["hospital"] == owner[2]]
        tables.append(name_model(_attack(patients, seed), owner))
    return pd.concat(tables, ignore_index=True)


def _patients(index: pd.DataFrame, chances: np.ndarray) -> pd.DataFrame:
    """Return a row a patient: hospital, whether a member (1 or 0), and the mean loss."""
    truth = index[findings_of(index)].to_numpy(float)
    right = np.where(truth == 1, chances, 1 - chances).clip(1e-12)
    known = np.ma.masked_invalid(np.where(np.isnan(truth), np.nan, -np.log(right)))
    loss = known.mean(axis=1).filled(np.nan)  # of a film without a known label there is none
    member = (index["split"] == "train").astype(int)
    films = index.assign(hospital=index["client"], member=member, loss=loss).dropna(subset=["loss"])
    how = {"hospital": "first", "member": "first", "loss": "mean"}
    return films.groupby("patient_id").agg(how)


def _attack(patients: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return one row a metric of a threshold on the loss."""
    truth, score = patients["member"].to_numpy(), -patients["loss"].to_numpy()
    counts = {"members": int(truth.sum()), "non_members": int((1 - truth).sum())}
    values = dict.fromkeys(("auroc", RATE), np.full(2, np.nan))
    if all(counts.values()):
        resamples = patient_resamples(np.arange(len(truth)), 1000, seed)
        values["auroc"] = bootstrap(truth, score, resamples, wanted=["auroc"])[0]
        if counts["non_members"] >= FEWEST:
            values[RATE] = found_at(truth, score, resamples.times.T)
    table = pd.DataFrame({"metric": list(values), "value": [float(v[0]) for v in values.values()]})
    table[["ci_low", "ci_high"]] = [interval(v[1:]) for v in values.values()]
    return table.assign(**counts)


def found_at(truth: np.ndarray, score: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return the highest true-positive rate with at most 1 % false positives, a resample each.

    `truth` and `score` are (n,), `times` (repeats, n) says how often each counts. Equal scores lie
    on one side of a threshold, so it is never drawn between them.
    """
    order = np.argsort(-score, kind="stable")
    weights, member = times[:, order].astype(float), truth[order]
    hits, misses = (weights * member).cumsum(axis=1), (weights * (1 - member)).cumsum(axis=1)
    between = np.r_[np.diff(score[order]) != 0, True]
    allowed = between & (misses <= FALSE * misses[:, -1:])
    with np.errstate(invalid="ignore"):
        return np.where(allowed, hits, 0).max(axis=1) / hits[:, -1]
