"""Cells of tables: as spreadsheets save them, to text, ids, numbers, ages and labels."""

import csv
import functools
import gzip
import io
import posixpath
import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import suppress
from itertools import dropwhile, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd

from ..base.errors import InputError

HEADER_BYTES, HEADER_ROWS = 65_536, 10  # among which a table's header is looked for
SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods")
OFFICE = (b"PK\3\4", b"\xd0\xcf\x11\xe0")  # how their files begin, of today and of old
SAVE_AS_CSV = "save its sheet as CSV (UTF-8), and name that file"
CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"
ENDINGS = {".jpeg": ".jpg", ".tiff": ".tif", ".dicom": ".dcm"}
WHOLE_NUMBER = re.compile(r"(\d+)(?:[.,]0{0,2})?")  # 1,000 and 1.000 may be a thousand
DAYS_PER_YEAR = 365.25
AGE_UNITS = {"Y": 1.0, "": 1.0, "M": 1 / 12, "W": 7 / DAYS_PER_YEAR, "D": 1 / DAYS_PER_YEAR}


def decode(raw: bytes, errors: str = "strict") -> str:
    """Return the text of a file: UTF-8 or UTF-16, with their marks or without, or Windows'."""
    head = raw[:HEADER_BYTES]
    zeros = head[1::2].count(0) - head[::2].count(0)  # each second byte of Latin text in UTF-16
    kind = "utf-8-sig"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        kind = "utf-16"
    elif abs(zeros) > len(head) / 8:
        kind = "utf-16-le" if zeros > 0 else "utf-16-be"
    try:
        return raw.decode(kind, errors)
    except UnicodeDecodeError:
        if kind != "utf-8-sig":
            raise
        return raw.decode("cp1252")


def read_text(file: Path) -> str:
    """Return a text file, gunzipped if need be; InputError where it cannot be read."""
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
        if raw.startswith(OFFICE):
            raise InputError(f"{file}: is a spreadsheet or an archive; {SAVE_AS_CSV}")
        return decode(raw)
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); mend it or get it again") from None


def spreadsheet_in(folder: Path) -> str:
    """Say what to do where a folder's table may be a spreadsheet; "" if it holds none."""
    found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SPREADSHEETS)
    return f"; open {found[0]} and {SAVE_AS_CSV}" if found else ""


def read_top(file: Path, loose: bool) -> set[str]:
    """Return the cells of a table's first rows, one of them its header; none if it is unreadable.

    Whoever reads all of it says why. What is not UTF, in which a last sign is cut, is left out.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            text = decode(opened.read(HEADER_BYTES), errors="ignore")
    except (OSError, EOFError, zlib.error):
        return set()
    text = text.replace('"', "") if loose else text
    return {cell for _, cells, _ in _first_rows(text, file) for cell in cells}


def _rows(text: str, delimiter: str, file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line at which each row of a CSV starts, and its cells; blank lines are no rows."""
    reader, start = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file}, line {start}: is no CSV ({error}); mend it") from None


def _first_rows(text: str, file: Path) -> Iterator[tuple[int, list[str], str]]:
    """Yield a CSV's first rows by a comma, a semicolon and a tab: line, cells and separator.

    Or by the one that Excel's first line names, `sep=;`, which is no row.
    """
    said = re.match(r'"?sep=([^"\r\n])"?[\r\n]', text, re.IGNORECASE)
    for delimiter in said[1] if said else ",;\t":
        with suppress(InputError):  # whoever reads on says why
            for line, cells in islice(_rows(text, delimiter, file), HEADER_ROWS):
                if line > 1 or not said:
                    yield line, [cell.strip() for cell in cells], delimiter


def read_cells(
    file: Path, loose: bool, names: Set[str], wanted: Callable[[list[str]], dict[str, str]]
) -> tuple[pd.DataFrame, list[str]]:
    """Read some columns of a CSV as text; return them, with the line as index, and the header.

    This is the first row, or one of the next that has more of the `names` of columns: above it may
    stand titles. `wanted` is told it and returns the columns' names by ours. Where the table is
    `loose`, quotes mean nothing, and a row may be shorter than the header, or longer by blanks.
    Raises InputError that names the line of a row that is not as long as the header.
    """
    text = read_text(file)
    text = text.replace('"', "") if loose else text
    first, header, delimiter = max(
        _first_rows(text, file), default=(0, [], ","),
        key=lambda row: (len(names & {*row[1]}), -row[0], len(row[1])),
    )  # fmt: skip
    places = {ours: header.index(theirs) for ours, theirs in wanted(header).items()}
    pick = itemgetter(0, *places.values())  # the first one, too: of one place there is no tuple
    # A name such as Image[Width,Height] may stand for two cells, and the last for none.
    most = len(",".join(header).rstrip(",").split(",")) if loose else len(header)
    lines, flat = [], []  # one flat list: to look after a list a row costs more than to read them
    for line, cells in dropwhile(lambda row: row[0] <= first, _rows(text, delimiter, file)):
        if len(cells) != len(header) or most < len(header):
            if not loose or any(map(str.strip, cells[most:])):
                found = f"{len(cells)} cells, but the header has {most}"
                todo = "take the separator out of" if loose else "quote"
                raise InputError(
                    f"{file}, line {line}: {found}; mend the row ({todo} a cell that holds it)"
                )
            cells += [""] * (len(header) - len(cells))
        lines.append(line)
        flat.extend(pick(cells))
    if not lines:
        raise InputError(f"{file}: has no rows below its header; give a table with films")
    width = len(places) + 1
    columns = {ours: list(map(str.strip, flat[k::width])) for k, ours in enumerate(places, 1)}
    return pd.DataFrame(columns, lines, dtype=object), header


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


