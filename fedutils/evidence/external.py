"""External tests: a run's models on films that they never saw, beside its own test films."""

import json

import numpy as np
import pandas as pd

from ..base.findings import findings_of
from ..base.parameters import Parameters
from ..dataset import ChestXrayDataset
from ..films.twins import find_twins
from . import tables
from .metrics import REPEATS, evaluable_findings, evaluate_parts

SIDES = "internal", "external"


def lay_beside(sides: list[tuple[pd.DataFrame, pd.DataFrame]], seed: int) -> pd.DataFrame:
    """Tabulate the AUROC of the same models on two sets of films without a common patient.

    Each side is predictions and the index of its films. Returns a row an arm (mean over seeds, and
    over local models) and finding that both sides have patients enough of, then their `mean`:
    `arm, finding`, `internal`, `external` and their `difference`, each with `_low` and `_high`.
    Intervals (95 %) are over patients; the difference's is made of the other two, which are
    independent, and holds with few positives as they do (MOVER: Zou and Donner, Stat. Med. 2008).
    """
    sides = [(p, i.set_index("image_index").loc[p["image_index"].unique()]) for p, i in sides]
    groups = [(tables.truth_of(index), index["patient_id"].to_numpy()) for _, index in sides]
    enough = set.intersection(*({*evaluable_findings(*group)} for group in groups))
    others = [name for k, name in enumerate(findings_of(sides[0][1])) if k not in enough]
    parts = []
    for name, (predictions, index) in zip(SIDES, sides, strict=True):
        index = index.assign(**dict.fromkeys(others, np.nan))  # then the mean is over the rest
        whole = {"all": {tables.ALL_FILMS: np.full(len(index), True)}}
        _, metrics, _, _ = evaluate_parts(predictions, index, whole, seed, REPEATS)
        rows = tables.over_seeds(tables.rows_of(metrics, metric="auroc", client=""))
        rows = rows.set_index(["arm", "finding"])[["value", "ci_low", "ci_high"]]
        parts.append(rows.set_axis([name, f"{name}_low", f"{name}_high"], axis=1))
    table = pd.concat(parts, axis=1).dropna()
    near, far = (table[part.columns].T.to_numpy() for part in parts)  # value, low, high
    gap = far[0] - near[0]
    table["difference"] = gap
    table["difference_low"] = gap - np.hypot(far[0] - far[1], near[2] - near[0])
    table["difference_high"] = gap + np.hypot(far[2] - far[0], near[0] - near[1])
    return table.reset_index()


def films_in_both(trained: ChestXrayDataset, films: ChestXrayDataset) -> list[list[str]]:
    """Name the pairs of near-equal films: one of training, and one of the films to test on.

    An id stands for two patients. Both stores, of one image size, are held in memory.
    """
    sides = trained, films
    store = np.concatenate([side.store[side.index["row"].to_numpy()] for side in sides])
    index = pd.concat([side.index.assign(source=k) for k, side in enumerate(sides)])
    near = find_twins(store, index.assign(row=np.arange(len(index))))
    return near.loc[near["two_splits"], ["film", "twin"]].to_numpy().tolist()


def read_external(settings: Parameters) -> tuple[list[str], pd.DataFrame]:
    """Read all external tests of a run: their sentences, and one table for reading."""
    found, shown = sorted(settings.run.glob("external/*/summary.json")), [pd.DataFrame()]
    for file in found:
        table = tables.read_table(file.with_name("external.csv"))
        texts = {name: tables.texts_of(table, name, 3) for name in (*SIDES, "difference")}
        table = table[["arm", "finding"]].assign(**texts)
        shown.append(tables.name_rows(table, {"films": file.parent.name}))
    return [json.loads(file.read_text())["sentence"] for file in found], pd.concat(shown)
