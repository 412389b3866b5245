"""Checks of a table and its files, and a summary of what was found."""

import pandas as pd

from ..base.findings import FINDINGS
from .read import NihData

# Every check, in the order of the report, and what it means for the work that follows.
CHECKS = {
    "missing films": "rows without a file: they cannot be prepared",
    "orphaned films": "files without a row: they have no labels and are not used",
    "films in two folders": "NIH's file name twice: the first folder's film is used",
    "duplicate rows": "the same film in several rows: the first row is used",
    "duplicate rows that disagree": "their labels differ: the first row's are used",
    "labels in another spelling": "aliases or repeats in the label text: read as meant",
    "ages out of range": "0 or less, or above 100 years: typing errors, kept as they are",
    "ages unreadable": "no number in the age, or no age at all: not-a-number",
    "patients in several spellings": "ids such as 12 and 12.0, or p7 and P7: read as one patient",
    "patients with two sexes": "a typing error, or two patients under one id",
    "rows without pixel spacing": "no scanner known: no split by scanner for these films",
    "rows in no list": "the lists leave them out of train, validation and test",
    "rows in both lists": "counted as test, so that they are never trained on",
    "patients in both lists": "a leak: such a split is refused",
    "list names without row": "the list names films that the table does not know",
    "boxes without row": "boxes of films that the table does not know",
    "other tables": "further label tables in the folder: not read",
}


def check_table(data: NihData) -> pd.DataFrame:
    """Check the table and the list of files (never pixels).

    Returns one row a check: `check, count, examples` (up to five, as text) and `meaning`; a
    count of 0 is a check that passed.
    """
    table = data.table
    listed = table[table["official_split"] != ""]
    several = {}  # the patients who have more than one value in a column
    for column in ("sex", "official_split"):
        values = table[table[column] != ""].groupby("patient_id")[column].nunique()
        several[column] = values.index[values > 1]
    hits = {
        "missing films": table["image_index"][table["path"] == ""],
        "ages out of range": table["image_index"][(table["age"] > 100) | (table["age"] <= 0)],
        "ages unreadable": table["image_index"][table["age"].isna()],
        "patients with two sexes": several["sex"],
        "rows without pixel spacing": table["image_index"][table["scanner"] == ""],
        "rows in no list": table["image_index"].drop(listed.index if data.lists else table.index),
        "patients in both lists": several["official_split"],
        "boxes without row": sorted(set(data.boxes["image_index"]) - set(table["image_index"])),
    }
    hits = {check: list(hits.get(check, data.found.get(check, ()))) for check in CHECKS}
    rows = [(name, len(hit), ", ".join(hit[:5]), CHECKS[name]) for name, hit in hits.items()]
    return pd.DataFrame(rows, columns=["check", "count", "examples", "meaning"])


def summary(data: NihData) -> dict[str, object]:
    """Tell what was found: films, patients, views, scanners, ages, lists, and what is missing."""
    table = data.table
    names = ["view", "sex", "scanner", "official_split"]
    named = table[names].where(table[names] != "")
    views, sexes, scanners, lists = (named[name].value_counts().to_dict() for name in names)
    parts = {
        "films": data.films_present, "split lists": data.lists, "boxes": len(data.boxes),
        "scanners" if data.release == "own" else "pixel spacing": scanners,
        "ages": table["age"].count(), "sexes": sexes, "views": views,
    } | dict(table[list(FINDINGS)].count())  # fmt: skip
    return {
        "folder": str(data.folder), "table": data.table_file, "release": data.release,
        "films": len(table), "films_present": data.films_present,
        "patients": table["patient_id"].nunique(),
        "views": views, "sexes": sexes, "scanners": scanners, "lists": lists,
        "age_min": float(table["age"].min()), "age_max": float(table["age"].max()),
        "boxes": len(data.boxes), "missing": [part for part, found in parts.items() if not found],
    }  # fmt: skip
