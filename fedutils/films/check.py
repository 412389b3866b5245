"""Checks of a table and its files, and a summary of what was found."""

import tomllib
from pathlib import Path

import pandas as pd

from ..base.findings import findings_of
from .cells import one_spelling
from .read import DataSet

CHECKS = tomllib.loads(Path(__file__).with_name("checks.toml").read_text())  # with their meanings


def check_table(data: DataSet) -> pd.DataFrame:
    """Check the table and the list of files (never pixels).

    Returns one row a check: `check, count, examples` (up to five, as text) and `meaning`; a
    count of 0 is a check that passed.
    """
    table = data.table
    listing = [name for name, part in (data.parts or {"": data}).items() if part.lists]
    unlisted = table["source"].isin(listing) & (table["official_split"] == "")
    several = {}  # the patients who have more than one value in a column
    for column in ("sex", "official_split"):
        values = table[table[column] != ""].groupby("patient_id")[column].nunique()
        several[column] = values.index[values > 1]
    ids = one_spelling(table["patient_id"].str.partition("/")[2]) if data.parts else table["source"]
    places = table["source"].groupby(ids).nunique()
    hits = {
        "missing films": table["image_index"][table["path"] == ""],
        "ages out of range": table["image_index"][(table["age"] > 100) | (table["age"] <= 0)],
        "ages unreadable": table["image_index"][table["age"].isna()],
        "views neither PA nor AP": table["image_index"][~table["view"].isin(["", "PA", "AP"])],
        "ids in two sources": places.index[places > 1],
        "patients with two sexes": several["sex"],
        "rows without pixel spacing": table["image_index"][table["scanner"] == ""],
        "rows in no list": table["image_index"][unlisted],
        "patients in both lists": several["official_split"],
        "boxes without row": sorted(set(data.boxes["image_index"]) - set(table["image_index"])),
    }
    hits = {check: list(hits.get(check, data.found.get(check, ()))) for check in CHECKS}
    rows = [(name, len(hit), ", ".join(hit[:5]), CHECKS[name]) for name, hit in hits.items()]
    return pd.DataFrame(rows, columns=["check", "count", "examples", "meaning"])


def summary(data: DataSet) -> dict[str, object]:
    """Tell what was found: films, patients, views, scanners, ages, lists, and what is missing."""
    table = data.table
    names = ["view", "sex", "scanner", "official_split"]
    named = table[names].where(table[names] != "")
    views, sexes, scanners, lists = (named[name].value_counts().to_dict() for name in names)
    parts = {
        "films": data.films_present, "split lists": data.lists, "boxes": len(data.boxes),
        "scanners" if data.release == "own" else "pixel spacing": scanners,
        "ages": table["age"].count(), "sexes": sexes, "views": views,
    } | dict(table[findings_of(table)].count())  # fmt: skip
    return {
        "folder": str(data.folder), "table": data.table_file, "release": data.release,
        "films": len(table), "films_present": data.films_present,
        "patients": table["patient_id"].nunique(),
        "views": views, "sexes": sexes, "scanners": scanners, "lists": lists,
        "age_min": float(table["age"].min()), "age_max": float(table["age"].max()),
        "boxes": len(data.boxes), "missing": [part for part, found in parts.items() if not found],
    }  # fmt: skip
