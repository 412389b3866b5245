"""Films of your own: a mapping file says what the columns of any table mean.

The mapping, `films.toml`, lies beside the table and says in TOML, ours on the left and yours on
the right, which columns hold the image, the patient and so on (`[columns]`), and which columns, or
which words of one column (`[labels]`), are the findings (`[findings]`). data/README.md shows it.
What the mapping leaves out is unknown, never negative.
"""

import csv
import io
import posixpath
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..base.errors import InputError
from ..base.findings import NO_FINDINGS, SPLITS
from .find import MAPPING_NAME

# What [columns] may name, and the column of `read_nih`'s rows that it becomes.
COLUMNS = {
    "image": "image_index", "patient": "patient_id", "view": "view", "age": "age", "sex": "sex",
    "scanner": "scanner", "follow_up": "follow_up", "split": "split",
}  # fmt: skip
KEYS = {"": ("table", "columns", "findings", "labels"), "columns": tuple(COLUMNS),
        "findings": (), "labels": ("column", "separator", "none", "ignore")}  # fmt: skip
MARKS = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "": np.nan}
MARK_SEPARATOR = "\x1f"  # joins the marks of one row into a text, as no cell holds it


@dataclass(frozen=True)
class OwnTable:
    """A mapping as read. `columns` is by our names; `words` maps yours to ours.

    With a column of `labels`, `words` are the words in it, in lower case, with "" for a word that
    says nothing about the findings and "none" for one that says that there is no finding;
    without one, `words` are columns of marks.
    """

    file: Path
    columns: dict[str, str]
    words: dict[str, str]
    labels: str = ""
    separator: str = ""

    @property
    def findings(self) -> list[str]:
        """The findings that the mapping names, in its order."""
        return [name for name in dict.fromkeys(self.words.values()) if name not in ("", "none")]

    def read(self, text: str) -> pd.DataFrame:
        """Turn the table's text into rows of text with our column names; the index is the line.

        `labels` holds what `parse` reads: the label text, or the marks of all columns. Raises
        InputError for a column that is not there, and for a split or a row that cannot be read.
        """
        raw = _read_cells(text, self.file)
        marks = [self.labels] if self.labels else list(self.words)
        for column in [*self.columns.values(), *marks]:
            if (times := list(raw.columns).count(column)) != 1:
                raise InputError(
                    f"{self.file}: {times or 'no'} columns {column!r}, which {MAPPING_NAME} names;"
                    f" found {', '.join(raw.columns)}; correct {MAPPING_NAME}"
                )
        rows = raw[list(self.columns.values())].set_axis(list(self.columns), axis=1)
        rows = rows.reindex(columns=list(COLUMNS.values()), fill_value="")
        for line, split in rows["split"][~rows["split"].isin(["", *SPLITS])].items():
            todo = "write train, val or test, or leave it empty"
            raise InputError(f"{self.file}, line {line}: split {split!r}; {todo}")
        # A scanner may become a client, whose name is part of file names.
        plain = rows["scanner"].str.replace(r"[^\w.-]+", "-", regex=True)
        for text, several in rows["scanner"].groupby(plain):
            if several.nunique() > 1:
                told = " and ".join(map(repr, sorted(several.unique())[:2]))
                raise InputError(f"{self.file}: scanners {told} would both be {text!r}; rename one")
        return rows.assign(
            labels=[MARK_SEPARATOR.join(row) for row in raw[marks].to_numpy()],
            sex=rows["sex"].str.upper().str[:1], view=rows["view"].str.upper(),
            scanner=plain,
        )  # fmt: skip

    def parse(self, text: str) -> np.ndarray:
        """Turn a row's `labels` into float32 (findings,): 1, 0, or NaN where nobody looked.

        Raises InputError on a mark that is not 0, 1 or empty, on an unknown word, and on a word for
        no finding beside a finding.
        """
        if self.labels:
            return self._parse_words(text)
        vector = np.full(len(self.findings), np.nan, np.float32)
        marks = zip(self.words.items(), text.split(MARK_SEPARATOR), strict=True)
        for (column, finding), mark in marks:
            if mark not in MARKS:
                todo = "write 1 for present, 0 for absent, or leave it empty for unknown"
                raise InputError(f"column {column!r} ({finding}) holds {mark!r}; {todo}")
            vector[self.findings.index(finding)] = MARKS[mark]
        return vector

    def _parse_words(self, text: str) -> np.ndarray:
        """Read the words of a label text; an empty text is unknown. See `parse`."""
        words = [word.strip().lower() for word in text.split(self.separator) if word.strip()]
        for word in words:
            if word not in self.words:
                raise InputError(
                    f"column {self.labels!r} holds the unknown word {word!r}; name it in"
                    f" {MAPPING_NAME} under [findings], or under none or ignore in [labels]"
                )
        said = {self.words[word] for word in words}
        if "none" in said and said & {*self.findings}:
            raise InputError(f"a word for no finding stands beside a finding in {text!r}")
        known = {*self.words.values()} if words else {}
        return np.array([f in said if f in known else np.nan for f in self.findings], np.float32)


def film_name(column: pd.Series) -> pd.Series:
    """Write a film's name, or its path below the folder, in one way: `a/b.png`, composed."""
    column = column.str.replace("\\", "/").str.normalize("NFC")
    return column.where(~column.str.contains("/"), column.map(posixpath.normpath))


