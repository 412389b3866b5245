"""Patients, never films, into training, validation and test."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..base.errors import InputError
from ..base.findings import SPLITS
from ..base.parameters import Parameters, parameter
from ..base.rng import generator

VAL_OF_TRAIN_VAL = 1 / 8  # of the patients in the official train_val list
TEST_BELOW, VAL_BELOW = 0.2, 0.3  # without lists: 20 % test, 10 % val, 70 % train


@dataclass(frozen=True)
class SplitParameters(Parameters):
    """Which patients and findings take part, and in which split."""

    seed: int = parameter(0, "fixes the split of patients and the partition to clients")
    max_films: int = parameter(
        0, "at most so many films, of whole patients, for a quick first result; 0: all",
        bounds=(0, math.inf),
    )  # fmt: skip
    findings: str = parameter(
        "", "those to train, such as Effusion,Mass, in the data's order; empty: all the data know"
    )


def split_patients(table: pd.DataFrame, seed: int) -> pd.Series:
    """Split the rows of a table by patient: 'train', 'val' or 'test', on the table's index.

    Wherever a row has an `official_split`, test is the official test list, and of the train_val
    patients those whose hash is under 1/8 are val; rows in no list get "" and are left out. Own
    lists may also name train and val.
    Without lists, a hash under 0.2 is test, under 0.3 val, else train. The hash is that of
    (seed, patient) alone, so a hospital that holds only its own patients gets the same answer.
    Of several sources each is split by its own lists, or by hash.

    Raises InputError if a patient is in both official lists.
    """
    source = table.get("source", pd.Series("", index=table.index))
    patients = table["patient_id"].unique()
    own = table["patient_id"].where(source == "", table["patient_id"].str.partition("/")[2])
    own = own[~table["patient_id"].duplicated()]  # as each source calls them
    digests = [hashlib.sha256(f"{seed}|{patient}|split".encode()).digest() for patient in own]
    shares = [int.from_bytes(digest[:6], "big") / 2**48 for digest in digests]
    hashed = table["patient_id"].map(dict(zip(patients, shares, strict=True)))
    official = table.get("official_split", pd.Series("", index=table.index))
    val = np.where(hashed < VAL_OF_TRAIN_VAL, "val", "train")
    names = ["test", "train_val", "train", "val"]
    listed = np.select([official == name for name in names], ["test", val, "train", "val"], "")
    free = np.select([hashed < TEST_BELOW, hashed < VAL_BELOW], ["test", "val"], "train")
    has_lists = (official != "").groupby(source).transform("any")
    split = pd.Series(np.where(has_lists, listed, free), index=table.index, name="split")
    assert_disjoint(table["patient_id"][split != ""], split[split != ""], "split")
    return split


def check_splits(table: pd.DataFrame, seed: int, why: str = "") -> None:
    """Raise InputError unless the films, which are there, are in train, val and test (`split`)."""
    if empty := [name for name in SPLITS if not (table["split"] == name).any()]:
        raise InputError(
            f"{why}seed={seed}: of those with films, none of"
            f" {table['patient_id'].nunique()} patients falls to {' or '.join(empty)}; give more"
            " patients or the missing films, a larger max_films, another seed, or split lists"
        )


def leak_of_splits(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Compare splitting films with splitting patients: which held-out films leak?

    Returns `split, share`: for each way, the share (0 to 1) of held-out films whose patient also
    has films in training. Films are split at random with as many held out as by patient.
    """
    patients, held_out = table["patient_id"], ~split_patients(table, seed).isin(["train", "val"])
    order = generator(seed, "image-level split").permutation(len(table))
    ways = {"by film": held_out.to_numpy()[order], "by patient": held_out.to_numpy()}
    shares = [patients[held].isin(patients[~held]).mean() for held in ways.values()]
    return pd.DataFrame({"split": list(ways), "share": shares})


def assert_disjoint(patients: pd.Series, groups: pd.Series, what: str) -> None:
    """Raise InputError, naming patients, unless each patient's rows are all in one group."""
    pairs = pd.DataFrame({"patient": patients, "group": groups}).drop_duplicates()
    straddling = pairs["patient"][pairs["patient"].duplicated()].unique()
    if len(straddling):
        names = ", ".join(map(str, straddling[:5]))
        found = f"{len(straddling)} patients are in more than one {what}, such as {names}"
        raise InputError(f"{found}; correct the split lists or the patient ids")


def choose_films(table: pd.DataFrame, max_films: int, seed: int) -> pd.DataFrame:
    """Return at most `max_films` films (0: all) of whole patients, drawn by patient."""
    if not max_films or len(table) <= max_films:
        return table
    films = table["patient_id"].value_counts().sort_index()
    total = films.iloc[generator(seed, "max_films").permutation(len(films))].cumsum()
    return table[table["patient_id"].isin(total.index[total <= max_films])]
