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
OF_A_SIDE = "_low", "_high", "_positives"


def lay_beside(
    inside: tuple[pd.DataFrame, pd.DataFrame],
    outside: tuple[pd.DataFrame, pd.DataFrame],
    seed: int,
    repeats: int = REPEATS,
) -> pd.DataFrame:
    """Tabulate the AUROC of the same models on two sets of films without a common patient.

    Each side is predictions and the index of its films. Returns a row an arm (mean over seeds, and
    over local models) and finding that both sides have patients enough of, then their `mean`:
    `arm, finding`, `internal` and `external` with `_low, _high, _positives`, and `difference`,
    external - internal, with `_low, _high`; no row without such a finding. Intervals (95 %) are
    over patients. That of the difference of independent figures is made of theirs, so that it
    holds with few positives as these do (MOVER: Zou and Donner, Stat. Med. 2008).
    """
    both = [_by_film(*side) for side in (inside, outside)]
    kept = [{*_judged(index)} for _, index in both]
    others = [name for name in findings_of(both[0][1]) if name not in kept[0] & kept[1]]
    if not kept[0] & kept[1]:
        return pd.DataFrame(columns=["arm", "finding", *SIDES, "difference"])
    parts = []
    for name, side in zip(SIDES, both, strict=True):
        predicted, index = (part.drop(columns=others) for part in side)
        groups = {"all": {tables.ALL_FILMS: np.full(len(index), True)}}
        _, metrics, _, _ = evaluate_parts(predicted, index, groups, seed, repeats)
        rows = tables.over_seeds(tables.rows_of(metrics, metric="auroc", client=""))
        rows = rows.set_index(["arm", "finding"])[["value", "ci_low", "ci_high", "positives"]]
        parts.append(rows.set_axis([name, *(f"{name}{end}" for end in OF_A_SIDE)], axis=1))
    table = pd.concat(parts, axis=1).reset_index()
    (low, high), (low_there, high_there) = (
        [abs(table[f"{name}{end}"] - table[name]) for end in OF_A_SIDE[:2]] for name in SIDES
    )
    table["difference"] = table["external"] - table["internal"]
    table["difference_low"] = table["difference"] - np.hypot(low_there, high)
    table["difference_high"] = table["difference"] + np.hypot(high_there, low)
    return table


def _by_film(predictions: pd.DataFrame, index: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return predictions with the rows of the index that they are of."""
    return predictions, index.set_index("image_index").loc[predictions["image_index"].unique()]


def _judged(index: pd.DataFrame) -> list[str]:
    """Return the findings that films have patients enough of."""
    judged = evaluable_findings(tables.truth_of(index), index["patient_id"].to_numpy())
    return [findings_of(index)[k] for k in judged]


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
    found = sorted(settings.run.glob("external/*/summary.json"))
    shown = [_for_reading(tables.read_table(file.with_name("external.csv"))) for file in found]
    shown = [table.assign(films=file.parent.name) for table, file in zip(shown, found, strict=True)]
    columns = ["films", "arm", "finding", *SIDES, "difference"]
    table = pd.concat([pd.DataFrame(columns=columns), *(part for part in shown if len(part))])
    return [json.loads(file.read_text())["sentence"] for file in found], table


def _for_reading(table: pd.DataFrame) -> pd.DataFrame:
    """Lay out external.csv, a row an arm and finding; AUROC with its interval as text."""
    shown = table[["arm", "finding"]].replace({"arm": {"local": tables.MEAN_LOCAL}})
    for name in (*SIDES, "difference") if len(table) else ():
        shown[name] = tables.texts_of(table, name, 3)
    return shown