def own_lists(rows: pd.DataFrame, listed: dict[str, list[str]], file: Path) -> dict[str, set[str]]:
    """Unite own split lists with the column `split`: films by split; empty if there are none.

    Without a list for validation, `train` becomes NIH's `train_val`, of which a share of patients
    is set aside. Raises InputError unless there are films to train and films to test on.
    """
    lists = {k: {*film_name(pd.Series(v, dtype=str).str.strip())} - {""} for k, v in listed.items()}
    for split, films in rows["image_index"].groupby(rows["split"]):
        if split:
            lists.setdefault(split, set()).update(films)
    if "train" in lists and "val" not in lists:
        lists["train_val"] = lists.pop("train") | lists.get("train_val", set())
    if lists and not ("test" in lists and {"train", "train_val"} & {*lists}):
        found = f"the lists or the column of splits name {', '.join(lists)} alone"
        raise InputError(f"{file}: {found}; name films for train and for test, or none at all")
    return lists


def read_mapping(folder: Path) -> OwnTable | None:
    """Read the mapping of a folder; None if it has none.

    Raises InputError, which names the file and the key, for a file that is no TOML, an unknown key
    or finding, a value that is no text, something missing, and one word that means two things.
    """
    path = folder / MAPPING_NAME
    if not path.exists():
        return None
    try:
        given = tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); see data/README.md") from None
    try:
        _check_keys(given)
        words = _words(given)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    table, labels = folder / given["table"], given.get("labels", {})
    if not table.exists():
        there = ", ".join(sorted(p.name for p in folder.glob("*.csv*"))) or "none"
        raise InputError(f"{path}: table {table.name!r} is not there; tables beside it: {there}")
    ours = {COLUMNS[name]: column for name, column in given["columns"].items()}
    return OwnTable(table, ours, words, labels.get("column", ""), labels.get("separator", ""))


def _check_keys(given: Mapping[str, Any]) -> None:
    """Raise InputError for an unknown or a missing key of the mapping, or one that is no text."""
    parts = {section: given.get(section, {}) if section else given for section in KEYS}
    for section, part in parts.items():
        if not isinstance(part, dict):
            raise InputError(f"{section} = {part!r}; write a section [{section}]")
        for key in (key for key in part if section != "findings" and key not in KEYS[section]):
            where = f" in [{section}]" if section else ""
            told = f"unknown {key!r}{where}; known: {', '.join(KEYS[section])}"
            raise InputError(told)
    needed = [("", "table"), ("columns", "image"), ("columns", "patient")]
    needed += [("labels", key) for key in ("column", "separator") if "labels" in given]
    for section, key in needed:
        if not parts[section].get(key):
            where = f"[{section}] has no" if section else "no"
            raise InputError(f'{where} {key}; add {key} = "..." (see data/README.md)')
    if not given.get("findings"):
        raise InputError("[findings] is missing or empty; name what is to be found")
    for name in given["findings"]:
        if not re.fullmatch(r"\w[\w /()-]*", name) or name in {*NO_FINDINGS, "none"}:
            raise InputError(f"[findings] {name!r}: no name for a finding; choose another")
    for key, value in [*parts["columns"].items(), *parts["labels"].items()]:
        if key not in ("none", "ignore") and not (isinstance(value, str) and value):
            raise InputError(f'{key} = {value!r}; give a text, such as {key} = "..."')
    table = given["table"]
    if not (isinstance(table, str) and re.fullmatch(r"[^/\\]+\.csv(\.gz)?", table)):
        raise InputError(f"table = {table!r}; give the name of a .csv or .csv.gz beside it")


def _words(given: Mapping[str, Any]) -> dict[str, str]:
    """Map your words, or columns, to our findings; see `OwnTable`."""
    labels = given.get("labels", {})
    pairs = list(given["findings"].items())
    pairs += [("none", labels["none"])] if "none" in labels else []
    pairs += [("", labels["ignore"])] if "ignore" in labels else []
    words: dict[str, str] = {}
    for ours, value in pairs:
        for word in value if isinstance(value, list) and labels else [value]:
            if not isinstance(word, str) or not word.strip():
                wanted = 'a text, or a list such as ["a", "b"]' if labels else "one column's name"
                raise InputError(f"{ours or 'ignore'} = {value!r}; give {wanted}")
            word = word.strip().lower() if labels else word
            if word in words:
                raise InputError(f"{word!r} stands for two things; name it once")
            words[word] = ours
    return words


def _read_cells(text: str, file: Path) -> pd.DataFrame:
    """Read a CSV with a comma, semicolon or tab as text; the index is the line a row starts at."""
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, start = {}, 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows[start] = [cell.strip() for cell in cells]
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file}, line {start}: is no CSV ({error}); mend it") from None
    if len(rows) < 2:
        raise InputError(f"{file}: has no rows below its header; give a table with films")
    header = rows.pop(min(rows))
    for line, cells in rows.items():
        if len(cells) != len(header):
            found = f"{len(cells)} cells, but the header has {len(header)}"
            todo = "mend the row (quote a cell that holds the separator)"
            raise InputError(f"{file}, line {line}: {found}; {todo}")
    return pd.DataFrame(list(rows.values()), columns=header, index=list(rows))