def film_name(column: pd.Series) -> pd.Series:
    """Write a film's name, or its path below the folder, in one way: `a/b.png`, composed."""
    column = column.str.replace("\\", "/").str.normalize("NFC")
    return column.where(~column.str.contains("/"), column.map(posixpath.normpath))


def as_written(names: pd.Series, known: Iterable[str], where: Path) -> pd.Series:
    """Write names of films as known ones are, also where .JPG, .jpeg and .jpg, or case, differ.

    Raises InputError for a name that is so two known ones.
    """
    there, alike = {*known}, defaultdict(list)
    if odd := {*names} - there:
        for name in sorted(there):
            for spelled in {*spellings(name)}:
                alike[spelled].append(name)
    ours = {}
    for name in sorted(odd):
        found = next((alike[one] for one in spellings(name) if one in alike), [name])
        if len(found) > 1:
            told = f"{name!r} may be {found[0]!r} or {found[1]!r} of the table"
            raise InputError(f"{where}: {told}; write it as one of them")
        ours[name] = found[0]
    return names.map(lambda name: ours.get(name, name))


def spellings(name: str) -> tuple[str, str, str]:
    """Write a film's name as it is, with its ending in one way, and in small letters, too."""
    stem, end = posixpath.splitext(name)
    plain = stem + ENDINGS.get(end.lower(), end.lower())
    return name, plain, plain.lower()


def once(work: Callable[[pd.Series], pd.Series]) -> Callable[[pd.Series], pd.Series]:
    """Let a function of a column see each different text once."""

    @functools.wraps(work)
    def on_different(column: pd.Series) -> pd.Series:
        """Work on the different texts, and put each result where its text stands."""
        codes, different = pd.factorize(column)
        done = work(pd.Series(different, dtype=object).str.strip())
        return pd.Series(done.to_numpy()[codes], column.index, dtype=done.dtype)

    return on_different


@once
def numbers(column: pd.Series) -> pd.Series:
    """Turn text to floats, with a decimal comma too; what is no number becomes NaN."""
    plain = column.str.replace(r"^(-?\d+),(\d+)$", r"\1.\2", regex=True)
    found = pd.to_numeric(plain, errors="coerce").astype(float)
    return found.where(np.isfinite(found))


@once
def years(column: pd.Series) -> pd.Series:
    """Turn ages such as 58, 61,5, 060Y, 018M, 003W or 005D to years; NaN for any other text."""
    parts = column.str.upper().str.extract(r"^(-?\d+(?:[.,]\d+)?)([YMWD]?)$")
    return numbers(parts[0].fillna("")) * parts[1].map(AGE_UNITS)


@once
def year(column: pd.Series) -> pd.Series:
    """Turn dates to their year, at the begin or the end: 1950, 19501231, 1950-12-31, 31.12.1950."""
    found = column.str.extract(r"^((?:1[89]|20)\d\d)(?!\d{1,3}$)|\D((?:1[89]|20)\d\d)$")
    return found[0].fillna(found[1]).astype(float)


@once
def one_line(column: pd.Series) -> pd.Series:
    """Turn line ends and other control signs into blanks."""
    return column.str.replace(CONTROL, " ", regex=True).str.strip()


@once
def as_file_name(column: pd.Series) -> pd.Series:
    """Write a text as a part of a file's name."""
    return column.str.replace(r"[^\w.-]+", "-", regex=True)


@once
def upper(column: pd.Series) -> pd.Series:
    """Write a text in capitals."""
    return column.str.upper()


def first_group(column: pd.Series, pattern: str) -> pd.Series:
    """Return the first group of an expression found in each text, "" where it is not found."""
    found = map(re.compile(pattern).search, column)
    return pd.Series(
        [match[1] or "" if match else "" for match in found], column.index, dtype=object
    )
