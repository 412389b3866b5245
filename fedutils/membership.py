"""Was a patient in the training? An attack by the size of the loss, which anyone can run.

Yeom et al., CSF 2018: a model tends to have a lower loss on films that it learned from. The unit is
the patient, by the mean loss over that patient's films. This attack is a weak one: what it finds is
there, what it does not find may be found by a stronger one (Carlini et al., S&P 2022, who also say
why the rate at few false positives matters more than the area under the curve).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .findings import FINDINGS
from .images import ChestXrayDataset
from .metrics import bootstrap, interval, patient_resamples
from .rng import generator

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


def membership(
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
    for owner, rows in pd.concat(predictions).groupby(["arm", "seed", "client"], sort=False):
        index = about.loc[rows["image_index"]]
        patients = _patients(index, rows[list(FINDINGS)].to_numpy())
        if owner[2]:
            patients = patients[patients["hospital"] == owner[2]]
        table = pd.DataFrame(_attack(patients, seed))
        for name, value in zip(("client", "seed", "arm"), owner[::-1], strict=True):
            table.insert(0, name, value)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _patients(index: pd.DataFrame, chances: np.ndarray) -> pd.DataFrame:
    """Return a row a patient: hospital, whether a member (1 or 0), and the mean loss."""
    truth = index[list(FINDINGS)].to_numpy(float)
    right = np.where(truth == 1, chances, 1 - chances).clip(1e-12)
    loss = np.nanmean(np.where(np.isnan(truth), np.nan, -np.log(right)), axis=1)
    films = index[["patient_id"]].assign(hospital=index["client"], loss=loss)
    films["member"] = (index["split"] == "train").astype(int)
    return (
        films.dropna(subset=["loss"])
        .groupby("patient_id")
        .agg(hospital=("hospital", "first"), member=("member", "first"), loss=("loss", "mean"))
    )


def _attack(patients: pd.DataFrame, seed: int) -> list[dict[str, float | str]]:
    """Return one row a metric of a threshold on the loss."""
    truth, score = patients["member"].to_numpy(), -patients["loss"].to_numpy()
    counts = {"members": int(truth.sum()), "non_members": int((1 - truth).sum())}
    if not all(counts.values()):
        nothing = {"value": np.nan, "ci_low": np.nan, "ci_high": np.nan}
        return [{"metric": name} | nothing | counts for name in ("auroc", RATE)]
    resamples = patient_resamples(np.arange(len(truth)), 1000, seed)
    areas = bootstrap(truth, score, resamples, wanted=["auroc"])[0]
    rates = rate_at(truth, score, resamples.times.T)
    rates *= 1 if counts["non_members"] >= FEWEST else np.nan
    return [
        {"metric": name, "value": float(values[0])}
        | dict(zip(("ci_low", "ci_high"), interval(values[1:]), strict=True))
        | counts
        for name, values in (("auroc", areas), (RATE, rates))
    ]


def rate_at(truth: np.ndarray, score: np.ndarray, times: np.ndarray) -> np.ndarray:
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


def membership_words(table: pd.DataFrame) -> list[str]:
    """Say of each model, in a sentence, what the attack found."""
    wide = table.pivot(index=["arm", "seed", "client"], columns="metric")
    return [_sentence(owner, row) for owner, row in wide.iterrows()]


def _sentence(owner: tuple, row: pd.Series) -> str:
    """Say what the attack found of one model."""
    name = " ".join(filter(None, [owner[0], str(owner[2]), f"(seed {owner[1]})"]))
    area, rate = ([row[part, metric] for part in ("value", "ci_low", "ci_high")]
                  for metric in ("auroc", RATE))  # fmt: skip
    counts = [int(row[part, "auroc"]) for part in ("members", "non_members")]
    if np.isnan(area[1]):
        return f"{name}: not judged, {counts[0]} members and {counts[1]} others are too few."
    found = "members have the lower loss" if area[1] > 0.5 else (
        "members even have the higher loss" if area[2] < 0.5 else "no better than guessing"
    )  # fmt: skip
    stated = (f"finds {rate[0]:.1%} ({rate[1]:.1%} to {rate[2]:.1%}) of them at 1 % false positives"
              if not np.isnan(rate[0]) else
              f"a rate at 1 % false positives needs {FEWEST} others")  # fmt: skip
    return (
        f"{name}: AUC {area[0]:.3f} ({area[1]:.3f} to {area[2]:.3f}), {found}; {stated}"
        f" ({counts[0]:,} members, {counts[1]:,} others)."
    )
