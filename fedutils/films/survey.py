"""What a hospital tells of its films before any training: counts, none of a few patients."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..base.findings import SPLITS
from ..dataset import ChestXrayDataset, read_report
from .suspects import mean_films

HIDDEN = -1  # in place of a count
DECADES = range(0, 110, 10)  # years: from; the last one holds all above
SAME = ("image_size", "seed", "findings")  # what must be alike everywhere


def describe_films(prepared: Path, least: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """Describe prepared films in counts of at least `least` patients, and by their mean film.

    Returns `release`, `image_size`, `seed`, `findings`; films and patients by `split`; films by
    `age`, `sex` and `view`; of each finding the films that are `known`, and those `positive`. What
    is of fewer patients is HIDDEN; so is what would give it away. The mean film is uint8 (S, S),
    None of fewer patients.
    """
    report, films = read_report(prepared), ChestXrayDataset(prepared)
    index, names = films.index, films.findings
    bands = [f"{age}-{age + 9}" for age in DECADES[:-1]] + [f"{DECADES[-1]}+"]
    ages = pd.cut(index["age"], [*DECADES, np.inf], right=False, labels=bands).astype(object)
    found = {"release": report["release"], "findings": names}
    found |= {key: report[key] for key in ("image_size", "seed")}
    found["split"] = count_groups(index, index["split"], least, SPLITS)
    found["split patients"] = count_groups(index, index["split"], least, SPLITS, "patients")
    for name, column in (("age", ages), ("sex", index["sex"]), ("view", index["view"])):
        known = column.fillna("").astype(str).replace("", "unknown")
        found[name] = count_groups(index, known, least, [b for b in bands if name == "age"])
    found |= {"known": {}, "positive": {}}
    for finding in names:
        marks = index[finding].map({1.0: "positive", 0.0: "negative"}).dropna()
        whole = count_groups(index.loc[marks.index], marks * 0 + "known", least, ["known"])
        parts = count_groups(index.loc[marks.index], marks, least, ["positive", "negative"])
        found["known"][finding] = whole["known"]
        found["positive"][finding] = parts["positive"] if whole["known"] >= 0 else HIDDEN
    if index["patient_id"].nunique() < max(least, 1):
        return found, None
    whole = mean_films(films.store, index.assign(source="", scanner="all"))
    return found, next(iter(whole.values()))


def count_groups(
    index: pd.DataFrame, group: pd.Series, least: int, names: Any = (), what: str = "films"
) -> dict[str, int]:
    """Count films, or patients, by group; those in `names` first, in their order, if only as none.

    A group of fewer than `least` patients is HIDDEN. Where all hidden ones together are fewer, too,
    so that a total gives them away, the smallest of the others goes with them.
    """
    rows = index.groupby(group)["patient_id"].agg(films="size", patients="nunique")
    order = [*names, *(name for name in rows.index if name not in names)]
    rows = rows.reindex(order, fill_value=0)
    hidden = rows["patients"] < least
    while 0 < rows.loc[hidden, "patients"].sum() < least and not hidden.all():
        hidden[rows.loc[~hidden, "patients"].idxmin()] = True
    return rows[what].mask(hidden, HIDDEN).astype(int).to_dict()


def tabulate_surveys(surveys: Mapping[str, Mapping[str, Any]], least: str = "few") -> pd.DataFrame:
    """Lay surveys side by side, a column a hospital: counts of films; `least` stands for HIDDEN."""

    def write(count: int) -> str:
        """Write a count."""
        return least if count == HIDDEN else f"{count:,}"

    columns = {}
    for name, one in surveys.items():
        rows = {"data": one["release"], "pixels": str(one["image_size"]), "seed": str(one["seed"])}
        for split, count in one["split"].items():
            rows[f"{split} films"] = write(count)
            rows[f"{split} patients"] = write(one["split patients"][split])
        for group in ("sex", "view", "age"):
            rows |= {f"{group} {key}": write(n) for key, n in one[group].items() if n}
        for finding, known in one["known"].items():
            rows[finding] = f"{write(one['positive'][finding])} of {write(known)}"
        columns[name] = pd.Series(rows)
    return pd.DataFrame(columns).fillna("")


def differing(surveys: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say what is not alike at all hospitals and would end a run, a line each."""
    lines = []
    for key in SAME:
        values: dict[str, list[str]] = {}
        for name, one in surveys.items():
            value = one[key]
            said = ", ".join(value) if isinstance(value, list) else str(value)
            values.setdefault(said, []).append(name)
        if len(values) > 1:
            told = "; ".join(f"{', '.join(names)}: {said}" for said, names in values.items())
            lines.append(f"{key} differs: {told}")
    return lines


def shares(surveys: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return what `plots.client_heatmap` draws; a share of a hidden count is NaN."""
    rows = {}
    for name, one in surveys.items():
        row = {
            "films": sum(n for n in one["split"].values() if n > 0),
            "patients": sum(n for n in one["split patients"].values() if n > 0),
        }
        for finding, known in one["known"].items():
            positive = one["positive"][finding]
            row[finding] = positive / known if min(positive, known - 1) >= 0 else np.nan
        rows[name] = row
    return pd.DataFrame(rows).T.astype({"films": int, "patients": int})
