"""Labels of a data set's rows, as its mapping writes them: marks in columns, or words in one."""

import difflib
import re

import numpy as np
import pandas as pd

from ..base.errors import InputError
from . import cells
from .mapping import Mapping
from .rows import NO_ROW, place
from .toml import texts

MEANT = {"absent": "0", "present": "1", "uncertain": []}  # where the mapping names no marks
ZEROS = ("", *(sign + "0" * n for sign in ".," for n in (1, 2, 3)))  # as spreadsheets add them
# What marks in a column of yes and no mostly mean: never taken for granted, but proposed.
MOSTLY = {
    "present": "1 + x y yes j ja oui o s si sí sim t true p pos positive positiv present",
    "absent": "0 - n no nein nee nej non não f false neg negative negativ absent",
    "uncertain": "-1 ? u uncertain unclear unklar",
}
VALUES = {"unknown": np.nan, "absent": 0.0, "present": 1.0}


def read_labels(
    mapping: Mapping, raw: pd.DataFrame, rows: pd.DataFrame
) -> tuple[np.ndarray, list[str]]:
    """Return the labels, float32 (rows, findings), and the films that spell one otherwise.

    Raises InputError that names the file, the line and the film of a label without a meaning.
    """
    if mapping.section("labels"):
        return _read_words(mapping, raw, rows)
    return _read_marks(mapping, raw, rows), []


def _fault(rows: pd.DataFrame, at: int, told: str) -> InputError:
    """Return an error that names a row."""
    film = rows["image_index"].iloc[at]
    return InputError(f"{place(rows, at)} ({film}): {told}")


