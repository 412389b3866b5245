"""differences.csv: paired differences between models, and what they show."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from . import tables
from .bootstrap import variance
from .intervals import detectable, difference_interval, seed_variance
from .tables import ALL_FILMS, MEAN, MEAN_LOCAL, METRICS, Draws, Owner

DIFFERENCES = [
    "test_set", "first", "second", "finding", "metric", "value", "ci_low", "ci_high", "p", "p_holm",
    "seeds", "seed_low", "seed_high", "detectable_3", "detectable_5", "verdict",
]  # fmt: skip
Enough = Mapping[str, pd.Series]  # by test set: which findings, by name, have patients enough


def difference_rows(
    draws: Mapping[Owner, Draws], clients: Sequence[str], enough: Enough
) -> pd.DataFrame:
    """Return the rows of `differences.csv`: the federated model minus each other, paired.

    On all films: minus the centralised, each local model, and the mean local model. On the films of
    a client: minus the centralised, and minus that client's own model. See `tabulate_differences`;
    no row where the federated arm is alone, or was not trained.
    """
    others = {("centralised", ""): "centralised", ("local", ""): MEAN_LOCAL}
    others |= {("local", client): f"local {client}" for client in clients}
    pairs = []
    for (arm, client), second in others.items():
        on = [ALL_FILMS, *clients] if arm == "centralised" else [ALL_FILMS, *filter(None, [client])]
        for name in on:
            ours, theirs = draws_by_seed(draws, name), draws_by_seed(draws, name, arm, client)
            names = {"test_set": name, "first": "federated", "second": second}
            pairs.append(pair_rows(ours, theirs, enough[name], names))
    return join_rows(pairs)


def draws_by_seed(
    draws: Mapping[Owner, Draws], test_set: str, arm: str = "federated", client: str = ""
) -> dict[str, np.ndarray]:
    """Return a model's draws on one test set by seed, "" for the mean; empty if not trained."""
    return {s: draws[a, s, c][test_set] for a, s, c in draws if (a, c) == (arm, client)}


def pair_rows(
    one: Mapping[str, np.ndarray],
    two: Mapping[str, np.ndarray],
    enough: pd.Series,
    names: Mapping[str, str],
) -> pd.DataFrame:
    """Tabulate the difference of two models' draws by seed; empty where one was not trained."""
    if not one or not two:
        return pd.DataFrame(columns=DIFFERENCES)
    sides = [np.array([draws[s][..., 0] for s in draws if s]) for draws in (one, two)]
    return tables.name_rows(tabulate_differences(one[""] - two[""], sides, enough), names)


def join_rows(pairs: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Put the rows of several pairs below each other, adjust p, and judge.

    The primary hypotheses, which stand apart, are two: the mean AUROC on all films, federated
    against centralised and against the mean local model. All other p of the table are adjusted
    together by `holm`. A difference is `shown` where its adjusted p is below 0.05. Of the primary
    ones `detectable_3` and `_5` say what so many seeds a side would show four times in five here.
    """
    pairs = [rows for rows in pairs if len(rows)]
    if not pairs:
        return pd.DataFrame(columns=DIFFERENCES)
    table = pd.concat(pairs, ignore_index=True)
    primary = table["second"].isin(["centralised", MEAN_LOCAL]) & (table["test_set"] == ALL_FILMS)
    primary &= (table["finding"] == MEAN) & (table["metric"] == METRICS[0])
    for count in (3, 5):  # not of the others: Holm asks for more there
        spreads = table.loc[primary, ["over_patients", "over_seeds"]].to_numpy()
        table.loc[primary, f"detectable_{count}"] = [detectable(*pair, count) for pair in spreads]
    table["p_holm"] = table["p"].where(primary)
    table.loc[~primary, "p_holm"] = holm(table.loc[~primary, "p"].to_numpy())
    table["verdict"] = np.where(table["p_holm"] < 0.05, tables.SHOWN, tables.NOT_SHOWN)
    table.loc[table["seeds"] < 2, "verdict"] = tables.ONE_SEED
    table.loc[table["few"], "verdict"] = tables.FEW
    table.loc[table["value"].isna(), "verdict"] = "not defined"
    return table[DIFFERENCES]


def tabulate_differences(
    draws: np.ndarray, sides: Sequence[np.ndarray], enough: pd.Series
) -> pd.DataFrame:
    """Tabulate paired differences and their variances: for each metric the findings, then `mean`.

    `draws` (metrics, findings + 1, 1 + repeats) is the mean over seeds of one model's draws minus
    the other's on the same resamples, `sides` the values of each (seeds, metrics, findings + 1) by
    seed, `enough` which findings have patients enough to be judged. Intervals hold two components,
    patients and training seeds (`difference_interval`); `over_seeds` is that of a single seed.
    """
    value, patients = draws[..., 0], variance(draws)
    seeds = [seed_variance(side) for side in sides]
    low, high, p = difference_interval(value, patients, seeds)
    spread = (sides[0][:, None] - sides[1][None]).reshape(-1, *value.shape)
    one = sum(of_mean * len(side) for (of_mean, _), side in zip(seeds, sides, strict=True)) / 2
    few = np.r_[~enough, False]
    parts = []
    for k, metric in enumerate(METRICS[: len(draws)]):
        table = pd.DataFrame({
            "finding": [*enough.index, MEAN], "metric": metric, "few": few, "value": value[k],
            "ci_low": low[k], "ci_high": high[k], "p": p[k], "seeds": min(map(len, sides)),
            "seed_low": spread[:, k].min(axis=0), "seed_high": spread[:, k].max(axis=0),
            "over_patients": patients[k], "over_seeds": one[k],
        })  # fmt: skip
        table.loc[few, ["ci_low", "ci_high", "p"]] = np.nan
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def holm(p: np.ndarray) -> np.ndarray:
    """Adjust p values (k,) for their number, step down (Holm 1979); NaN does not count."""
    adjusted, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted
