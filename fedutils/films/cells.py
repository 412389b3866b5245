"""Cells of tables: as spreadsheets save them, to text, ids, numbers, ages and labels."""

import csv
import functools
import gzip
import io
import posixpath
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd

from ..base.errors import InputError

HEADER_BYTES = 65_536
CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"
ENDINGS = {".jpeg": ".jpg", ".tiff": ".tif", ".dicom": ".dcm"}
WHOLE_NUMBER = re.compile(r"(\d+)(?:[.,]0{0,2})?")  # 1,000 and 1.000 may be a thousand
DAYS_PER_YEAR = 365.25
AGE_UNITS = {"Y": 1.0, "": 1.0, "M": 1 / 12, "W": 7 / DAYS_PER_YEAR, "D": 1 / DAYS_PER_YEAR}


def decode(raw: bytes) -> str:
    """Return the text of a file: UTF-8 or UTF-16 with their marks, UTF-8 without, or Windows'."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252")


def read_text(file: Path) -> str:
    """Return a text file, gunzipped if need be; InputError where it cannot be read."""
    try:
        raw = file.read_bytes()
        return decode(gzip.decompress(raw) if file.suffix == ".gz" else raw)
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); mend it or get it again") from None


def read_header(file: Path, loose: bool) -> list[str]:
    """Return the names of a table's columns; none where the file cannot be read."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            first = decode(opened.read(HEADER_BYTES)).partition("\n")[0]
        return next(_rows(first, file, loose), (0, []))[1]
    except (OSError, EOFError, zlib.error, UnicodeError, InputError):
        return []  # whoever reads the whole file says why


def _rows(text: str, file: Path, loose: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield the line at which each row of a CSV starts, and its cells; blank lines are no rows.

    The separator is a comma, a semicolon or a tab.
    """
    text = text.replace('"', "") if loose else text
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader, start = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                yield start, [cell.strip() for cell in cells] if start == 1 else cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file}, line {start}: is no CSV ({error}); mend it") from None


def read_cells(file: Path, loose: bool, wanted: Callable[[list[str]], dict[str, str]]) -> tuple:
    """Read some columns of a CSV as text; return them, with the line as index, and the header.

    `wanted` is told the header and returns their names by ours. Where the table is `loose`, quotes
    mean nothing, and a row may be shorter than the header, or longer by blanks. Raises InputError
    that names the line of a row that is not as long as the header.
    """
    rows = _rows(read_text(file), file, loose)
    _, header = next(rows, (0, []))
    places = {ours: header.index(theirs) for ours, theirs in wanted(header).items()}
    pick = itemgetter(0, *places.values())  # the first one, too: of one place there is no tuple
    # A name such as Image[Width,Height] may stand for two cells, and the last for none.
    most = len(",".join(header).rstrip(",").split(",")) if loose else len(header)
    lines, flat = [], []  # one flat list: to look after a list a row costs more than to read them
    for line, cells in rows:
        if (len(cells) != len(header) and not loose) or any(map(str.strip, cells[most:])):
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
    columns = {ours: [cell.strip() for cell in flat[k::width]] for k, ours in enumerate(places, 1)}
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


def as_written(names: pd.Series, known: pd.Series) -> pd.Series:
    """Write names of films as known ones are, also where .JPG, .jpeg and .jpg differ."""
    there = {*known}
    spelled = {plain_ending(name): name for name in known} if {*names} - there else {}
    return names.map(lambda name: name if name in there else spelled.get(plain_ending(name), name))


def plain_ending(name: str) -> str:
    """Write the ending of a film's name in one way, in small letters and three of them."""
    stem, end = posixpath.splitext(name)
    return stem + ENDINGS.get(end.lower(), end.lower())


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