def _read_marks(mapping: Mapping, raw: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    """Read a column a finding; see `read_labels`. A "*" stands for any mark that has no meaning."""
    about, columns, blank = mapping.section("marks"), {}, {}
    marks = {"": VALUES[about.get("blank_is", "unknown")], NO_ROW: np.nan}
    for name, default in MEANT.items():
        value = VALUES[about.get("uncertain_is", "unknown") if name == "uncertain" else name]
        for mark in texts(about.get(name, default)):
            marks |= {mark + zeros: value for zeros in ZEROS}
    none = about.get("none")
    for column, finding in {**mapping.words, **({none: "none of them"} if none else {})}.items():
        if column not in raw:
            continue
        known = raw[column].isin(list(marks))
        if not known.all() and "*" not in marks:
            at = int((~known).to_numpy().argmax())
            todo = "write 1 for present, 0 for absent, or leave it empty for unknown"
            told = f"column {column!r} ({finding}) holds {raw[column].iloc[at]!r}; {todo}"
            raise _fault(rows, at, told + _propose(mapping, raw, raw[column].iloc[at], marks))
        columns[finding] = raw[column].map(marks).where(known, marks.get("*"))
        blank[finding] = raw[column].eq("")
    labels = pd.DataFrame(columns)[mapping.findings]
    if none:
        others = [name for name in labels if name not in texts(about.get("spared", []))]
        clear = raw[none].map(marks).eq(1).to_numpy()[:, None]
        labels[others] = labels[others].mask(pd.DataFrame(blank)[others] & clear, 0)
    return labels.to_numpy(np.float32)


def _propose(mapping: Mapping, raw: pd.DataFrame, mark: str, known: dict[str, float]) -> str:
    """Say how [marks] would tell what is written for 1, 0 and unknown, as far as that is clear."""
    found = {text for column in mapping.words if column in raw for text in raw[column].unique()}
    lines = {}
    for kind, mostly in MOSTLY.items():
        words = sorted(word for word in found - {*known} if word.lower() in mostly.split())
        if words:
            lines[kind] = [*texts(mapping.section("marks").get(kind, MEANT[kind])), *words]
    if any(mark in words for words in lines.values()):
        return f"; or {mapping.to_write('marks', lines)}"
    present = [*texts(mapping.section("marks").get("present", MEANT["present"])), mark]
    return f"; or, if it means present, {mapping.to_write('marks', {'present': present})}"


def _read_words(
    mapping: Mapping, raw: pd.DataFrame, rows: pd.DataFrame
) -> tuple[np.ndarray, list[str]]:
    """Read the label texts of all rows, each different one once; see `read_labels`.

    An empty text says nothing; else a finding without its word is absent, unless a word leaves it
    open.
    """
    about, aliases = mapping.section("labels"), {a.lower() for a in mapping.section("aliases")}
    column = raw[about["column"]]
    if pattern := mapping.section("extract").get("labels"):
        column = cells.first_group(column, pattern)
    codes, different = pd.factorize(column)
    firsts = np.unique(codes, return_index=True)[1]
    vectors, odd = [], []
    for at, text in zip(firsts, different, strict=True):
        words = split_words(text, about)
        meant = [_meaning(word, mapping.words) for word in words]
        if None in meant:
            told = f"column {about['column']!r} holds the unknown word {words[meant.index(None)]!r}"
            raise _fault(rows, at, f"{told}; {_say_meaning(mapping, words[meant.index(None)])}")
        if "none" in meant and {*meant} & {*mapping.findings}:
            told = f"a word for no finding stands beside a finding in {text!r}; correct this row"
            raise _fault(rows, at, told)
        rest = 0.0 if words and "unknown" not in meant else np.nan
        vectors.append([1.0 if name in meant else rest for name in mapping.findings])
        odd.append(bool(aliases & {*words}) or len({*words}) < len(words))
    spelled = rows["image_index"][np.array(odd)[codes]] if mapping.name == "nih" else []
    return np.array(vectors, np.float32)[codes], list(spelled)


def _say_meaning(mapping: Mapping, word: str) -> str:
    """Say what to write for a word that has no meaning: that it is a finding's, or none."""
    lower = {name.lower(): name for name in mapping.findings}
    near = lower[(difflib.get_close_matches(word, lower, 1) or [*lower])[0]]
    ignored = [*texts(mapping.section("labels").get("ignore", [])), word]
    return (
        f"for a finding, such as {near}, {mapping.to_write('aliases', {word: near})}; for"
        f" none of them {mapping.to_write('labels', {'ignore': ignored})}"
    )


def split_words(text: str, about: dict[str, str]) -> list[str]:
    """Return the words of a text, in lower case and without the mapping's brackets."""
    parts = text.split(about["separator"]) if "separator" in about else [text]
    brackets = about.get("brackets", "")
    parts = [part.strip().strip(brackets).strip().lower() for part in parts]
    return [part for part in parts if part]


def _meaning(word: str, words: dict[str, str]) -> str | None:
    """Return what a word stands for: by its own spelling, else by the first pattern with a "*"."""
    if word in words:
        return words[word]
    patterns = {re.escape(known).replace(r"\*", ".*"): ours for known, ours in words.items()}
    return next((ours for one, ours in patterns.items() if re.fullmatch(one, word)), None)


def unite(
    labels: np.ndarray, films: pd.Series, readers: pd.Series, rule: str
) -> tuple[np.ndarray, np.ndarray]:
    """Unite the label rows (n, findings) of each film; return them and the first row of each.

    What a reader says in several rows is said if one of them says it. Of several readers `any`,
    the `majority` (more than half of those who say anything) or `all` must say it. NaN is unknown.
    """
    film, _ = pd.factorize(films)
    pair, _ = pd.factorize(film * (len(readers) + 1) + pd.factorize(readers)[0])
    first_of_pair = ~pd.Series(pair).duplicated().to_numpy()
    by_reader = pd.DataFrame(labels).groupby(pair, sort=False).max()
    groups = by_reader.groupby(film[first_of_pair], sort=False)
    united = {"any": groups.max, "all": groups.min, "majority": groups.mean}[rule]()
    if rule == "majority":
        united = (united > 0.5).astype(np.float32).where(united.notna())
    return united.to_numpy(np.float32), np.flatnonzero(~pd.Series(film).duplicated())
