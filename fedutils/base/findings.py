"""Findings are the data's: which columns of a table they are, and what no finding means."""

import difflib
import re
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from .errors import InputError

NO_FINDING = "No Finding"
SPLITS = ("train", "val", "test")
# The columns of our tables that are about films, patients, clients and models: any other is a
# finding, and no finding may be called as one of these.
NO_FINDINGS = frozenset((
    "image_index", "row", "source", "patient_id", "follow_up", "age", "sex", "view", "width",
    "height", "spacing", "scanner", "official_split", "split", "client", "path", "arm", "seed",
    "patients", "films", *SPLITS, NO_FINDING,
))  # fmt: skip


def findings_of(table: pd.DataFrame) -> list[str]:
    """Return the findings of a table of films, predictions or shares: all other columns, in order.

    Their order is that of the data, and so of the model's outputs.
    """
    return [column for column in table.columns if column not in NO_FINDINGS]


def spelled_twice(names: Iterable[str]) -> list[str]:
    """Return two findings that differ in case, blanks and other signs alone; none if none do."""
    seen: dict[str, str] = {}
    for name in names:
        one = seen.setdefault(re.sub(r"[\W_]", "", name).lower(), name)
        if one != name:
            return [one, name]
    return []


def choose_findings(known: Iterable[str], asked: str) -> list[str]:
    """Return the findings of a list with commas, in the data's order; all of them for "".

    Raises InputError that names the nearest known one.
    """
    known, wanted = list(known), [name.strip() for name in asked.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            hint += f"known: {', '.join(known)}"
            raise InputError(f"findings={asked!r}: the data do not know {name!r}; {hint}")
    return [name for name in known if name in wanted or not wanted]


def format_labels(labels: Mapping[str, float]) -> str:
    """Write a film's labels by finding as 'Effusion|Mass'; with NaN it says how many are known."""
    names = [finding for finding, mark in labels.items() if mark == 1]
    known = sum(not np.isnan(mark) for mark in labels.values())
    none = NO_FINDING if known == len(labels) else f"none of {known} known"
    return "|".join(names) or (none if known else "not labelled")


def no_finding(labels: pd.DataFrame) -> pd.Series:
    """Tell which films show none of the findings: 1 or 0 a row, NaN where a gap leaves it open.

    `labels` has a column a finding with 0, 1 or NaN. A finding that nobody looked for on any film
    is left aside; a row's own gap beside zeros is not.
    """
    known = labels.loc[:, labels.notna().any()]
    absent = (known == 0).all(axis=1) & (known.shape[1] > 0)
    return absent.astype(float).where(absent | (known == 1).any(axis=1))
