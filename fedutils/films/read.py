"""Read NIH ChestX-ray14, in every variant that there is, into one tidy table.

A folder of own films with a mapping (see `own`) becomes the same table, here. `NihData.table` has
one row a film, sorted by `image_index` (text, unique), and these columns:
- `patient_id` (text): one spelling for each patient, see `one_spelling`
- `follow_up` (int): number of the visit; -1 if unreadable
- `age` (float, years): `060Y`, months, weeks and days converted; NaN if unreadable
- `sex` (M, F), `view` (PA, AP)
- `width`, `height` (float): pixels of the film before NIH made it 1024x1024; NaN if not given
- `spacing` (float): pixel spacing of that film in mm; NaN if not given
- `scanner` (text): the spacing in three decimals, which names the detector; of own films what
  their table says; "" if not given
- `official_split`: train_val, test, or "" for a film in no list; of own films also train and val
- `path` (text): the film, relative to the data folder; "" if it is missing
- the findings (float32): 0 or 1; of own films also NaN, where nobody looked

Source: Wang et al., "ChestX-ray8", CVPR 2017, and the files that NIH and Kaggle hand out.
"""

import dataclasses
import gzip
import io
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..base.errors import InputError
from ..base.findings import NO_FINDING, choose_findings, findings_of, format_labels
from .find import FILM_DEPTH, PHANTOM_MARKER, data_problem, label_tables, printable, walk
from .formats import FILM_ENDINGS
from .own import OwnTable, film_name, own_lists, read_mapping
from .phantom.write import write_phantom

