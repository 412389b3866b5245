"""Read a folder of films, of whatever data set, into one tidy table.

What its tables mean says a mapping (`mapping.py`): a preset that the folder is recognised by, or a
`films.toml` of its own. `DataSet.table` has one row a film, sorted by `image_index` (text, unique);
data/README.md lists its columns. A number that is not given is NaN, a text "".
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from ..base.errors import InputError
from ..base.findings import findings_of
from . import cells
from .find import FILM_DEPTH, PHANTOM_MARKER, data_problem, printable, walk
from .formats import is_film
from .labels import read_labels, unite
from .mapping import Mapping, find_mapping, presets
from .rows import our_rows, place, read_tables

BOX_COLUMNS = ("image_index", "finding", "x", "y", "w", "h")
LISTS = {name: f"{name}_list.txt" for name in ("train", "val", "train_val", "test")}
DRAWN = (
    "Synthetic phantom",
    "These films are drawn, not taken: nothing here is evidence about patients.",
)
OWN = (
    "Films and table of the user's own",
    "Labels are those of the table as it was given: how they came about is not known here.",
)
NIH_FILM = r"\d{8}_\d{3}\.png"  # the number of the patient is in it
BY_PATH = "name films by their path below the folder"
MOST_VISITS = 100_000


@dataclass(frozen=True, eq=False)
class DataSet:
    """One data folder as read; data/README.md lists the columns of `table`.

    `boxes` has `image_index, finding, x, y, w, h` (pixels of the film, top left corner first).
    `release` is "phantom", "own", for NIH's table its release, else the preset's name. `lists`
    names the splits that are there, `found` holds what only the raw files show, by check.
    """

    folder: Path
    mapping: Mapping
    table: pd.DataFrame
    boxes: pd.DataFrame
    release: str
    table_file: str
    lists: tuple[str, ...]
    found: dict[str, list[str]]
    parts: dict[str, "DataSet"] = field(default_factory=dict)  # those put together, by source

    @property
    def films_present(self) -> int:
        """Number of rows whose film is there."""
        return int((self.table["path"] != "").sum())

    def about(self) -> dict[str, object]:
        """Return what a report says of the data: release, source, labels, lists, yardsticks.

        And the findings that each source says it looks for, whatever its films show.
        """
        sources = (self.parts or {"": self}).items()
        declared = {name: findings_of(part.table) for name, part in sources}
        if self.parts:
            said = [part.about() for part in self.parts.values()]
            texts = {key: [one[key] for one in said] for key in ("source", "labels_by")}
            joined = {key: " ".join(dict.fromkeys(each)) for key, each in texts.items()}
            joined["source"] = "; ".join(texts["source"])
            joined |= {"release": self.release, "lists": list(self.lists), "yardsticks": {}}
            return joined | {"declared": declared}
        source, labels = (self.mapping.given.get(key, "") for key in ("title", "labels_by"))
        if self.release == "phantom":
            source, labels = DRAWN
        elif self.mapping.name == "nih":
            source = f"{source}, release {self.release}"
        whole = self.release in ("2017", "2020") and self.lists == ("train_val", "test")
        whole = whole and findings_of(self.table) == presets()["nih"].findings
        return {
            "release": self.release, "source": source or OWN[0], "labels_by": labels or OWN[1],
            "lists": list(self.lists), "declared": declared,
            "yardsticks": self.mapping.section("yardsticks") if whole else {},
        }  # fmt: skip


def read_folder(folder: Path, work: Path | None = None, mapping: Mapping | None = None) -> DataSet:
    """Read the tables, boxes, split lists and the list of films of one data folder.

    What a run wrote below `work` is no film, should it lie in that folder. Without a `mapping` the
    folder's own is used, or the preset that it is.

    Raises InputError if the folder or a file cannot be read, a column is missing, a label has no
    meaning, or a name does not tell which film it is; it names the file, and the line if possible.
    """
    if problem := data_problem(folder):
        raise InputError(problem)
    mapping = mapping or find_mapping(folder)
    paths, others = _paths(folder, work, mapping)
    raw, files, header = read_tables(mapping, folder, paths)
    raw, rows, left_out = our_rows(mapping, raw, folder, paths)
    labels, spelled = read_labels(mapping, raw, rows)
    lists = _split_lists(mapping, folder, rows, files)
    _check_patients(rows)
    if mapping.given.get("several"):
        rule = mapping.given.get("readers", "any")
        labels, first = unite(labels, rows["image_index"], rows["reader"], rule)
        rows = rows.iloc[first]
    films, twice = _name_films(folder, paths, rows, left_out, mapping.name == "nih")
    unnamed = films.keys() - {*rows["image_index"], *left_out}
    _check_names(rows, labels, lists, twice, mapping.name == "nih")
    found = _row_problems(rows, labels, lists) | {
        "rows left out": left_out,
        "films in two folders": twice,
        "labels in another spelling": spelled,
        "orphaned films": sorted(map(printable, [*others, *unnamed])),
        "other tables": [f.name for fs in mapping.tables(folder).values() for f in fs[1:]],
    }
    table = _tidy(rows, labels, lists, films, mapping.findings)
    boxes, found["boxes of other findings"] = _read_boxes(folder, mapping)
    names = " + ".join(file.name for file in files) or "no table"
    release = _release(mapping, folder, names, header)
    return DataSet(folder, mapping, table, boxes, release, names, tuple(lists), found)


def _release(mapping: Mapping, folder: Path, name: str, header: Sequence[str]) -> str:
    """Tell which release of a data set it is.

    A phantom by its marker; NIH's by the table's name ("sample", "2020"), and "2017" where also the
    header ends with a comma, as in NIH's file of 2017; another one of NIH's is "unknown", such as a
    table saved again by another program.
    """
    if (folder / PHANTOM_MARKER).exists():
        return "phantom"
    if mapping.name != "nih":
        return mapping.name
    first = name.startswith("Data_Entry_2017.") and header[-1] == ""
    marks = {"sample": name.startswith("sample"), "2020": "v2020" in name, "2017": first}
    return next((release for release, holds in marks.items() if holds), "unknown")


def _split_lists(
    mapping: Mapping, folder: Path, rows: pd.DataFrame, files: Sequence[Path]
) -> dict[str, set[str]]:
    """Unite split lists with the column `split`: films by split; empty if there are none.

    Without a list for validation, `train` becomes NIH's `train_val`, of which a share of patients
    is set aside. Raises InputError unless there are films to train and films to test on.
    """
    lists = {}
    for split, name in LISTS.items():
        if (folder / name).exists():
            lines = cells.read_text(folder / name).splitlines()
            names = cells.film_name(pd.Series(lines, dtype=str).str.strip())
            lists[split] = {*cells.as_written(names, rows["image_index"], folder / name)} - {""}
    for split, films in rows["image_index"].groupby(rows["split"]):
        if split:
            lists.setdefault(split, set()).update(films)
    if "train" in lists and "val" not in lists:
        lists = {"train_val": lists.pop("train") | lists.get("train_val", set()), **lists}
    if mapping.name != "nih" and lists and not (
        "test" in lists and {"train", "train_val"} & {*lists}
    ):  # fmt: skip
        found = f"the lists or the column of splits name {', '.join(lists)} alone"
        todo = "name films for train and for test, or none at all"
        raise InputError(f"{files[0]}: {found}; {todo}")
    return lists


def _check_patients(rows: pd.DataFrame) -> None:
    """Raise InputError where rows of one film name two patients."""
    names, patients = rows["image_index"], rows["patient_id"]
    first = rows.drop_duplicates("image_index").set_index("image_index")["patient_id"]
    for k in np.flatnonzero(patients.to_numpy() != first[names].to_numpy()):
        name, who = names.iloc[k], patients.iloc[k]
        told = f"{name!r} is a film of patient {who!r}, and above one of {first[name]!r}"
        raise InputError(f"{place(rows, k)}: {told}; {BY_PATH}")


def _check_names(
    rows: pd.DataFrame, labels: np.ndarray, lists: dict[str, set[str]], twice: list[str], nih: bool
) -> None:
    """Raise InputError where a name may stand for several films, or no listed name for any."""
    names = rows["image_index"]
    unclear = names.isin(twice).to_numpy()
    for k in np.flatnonzero(unclear & _disagree(names, labels)):
        told = f"{names.iloc[k]!r} lies in more than one folder, and its rows disagree"
        raise InputError(f"{place(rows, k)}: {told}; {BY_PATH}")
    # A mirror of NIH's films beside them is harmless: the name alone says whose film it is.
    mirror = names.str.fullmatch(NIH_FILM).to_numpy() & nih
    for k in np.flatnonzero(unclear & ~mirror):
        told = f"{names.iloc[k]!r} lies in more than one folder; {BY_PATH}"
        raise InputError(f"{place(rows, k)}: {told}")
    listed = set().union(*lists.values())
    if listed and not names.isin(listed).any():
        found = f"none of the {len(listed)} films in the split lists, such as {min(listed)!r}"
        todo = "name films there as the table does"
        raise InputError(f"{rows['file'].iloc[0]}: {found}, is in the table; {todo}")


def _disagree(names: pd.Series, labels: np.ndarray) -> np.ndarray:
    """Tell which rows are of a film whose rows have not all the same labels."""
    again = names.duplicated(keep=False).to_numpy()
    text = pd.Series([row.tobytes() for row in labels[again]], names.index[again])
    differ = text.groupby(names[again]).transform("nunique") > 1
    result = np.full(len(names), False)
    result[again] = differ.to_numpy()
    return result


def _row_problems(
    rows: pd.DataFrame, labels: np.ndarray, lists: dict[str, set[str]]
) -> dict[str, list[str]]:
    """Find what the tidy table no longer shows: duplicates, spellings, contradicting lists."""
    names = rows["image_index"]
    listed = Counter(film for films in lists.values() for film in films)
    pairs = rows[["patient_id", "written"]].drop_duplicates()
    several = pairs[pairs["patient_id"].duplicated(keep=False)].groupby("patient_id")["written"]
    return {
        "duplicate rows": list(names[names.duplicated()]),
        "duplicate rows that disagree": sorted(set(names[_disagree(names, labels)])),
        "rows in both lists": sorted(film for film, times in listed.items() if times > 1),
        "list names without row": sorted(listed.keys() - set(names)),
        "patients in several spellings": [" = ".join(sorted(ids)) for _, ids in several],
    }


def _paths(folder: Path, work: Path | None, mapping: Mapping) -> tuple[dict[str, str], list[str]]:
    """Map films, by what the mapping calls their paths, to the paths below the folder.

    And list the others: what it says is no film of the set, and second copies of what is.
    """
    depth, renamed = mapping.given.get("depth", FILM_DEPTH), mapping.section("paths").items()
    films, others = {}, []
    for here, inner, files in walk(folder, work):
        below = here.relative_to(folder)
        inner[:] = inner if len(below.parts) < depth else []
        prefix = "" if below == Path() else f"{below.as_posix()}/"
        for path in (prefix + name for name in sorted(files) if is_film(f"{here}/{name}")):
            called = path
            for theirs, ours in renamed:
                called = re.sub(theirs, lambda _, ours=ours: ours, called)
            if not called or films.setdefault(called, path) != path:
                others.append(path)
    return films, others


def _name_films(
    folder: Path, paths: dict[str, str], rows: pd.DataFrame, left_out: list[str], nih: bool
) -> tuple[dict[str, str], list[str]]:
    """Map each film's name to its path, the first of several; and name those that lie twice.

    Where the table names films by their paths, these are the names. Raises InputError where no row
    names any, but of NIH's, which may be elsewhere, and where two in one folder may be one row's.
    """
    by_path = rows["image_index"].str.contains("/", regex=False).any()
    names = [path if by_path else path.rpartition("/")[2] for path in paths]
    names = cells.film_name(pd.Series(names, dtype=str))
    called = cells.as_written(names, [*rows["image_index"], *left_out], folder)
    listed, alike = [*paths], {}
    for k in np.flatnonzero(called != names):  # the same but for case, or how the ending is written
        here, slash, _ = listed[k].rpartition("/")
        meant = called[k] if by_path else f"{here}{slash}{called[k]}"
        other = alike.setdefault(meant, listed[k])
        if meant in paths:
            called[k] = names[k]
        elif other != listed[k]:
            told = f"{other!r} and {listed[k]!r} may both be {called[k]!r} of the table"
            raise InputError(
                f"{folder}: {told}; name one of them so in the table, letter by letter"
            )
    films = dict(zip(reversed(list(called)), reversed(paths.values()), strict=True))
    if films and not nih and not rows["image_index"].isin(films.keys()).any():
        raise InputError(
            f"{place(rows, 0)}: {rows['image_index'].iloc[0]!r} is no film in the folder, and no"
            f" other row's is; films there are {', '.join(sorted(films)[:3])}; name them as the"
            " files are named, ending included, or by their path below the folder"
        )
    return films, sorted(set(called[called.duplicated()]))


def _tidy(
    rows: pd.DataFrame, labels: np.ndarray, lists: dict, films: dict, known: Sequence[str]
) -> pd.DataFrame:
    """Turn the named text columns and the labels into the documented table."""
    names = rows["image_index"]
    findings = pd.DataFrame(labels, index=rows.index, columns=list(known))
    spacing, visits = cells.numbers(rows["spacing"]), cells.numbers(rows["follow_up"])
    splits = ["test", "val", "train_val", "train"]  # of a film in two the first counts
    listed = [names.isin(lists.get(split, ())) for split in splits]
    scanner = spacing.map({mm: f"{mm:.3f}" if mm > 0 else "" for mm in spacing.unique()})
    since = cells.year(rows["date"]) - cells.year(rows["born"])
    table = pd.DataFrame({
        "image_index": names,
        "source": "",  # see `sources`
        "patient_id": rows["patient_id"],
        "follow_up": visits.where(visits.between(0, MOST_VISITS), -1).fillna(-1).astype(int),
        "age": cells.years(rows["age"]).fillna(since),
        "sex": rows["sex"], "view": rows["view"],
        "width": cells.numbers(rows["width"]), "height": cells.numbers(rows["height"]),
        "spacing": spacing,
        "scanner": rows["scanner"].where(rows["scanner"] != "", scanner),
        "official_split": np.select(listed, splits, ""),
        "path": [films.get(name, "") for name in names],
    })  # fmt: skip
    table = pd.concat([table, findings], axis=1).drop_duplicates("image_index")
    return table.sort_values("image_index", ignore_index=True)


def _read_boxes(folder: Path, mapping: Mapping) -> tuple[pd.DataFrame, list[str]]:
    """Read the box list, whose header names only three of its columns; empty if there is none.

    Boxes of what is none of the findings are left out, and named.
    """
    file = next(iter(sorted(folder.glob("BBox_List*.csv*"))), None)
    if file is None:
        return pd.DataFrame({name: [] for name in BOX_COLUMNS}), []
    count = len(BOX_COLUMNS)

    def choose(header: list[str]) -> dict[str, str]:
        """Number the columns, since most have no name."""
        if len(header) < count:
            raise InputError(f"{file}: {len(header)} columns, not {', '.join(BOX_COLUMNS)}")
        header[:count] = map(str, range(count))
        return dict(zip(BOX_COLUMNS, header, strict=False))

    boxes, _ = cells.read_cells(file, True, {"Image Index", "Finding Label"}, choose)
    sides = boxes[list("xywh")].apply(cells.numbers)
    for line in sides.index[sides.isna().any(axis=1)]:
        raise InputError(f"{file}, line {line}: a box needs four numbers; correct this row")
    words = mapping.words | {name: name for name in mapping.findings}
    meant = boxes["finding"].map(lambda word: words.get(word, words.get(word.lower(), word)))
    boxes = boxes.assign(**sides, finding=meant)
    known = boxes["finding"].isin(mapping.findings)
    return boxes[known].reset_index(drop=True), list(boxes["image_index"][~known])
