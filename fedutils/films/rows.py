"""The rows of a data set's tables, stacked and joined, in our text columns."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from ..base.errors import InputError
from ..base.findings import SPLITS
from . import cells
from .formats import check_tags, dicom_header, is_dicom, read_grey
from .mapping import COLUMNS, DICOM, MAPPING_NAME, Mapping
from .toml import texts

SEXES = {"M": "M", "MALE": "M", "F": "F", "FEMALE": "F"}
SEXES |= dict.fromkeys(["", "NA", "N/A", "NAN", "NONE", "O", "OTHER", "U", "UNKNOWN", "X"], "")
NO_ROW = "no row"  # in the columns of labels, where a joined table says nothing of a film
ROUNDED = r"\d(?:[.,]\d+)?[eE]\+\d+"  # as spreadsheets write long numbers


def place(rows: pd.DataFrame, position: int) -> str:
    """Name the file and the line of a row."""
    return f"{rows['file'].iloc[position]}, line {rows['line'].iloc[position]}"


def read_tables(
    mapping: Mapping, folder: Path, paths: Iterable[str]
) -> tuple[pd.DataFrame, list[Path], list[str]]:
    """Read what a mapping needs of all tables, stacked and joined, with `file` and `line`.

    A column keeps the first name that the mapping has for it. Returns the files and the header of
    the first one, too. Without tables each film is a row, and its path the only column.
    """
    if "folders" in mapping.given:
        rows = pd.DataFrame({"path": list(paths), "file": str(folder)})
        return rows.assign(line=rows.index + 1), [folder], ["path"]
    named = {key: found[0] for key, found in mapping.tables(folder).items() if found}
    if not named:
        wanted = " or ".join(mapping.section("tables"))
        told = f"no table {wanted}, which {mapping.name} has{cells.spreadsheet_in(folder)}"
        raise InputError(f"{folder}: {told}")
    joins = {key: found[:1] for key, found in mapping.tables(folder, "join").items()}
    keys = {key for on in mapping.section("join").values() for key in texts(on)}
    parts, others, headers = [], {}, {}
    for key, file in named.items():
        part, headers[file] = _read_one(mapping, file, keys)
        whole = len(named) == len(mapping.section("tables"))  # else the split is not known
        part["of table"] = mapping.section("tables").get(key, "") if whole else ""
        parts.append(part)
    for key, found in joins.items():
        if not found:
            raise mapping.fault("join", key, f"no table {key!r} in {folder}; add it to the others")
        others[key], _ = _read_one(mapping, found[0], keys)
    for (file, header), part in zip(headers.items(), parts, strict=True):
        for section, key, names in mapping.needed():
            if not any(names[0] in table for table in (part, *others.values())):
                raise _no_column(mapping, section, key, f"{names[0]!r}, but {file}", header)
    rows = pd.concat(parts, ignore_index=True)
    for key, other in others.items():
        rows = _join(mapping, key, rows, other)
    return rows.fillna(""), list(named.values()), next(iter(headers.values()))


def _no_column(mapping: Mapping, section: str, key: str, what: str, there: Iterable) -> InputError:
    """Return the error for a key that names a column which a table does not have."""
    named = ", ".join(name for name in there if name not in ("file", "line", "of table"))
    told = f"{key} = {what} has no such column; it has {named}: give one of them in {MAPPING_NAME}"
    return mapping.fault(section, key, told)


def _read_one(mapping: Mapping, file: Path, keys: set[str]) -> tuple[pd.DataFrame, list[str]]:
    """Read the columns of one table that a mapping names, or that it is joined by."""
    wanted = [*mapping.needed(), *(("join", key, [key]) for key in keys)]
    wanted += [("optional", key, texts(v)) for key, v in mapping.section("optional").items()]

    def choose(header: list[str]) -> dict[str, str]:
        """Find each column by the first of its names that is there."""
        places = {}
        for section, key, names in wanted:
            name = next((name for name in names if name in header), None)
            if name and header.count(name) > 1 and not mapping.given.get("loose"):
                told = f"{key} = {name!r}, but {file} has {header.count(name)} columns {name!r}"
                raise mapping.fault(section, key, f"{told}; rename all but one there")
            places |= {names[0]: name} if name else {}
        return places

    columns = {name for _, _, names in wanted for name in names}
    rows, header = cells.read_cells(file, mapping.given.get("loose", False), columns, choose)
    return rows.assign(file=str(file), line=rows.index), header


def _join(mapping: Mapping, named: str, rows: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of another table, of which no two rows may fit one of ours.

    Keys are compared in one spelling, as patients' ids are: 12 and 12.0 are one.
    """
    on = texts(mapping.section("join")[named])
    for table in (rows, other):
        if missing := [key for key in on if key not in table]:
            what = f"{missing[0]!r}, but {table['file'].iloc[0]}"
            raise _no_column(mapping, "join", named, what, table)
    one = pd.concat([rows[on], other[on]], ignore_index=True).apply(cells.one_spelling)
    keys = [f"key {number}" for number in range(len(on))]
    ours, theirs = (part.set_axis(keys, axis=1) for part in (one[: len(rows)], one[len(rows) :]))
    for position in np.flatnonzero(theirs.duplicated()):
        key = ", ".join(other[on].iloc[position])
        raise InputError(f"{place(other, position)}: a second row of {key}; remove one")
    new = [column for column in other if column not in rows]
    right = other[new].set_axis(range(len(other))).join(theirs.reset_index(drop=True))
    joined = rows.join(ours).merge(right.assign(joined=True), how="left", on=keys)
    lonely = joined.pop("joined").isna()
    if lonely.all():
        what = f"no row of {other['file'].iloc[0]} has the {', '.join(on)} of a film"
        raise mapping.fault("join", named, f"{what}; correct the columns to join by")
    joined.loc[lonely, [name for name in new if name in mapping.words]] = NO_ROW
    return joined.drop(columns=keys)


