"""differences.csv: paired differences between models, and what they show."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from .bootstrap import tabulate_values
from .tables import ALL_FILMS, MEAN, MEAN_LOCAL, METRICS, NOT_SHOWN, SHOWN, Draws, Owner, name_rows

DIFFERENCES = [
    "test_set", "first", "second", "finding", "metric", "value", "ci_low", "ci_high", "p", "p_holm",
    "seeds", "seeds_agree", "seed_low", "seed_high", "verdict",
]  # fmt: skip


def difference_rows(draws: Mapping[Owner, Draws], clients: Sequence[str]) -> pd.DataFrame:
    """Return the rows of `differences.csv`: the federated model minus each other, paired.

    On all films: minus the centralised, each local model, and the mean local model. On the films of
    a client: minus the centralised, and minus that client's own model. See `tabulate_differences`;
    no row where the federated arm is alone, or was not trained.
    """
    others = {("centralised", ""): "centralised", ("local", ""): MEAN_LOCAL}
    others |= {("local", client): f"local {client}" for client in clients}
    tables = []
    for (arm, client), second in others.items():
        on = [ALL_FILMS, *clients] if arm == "centralised" else [ALL_FILMS, *filter(None, [client])]
        for name in on:
            pair = draws_by_seed(draws, name), draws_by_seed(draws, name, arm, client)
            tables.append(pair_rows(*pair, test_set=name, first="federated", second=second))
    return join_rows(tables)


def draws_by_seed(
    draws: Mapping[Owner, Draws], test_set: str, arm: str = "federated", client: str = ""
) -> dict[str, np.ndarray]:
    """Return a model's draws on one test set by seed, "" for the mean; empty if not trained."""
    return {s: draws[a, s, c][test_set] for a, s, c in draws if (a, c) == (arm, client)}


def pair_rows(
    one: Mapping[str, np.ndarray], two: Mapping[str, np.ndarray], **names: str
) -> pd.DataFrame:
    """Tabulate the difference of two models' draws, by seed where both have it; empty without."""
    if not one or not two:
        return pd.DataFrame(columns=DIFFERENCES)
    whole = one[""] - two[""]
    seeds = [seed for seed in one if seed and seed in two] or [""]
    values = np.array([(one[seed] - two[seed])[..., 0] for seed in seeds])
    return name_rows(tabulate_differences(whole, values, METRICS[: len(whole)]), names)


def join_rows(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Put the rows of several pairs below each other."""
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=DIFFERENCES)


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
        table = tabulate_values(metric, draws[k])
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