NIH_FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
    "Hernia",
)  # fmt: skip
# Other spellings that NIH's own files use: the box list and some mirrors.
ALIASES = {"Infiltrate": "Infiltration", "No_Finding": NO_FINDING}
BOX_COLUMNS = ("image_index", "finding", "x", "y", "w", "h")
LISTS = {"train_val": "train_val_list.txt", "test": "test_list.txt"}
OWN_LISTS = {"train": "train_list.txt", "val": "val_list.txt"}  # more than NIH has
NIH_FILM = r"\d{8}_\d{3}\.png"  # the number of the patient is in it
WHOLE_NUMBER = re.compile(r"(\d+)(?:[.,]0{0,2})?")  # 1,000 and 1.000 may be a thousand
CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"
MOST_VISITS = 100_000
DAYS_PER_YEAR = 365.25
AGE_UNITS = {"Y": 1.0, "": 1.0, "M": 1 / 12, "W": 7 / DAYS_PER_YEAR, "D": 1 / DAYS_PER_YEAR}
REQUIRED = {
    "image_index": "Image Index", "labels": "Finding Labels", "follow_up": "Follow-up #",
    "patient_id": "Patient ID", "age": "Patient Age", "sex": "Patient Gender",
    "view": "View Position",
}  # fmt: skip
# The letters of a header in any spelling -> our name. An unquoted `OriginalImage[Width,Height]`
# falls apart into `OriginalImage[Width` and `Height]`; the sample set writes two plain names.
HEADERS = {re.sub("[^a-z]", "", header.lower()): name for name, header in REQUIRED.items()} | {
    "patientsex": "sex", "originalimagewidth": "width", "height": "height",
    "originalimageheight": "height", "originalimagepixelspacingx": "spacing",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class NihData:
    """One data folder as read; see the module's text for the columns of `table`.

    `boxes` has `image_index, finding, x, y, w, h` (pixels of the 1024x1024 PNG, top left corner
    first; findings canonical). `lists` names the split lists that are there. `found` holds what
    only the raw files show, by the check's name.
    """

    folder: Path
    table: pd.DataFrame
    boxes: pd.DataFrame
    release: str
    table_file: str
    lists: tuple[str, ...]
    found: dict[str, list[str]]

    @property
    def films_present(self) -> int:
        """Number of rows whose film is there."""
        return int((self.table["path"] != "").sum())


def open_data(data_dir: str, work_dir: str | Path, findings: str = "") -> NihData:
    """Read a run's data set; without a folder the phantom, written below `work_dir` if need be.

    `findings` is the parameter: which of those that the data know are kept.
    """
    folder = Path(data_dir) if data_dir else write_phantom(Path(work_dir) / "phantom")
    data = read_nih(folder, Path(work_dir) if data_dir else None)
    known = findings_of(data.table)
    left_out = [name for name in known if name not in choose_findings(known, findings)]
    boxes = data.boxes[~data.boxes["finding"].isin(left_out)].reset_index(drop=True)
    return dataclasses.replace(data, table=data.table.drop(columns=left_out), boxes=boxes)


def read_nih(folder: Path, work: Path | None = None) -> NihData:
    """Read table, boxes, split lists and the list of films of one data folder.

    What a run wrote below `work` is no film, should it lie in that folder.

    The release is told by: the marker file PHANTOM.json ("phantom"); the table's name
    ("sample" for sample_labels.csv, "2020" for a name with v2020); for Data_Entry_2017.csv also
    by the header, which ends with a comma in NIH's 2017 file ("2017"). A folder with a mapping is
    "own". Anything else, such as a table saved again by another program, is "unknown".

    Raises InputError if the folder or a file cannot be read, a column is missing, a finding is
    unknown, or a name does not tell which film it is; it names the file, and the line if possible.
    """
    if problem := data_problem(folder):
        raise InputError(problem)
    own = read_mapping(folder)
    file = own.file if own else label_tables(folder)[0]
    rows, release = _read_rows(file, own)
    names = rows["image_index"]
    films, found = _films(folder, work, names, FILM_ENDINGS if own else (".png",))
    if own and films and not names.isin(films.keys()).any():
        raise InputError(
            f"{file}, line {rows.index[0]}: {names.iloc[0]!r} is no film in the folder, and no"
            f" other row's is; films there are {', '.join(list(films)[:3])}; name them as the"
            " files are named, ending included, or by their path below the folder"
        )
    lists = {}
    for split, name in ((OWN_LISTS if own else {}) | LISTS).items():
        if (folder / name).exists():
            text = _read_text(folder / name)
            lines = [line.strip() for line in text.splitlines()]
            lists[split] = lines if own else set(lines) - {""}
    lists = own_lists(rows, lists, file) if own else lists
    _check_names(rows, lists, found["films in two folders"], file, own is not None)
    labels = _parsed(rows["labels"], names, file, own.parse if own else parse_labels)
    pairs = rows[["patient_id", "written"]].drop_duplicates()
    several = pairs[pairs["patient_id"].duplicated(keep=False)].groupby("patient_id")["written"]
    found |= _row_problems(rows, lists, own is not None) | {
        "patients in several spellings": [" = ".join(sorted(ids)) for _, ids in several],
        "orphaned films": sorted(map(printable, films.keys() - set(names))),
        "other tables": [other.name for other in label_tables(folder) if other != file],
    }
    table = _tidy(rows, labels, lists, films, own.findings if own else NIH_FINDINGS)
    return NihData(folder, table, _read_boxes(folder), release, file.name, tuple(lists), found)


def _read_rows(file: Path, own: OwnTable | None) -> tuple[pd.DataFrame, str]:
    """Read a table into our text columns, by line, ids also as `written`; name its release."""
    if own:
        raw = rows = own.read(_read_text(file))
    else:
        raw = _read_csv(file)
        letters = [re.sub("[^a-z]", "", str(column).lower()) for column in raw.columns]
        rows = raw.set_axis([HEADERS.get(name, "") for name in letters], axis=1)
        rows = rows.loc[:, ~rows.columns.duplicated()]
    for name, header in REQUIRED.items():
        if name not in rows:
            there = ", ".join(map(str, raw.columns))
            raise InputError(f"{file}: no column {header!r}; found {there}; restore it")
    # A column that is optional comes back empty.
    columns = dict.fromkeys([*HEADERS.values(), *rows.columns])
    rows = rows.reindex(columns=list(columns), fill_value="")
    for line in rows.index[rows["image_index"].str.contains(CONTROL)]:
        found = repr(rows["image_index"][line])
        raise InputError(f"{file}, line {line}: {found} holds a line's end or another control sign")
    for name in rows.columns.intersection(["image_index", "patient_id", "sex", "view", "scanner"]):
        rows[name] = rows[name].str.replace(CONTROL, " ", regex=True).str.strip()
    rows["image_index"] = film_name(rows["image_index"])
    rows["written"], rows["patient_id"] = rows["patient_id"], one_spelling(rows["patient_id"])
    for line in rows.index[(rows["image_index"] == "") | (rows["patient_id"] == "")]:
        raise InputError(f"{file}, line {line}: no image index or no patient id; mend the row")
    marks = {
        "phantom": (file.parent / PHANTOM_MARKER).exists(),
        "own": own is not None,
        "sample": file.name.startswith("sample"),
        "2020": "v2020" in file.name,
        "2017": file.name.startswith("Data_Entry_2017.") and "Unnamed" in str(raw.columns[-1]),
    }
    return rows, next((release for release, holds in marks.items() if holds), "unknown")


def _read_text(file: Path) -> str:
    """Return a text file, gunzipped if need be, without the byte order mark that Excel writes."""
    try:
        raw = file.read_bytes()
        return (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); mend it or get it again") from None


def _read_csv(file: Path) -> pd.DataFrame:
    """Read a CSV as text columns; the index is the line in the file, and blank lines are gone."""
    # No value of NIH's holds a comma, so quotes only tell whether `[Width,Height]` is one
    # header or two: without them there is one form. index_col=False drops a last comma.
    text = io.StringIO(_read_text(file).replace('"', ""))
    try:
        frame = pd.read_csv(
            text, dtype=str, na_filter=False, index_col=False, skip_blank_lines=False
        ).fillna("")
    except ValueError as error:
        raise InputError(f"{file}: is no CSV table ({str(error).strip()}); get it again") from None
    frame.index += 2
    frame = frame[(frame != "").any(axis=1)]
    if frame.empty:
        raise InputError(f"{file}: has no rows; get it again")
    return frame


def one_spelling(ids: pd.Series) -> pd.Series:
    """Write each patient's id (text) in one way, so that no patient is two.

    These are one: ids that differ in case, in blanks or invisible characters, in how Unicode
    composes a letter, and whole numbers with leading zeros or a fraction of one or two zeros (`12`,
    `012`, `12.0`). Numbers become plain; else the spelling that sorts first stands.
    """
    one, written = {}, {}
    for text in sorted(ids.unique()):
        seen = "".join(c for c in unicodedata.normalize("NFC", text) if c.isprintable())
        plain = " ".join(seen.split())
        number = WHOLE_NUMBER.fullmatch(plain)
        plain = str(int(number[1])) if number else plain
        written[text] = one.setdefault(plain.lower(), plain)
    return ids.map(written)


def _check_names(rows: pd.DataFrame, lists: dict, twice: list[str], file: Path, own: bool) -> None:
    """Raise InputError where a name may stand for several films, or no listed name for any."""
    names, patients = rows["image_index"], rows["patient_id"]
    todo = "name films by their path below the folder"
    first = rows.drop_duplicates("image_index").set_index("image_index")["patient_id"]
    for line in rows.index[patients.to_numpy() != first[names].to_numpy()]:
        who = f"patient {patients[line]!r}, and above one of {first[names[line]]!r}"
        raise InputError(f"{file}, line {line}: {names[line]!r} is a film of {who}; {todo}")
    unclear = names[names.isin(twice)]
    differing = rows["labels"].groupby(names).transform("nunique") > 1
    for line, name in unclear[differing[unclear.index]].items():
        what = f"{name!r} lies in more than one folder, and its rows disagree"
        raise InputError(f"{file}, line {line}: {what}; {todo}")
    # A mirror of NIH's films beside them is harmless: the name alone says whose film it is.
    for line, name in unclear[own | ~unclear.str.fullmatch(NIH_FILM)].items():
        raise InputError(f"{file}, line {line}: {name!r} lies in more than one folder; {todo}")
    listed = set().union(*lists.values())
    if listed and not names.isin(listed).any():
        found = f"none of the {len(listed)} films in the split lists, such as {min(listed)!r}"
        raise InputError(f"{file}: {found}, is in the table; name films there as the table does")


def _row_problems(rows: pd.DataFrame, lists: dict, own: bool) -> dict[str, list[str]]:
    """Find what the tidy table no longer shows: duplicates, spellings, contradicting lists."""
    names = rows["image_index"]
    texts = rows[names.duplicated(keep=False)].groupby("image_index")["labels"].nunique()
    spelled = () if own else rows["labels"].unique()  # an own table has a spelling of its own
    plain = {text: format_labels(dict(zip(NIH_FINDINGS, parse_labels(text), strict=True)))
             for text in spelled}  # fmt: skip
    odd = [text for text in plain if sorted(text.split("|")) != sorted(plain[text].split("|"))]
    listed = Counter(film for films in lists.values() for film in films)
    return {
        "duplicate rows": list(names[names.duplicated()]),
        "duplicate rows that disagree": list(texts.index[texts > 1]),
        "labels in another spelling": list(names[rows["labels"].isin(odd)]),
        "rows in both lists": sorted(film for film, times in listed.items() if times > 1),
        "list names without row": sorted(listed.keys() - set(names)),
    }


def _films(
    folder: Path, work: Path | None, images: pd.Series, endings: tuple[str, ...]
) -> tuple[dict, dict]:
    """Map each film's name to its path below the folder, for every layout up to `FILM_DEPTH`.

    Where the table names films by their paths, these are mapped to themselves.
    """
    by_path = images.str.contains("/", regex=False).any()
    films, twice = {}, []
    for here, inner, files in walk(folder, work):
        below = here.relative_to(folder)
        deeper = len(below.parts) < FILM_DEPTH
        inner[:] = sorted(name for name in inner if deeper and not name.startswith("."))
        prefix = "" if below == Path() else f"{below.as_posix()}/"
        names = sorted(name for name in files if name.lower().endswith(endings))
        paths = [prefix + name for name in names]
        called = film_name(pd.Series(paths if by_path else names, dtype=str))
        here_are = dict(zip(called, paths, strict=True))
        twice += [name for name in here_are if name in films]
        films = here_are | films
    return films, {"films in two folders": sorted(twice)}


def _tidy(
    rows: pd.DataFrame, labels: pd.Series, lists: dict, films: dict, known: Sequence[str]
) -> pd.DataFrame:
    """Turn the named text columns and the parsed labels into the documented table."""
    names = rows["image_index"]
    matrix = np.stack(labels.to_list()).astype(np.float32)
    findings = pd.DataFrame(matrix, index=rows.index, columns=list(known))
    spacing, visits = _numbers(rows["spacing"]), _numbers(rows["follow_up"])
    splits = ["test", "val", "train_val", "train"]  # of a film in two the first counts
    listed = [names.isin(lists.get(split, ())) for split in splits]
    # Ages such as 58, 060Y, 018M, 003W or 005D, in years.
    ages = rows["age"].str.strip().str.upper().str.extract(r"^(-?\d+(?:\.\d+)?)([YMWD]?)$")
    scanner = spacing.map({mm: f"{mm:.3f}" if mm > 0 else "" for mm in spacing.unique()})
    table = pd.DataFrame({
        "image_index": names,
        "patient_id": rows["patient_id"],
        "follow_up": visits.where(visits.between(0, MOST_VISITS), -1).fillna(-1).astype(int),
        "age": ages[0].astype(float) * ages[1].map(AGE_UNITS),
        "sex": rows["sex"], "view": rows["view"],
        "width": _numbers(rows["width"]), "height": _numbers(rows["height"]), "spacing": spacing,
        "scanner": rows.get("scanner", scanner),
        "official_split": np.select(listed, splits, ""),
        "path": [films.get(name, "") for name in names],
    })  # fmt: skip
    table = pd.concat([table, findings], axis=1).drop_duplicates("image_index")
    return table.sort_values("image_index", ignore_index=True)


def _parsed(texts: pd.Series, images: pd.Series, file: Path, parse: Callable) -> pd.Series:
    """Parse each different text once; an InputError names the line and the film."""
    parsed = {}
    for line, text in texts.drop_duplicates().items():
        try:
            parsed[text] = parse(text)
        except InputError as error:
            where = f"{file}, line {line} ({images[line]})"
            raise InputError(f"{where}: {error}; correct this row") from None
    return pd.Series([parsed[text] for text in texts], texts.index)


def _read_boxes(folder: Path) -> pd.DataFrame:
    """Read the box list, whose header names only three of its columns; empty if there is none."""
    file = next(iter(sorted(folder.glob("BBox_List*.csv*"))), None)
    if file is None:
        return pd.DataFrame({name: [] for name in BOX_COLUMNS})
    raw = _read_csv(file)
    if raw.shape[1] < len(BOX_COLUMNS):
        raise InputError(f"{file}: {raw.shape[1]} columns, not {', '.join(BOX_COLUMNS)}")
    boxes = raw.iloc[:, : len(BOX_COLUMNS)].set_axis(list(BOX_COLUMNS), axis=1)
    findings = _parsed(boxes["finding"], boxes["image_index"], file, canonical)
    sides = boxes[list("xywh")].apply(_numbers)
    for line in sides.index[sides.isna().any(axis=1)]:
        raise InputError(f"{file}, line {line}: a box needs four numbers; correct this row")
    return boxes.assign(finding=findings, **sides).reset_index(drop=True)


def canonical(finding: str) -> str:
    """Return the canonical spelling of one finding of NIH's; raise InputError if it is unknown."""
    name = ALIASES.get(finding, finding)
    if name not in NIH_FINDINGS and name != NO_FINDING:
        known = ", ".join(NIH_FINDINGS)
        raise InputError(f"unknown finding {finding!r}; known: {known}, {NO_FINDING}")
    return name


def parse_labels(text: str) -> np.ndarray:
    """Turn NIH's 'Effusion|Mass' into a uint8 vector of shape (14,); 'No Finding' is all zeros.

    Raises InputError on an unknown finding, and on 'No Finding' beside a finding.
    """
    names = [canonical(part) for part in text.split("|")]
    if NO_FINDING in names and len(names) > 1:
        raise InputError(f"{NO_FINDING!r} stands beside a finding in {text!r}")
    return np.array([finding in names for finding in NIH_FINDINGS], dtype=np.uint8)


def _numbers(column: pd.Series) -> pd.Series:
    """Turn text to floats; what is no number becomes NaN."""
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    return numbers.where(np.isfinite(numbers))