def our_rows(
    mapping: Mapping, raw: pd.DataFrame, folder: Path, paths: dict[str, str]
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Return the raw rows that the mapping keeps, these in our columns, and the films left out.

    A column that is missing comes back empty; ids are there as `written` too. Raises InputError for
    a row without a film or a patient, or with another split than ours.
    """
    rows = _our_columns(mapping, raw, folder, paths)
    kept = np.full(len(raw), True)
    for column, values in mapping.section("keep").items():
        said = (rows if column in mapping.tags() else raw)[column]
        kept &= (said.isin(texts(values)) | said.isna()).to_numpy()
    if not kept.any():
        what = f"[keep] leaves no row of {raw['file'].iloc[0]}; correct what it keeps"
        raise mapping.fault("", "keep", what)
    return raw[kept], rows[kept], list(rows["image_index"][~kept])


def _our_columns(
    mapping: Mapping, raw: pd.DataFrame, folder: Path, paths: dict[str, str]
) -> pd.DataFrame:
    """Turn the raw text columns into ours; see `our_rows`."""
    rows = raw[["file", "line"]].copy()
    given = mapping.section("columns") | mapping.section("optional")
    both = {path.rpartition("/")[2]: place for path, place in reversed(paths.items())} | paths
    spelled = [(cells.spellings(name), place) for name, place in both.items()]
    places = {ways[loose]: place for loose in (2, 1, 0) for ways, place in spelled}
    films = _images(raw, texts(given["image"]), places)
    headers = _headers(folder, films, places, mapping.tags())
    for name, ours in COLUMNS.items():
        column = pd.Series("", index=raw.index, dtype=object)
        if name == "image":
            column = films
        elif name in headers:
            column = headers[name].fillna("")
        elif name in given and texts(given[name])[0] in raw:
            column = raw[texts(given[name])[0]]
        if pattern := mapping.section("extract").get(name):
            column = cells.first_group(column, pattern)
        values = mapping.section("values").get(name)
        rows[ours] = column.replace(values) if values else column
    rows = rows.join(headers[[tag for tag in headers if tag.startswith(DICOM)]])
    for position in np.flatnonzero(rows["image_index"].str.contains(cells.CONTROL)):
        found = repr(rows["image_index"].iloc[position])
        what = f"{found} holds a line's end or another control sign"
        raise InputError(f"{place(rows, position)}: {what}")
    for name in ("patient_id", "sex", "view", "scanner"):
        rows[name] = cells.one_line(rows[name])
    rows["image_index"] = cells.film_name(rows["image_index"])
    rows["written"] = rows["patient_id"]
    rows["patient_id"] = cells.one_spelling(rows["patient_id"])
    _check_ids(mapping, rows, folder, places)
    if "of table" in raw:
        rows["split"] = rows["split"].where(rows["split"] != "", raw["of table"])
    for position in np.flatnonzero(~rows["split"].isin(["", *SPLITS])):
        what, todo = rows["split"].iloc[position], "write train, val or test, or leave it empty"
        raise InputError(f"{place(rows, position)}: split {what!r}; {todo}")
    sex, view = cells.upper(rows["sex"]).map(SEXES), cells.upper(rows["view"])
    for position in np.flatnonzero(sex.isna()):
        what = rows["sex"].iloc[position]
        todo = f"write M or F, leave it empty, or {mapping.to_write('values.sex', {what: 'F'})}"
        raise InputError(f"{place(rows, position)}: sex {what!r}; {todo}")
    return rows.assign(sex=sex, view=view, scanner=_scanners(rows))


def _check_ids(mapping: Mapping, rows: pd.DataFrame, folder: Path, places: dict[str, str]) -> None:
    """Raise InputError for a row without a film or a patient, or with a patient's id rounded.

    Where headers name patients, a film that is not there or cannot be read, which notebook 02
    names, gets one of its own.
    """
    films, patients = rows["image_index"], rows["patient_id"]
    for k in np.flatnonzero((films == "") | patients.str.fullmatch(f"|{ROUNDED}")):
        film, what = films.iloc[k], "no image index or no patient id; mend the row"
        if patients.iloc[k]:
            todo = "export the table again, with that column as text or as whole numbers"
            what = f"a spreadsheet has rounded the patient's id to {patients.iloc[k]!r}; {todo}"
        elif film and "patient" in mapping.tags():
            try:
                read_grey(folder / _find(film, places))
            except Exception:  # whatever is raised here is this film's fault
                rows.loc[rows.index[k], "patient_id"] = f"unknown, of {film}"
                continue
        raise InputError(f"{place(rows, k)}: {what}")


def _images(raw: pd.DataFrame, ways: list[str], places: dict[str, str]) -> pd.Series:
    """Return the films' names by the first of some columns or templates that any film has."""
    found = []
    for way in ways:
        column = raw.get(way, pd.Series("", raw.index, dtype=object))
        for k, part in enumerate(() if way in raw else re.split(r"\{(.*?)\}", way)):
            column = column + (raw[part] if k % 2 else part)
        found.append(column)
        if len(ways) > 1 and any(_find(name, places) for name in column):
            return column
    return found[0]


def _find(film: str, places: dict[str, str]) -> str:
    """Return where a film is, by the closest spelling of its name; "" where it is not there."""
    return next((places[name] for name in cells.spellings(film) if name in places), "")


def _headers(
    folder: Path, films: pd.Series, places: dict[str, str], tags: dict[str, str]
) -> pd.DataFrame:
    """Return by column of ours, or of [keep], what the DICOM headers of the films say.

    "" where one says nothing, NaN where there is none to be read: a film that is missing, or whose
    header cannot be read, is one that the checks or notebook 02 name.
    """
    different = {film: _find(film, places) for film in films.unique()} if tags else {}
    dicom = {film: is_dicom(folder / path) for film, path in different.items() if path}
    if any(dicom.values()):
        check_tags(tags.values())

    def read(film: str) -> list[str | float]:
        """Read one header."""
        with suppress(InputError):
            if dicom.get(film):
                return [*dicom_header(folder / different[film], list(tags.values())).values()]
        return ["" if dicom.get(film) is False else np.nan] * len(tags)

    with ThreadPoolExecutor() as pool:
        said = dict(zip(different, pool.map(read, different), strict=True))
    values = [said[film] for film in films] if tags else None
    return pd.DataFrame(values, films.index, [*tags], dtype=object)


def _scanners(rows: pd.DataFrame) -> pd.Series:
    """Write scanners, which may become clients, as parts of file names; refuse two that are one."""
    plain = cells.as_file_name(rows["scanner"])
    for text, several in rows["scanner"].groupby(plain):
        if several.nunique() > 1:
            told = " and ".join(map(repr, sorted(several.unique())[:2]))
            where = rows["file"].iloc[0]
            raise InputError(f"{where}: scanners {told} would both be {text!r}; rename one")
    return plain
