"""Where the films are: a given folder, the environment, Kaggle's mounts, or the phantom."""

import functools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import InputError
from ..base.files import KAGGLE, search_files
from .cells import spreadsheet_in
from .mapping import MAPPING_NAME, candidates, presets

if TYPE_CHECKING:
    import pandas as pd

PHANTOM_MARKER = "PHANTOM.json"
KAGGLE_DEPTH, FILM_DEPTH = 4, 3  # folders below the mount, and below the data folder
WRITES = ("explore", "notebooks", "phantom", "prepared", "privacy", "runs")  # below the work folder


def find_data(data_dir: str = "", kaggle: Path = KAGGLE / "input") -> Path | None:
    """Return the data folder: `data_dir`, else NIH_DATA_DIR, else a Kaggle mount.

    None means: use the phantom. A mount is searched `KAGGLE_DEPTH` folders deep, without entering
    image folders; NIH's whole set is preferred to own films, these to NIH's sample set, and all to
    a phantom. Raises InputError if a folder was given and is missing, unreadable, empty or without
    a table.
    """
    given = data_dir or os.environ.get("NIH_DATA_DIR", "")
    if not given:
        return _search_data(kaggle, KAGGLE_DEPTH)
    folder = Path(given).expanduser()
    if problem := data_problem(folder):
        raise InputError(f"{'data_dir' if data_dir else 'NIH_DATA_DIR'}: {problem}")
    return folder


def data_problem(folder: Path) -> str:
    """Say why a folder cannot be used and what to do; "" if it can."""
    todo = f"give the folder of {', '.join(presets())}, or one with your own {MAPPING_NAME}"
    todo += " (see data/README.md)"
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return f"folder {folder} cannot be read ({error.strerror}); {todo}"
    if not names:
        return f"folder {folder} is empty; {todo}"
    if MAPPING_NAME in names or candidates(folder):
        return ""
    nested = _search_data(folder, 2)
    hint = f"there is one in {nested}: give that folder" if nested else todo
    hint += spreadsheet_in(folder)
    return f"folder {folder} has no table; it holds {', '.join(names[:5])}; {hint}"


def _search_data(root: Path, depth: int) -> Path | None:
    """Return the best folder with a mapping or a preset's table, at most `depth` below `root`.

    Real data come before a phantom, NIH's sample set after all other, then NIH before other
    presets, these before own films, then the nearest.
    """
    tables = list(search_files(root, "*.csv*", depth))
    folders = dict.fromkeys(folder for path in tables for folder in (path.parents[1], path.parent))
    found = {folder: [one.name for one in candidates(folder)] for folder in folders}
    found |= {path.parent: ["own"] for path in search_files(root, MAPPING_NAME, depth)}

    def rank(folder: Path) -> tuple[bool, bool, int]:
        """Say how far down a folder stands."""
        sample = (folder / "sample_labels.csv").exists()
        order = {"nih": 0, "own": 2}.get(found[folder][0], 1)
        return (folder / PHANTOM_MARKER).exists(), sample, order

    known = [folder for folder in found if found[folder]]
    return min(known, key=rank) if known else None


def walk(folder: Path, work: Path | None) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk a data folder as `os.walk`, links followed; a caller may prune the list of folders.

    What a run wrote below `work` is no input, should that lie in the data folder, or be it, nor is
    what is hidden or macOS adds. No folder is entered twice, however many links lead to it.
    """
    seen = {(work / name).resolve() for name in WRITES} if work else set()
    for here, inner, files in os.walk(folder, followlinks=True):
        seen.add(Path(here).resolve())
        found = {Path(here, name).resolve(): name for name in sorted(inner, reverse=True)}
        new = [name for place, name in found.items() if place not in seen]
        inner[:] = sorted(name for name in new if not name.startswith((".", "__MACOSX")))
        seen |= set(found)
        yield Path(here), inner, [name for name in files if not name.startswith("._")]


def real_places(films: Iterable[str], follow: bool) -> list[Path]:
    """Follow the links of films' folders, each once, and those of the films if they are to be."""
    folder = functools.cache(Path.resolve)
    paths = map(Path, films)
    return [path.resolve() if follow and path.is_symlink() else folder(path.parent) / path.name
            for path in paths]  # fmt: skip


def list_tables(folder: Path) -> list[Path]:
    """List the tables, lists and mapping of a data folder."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".csv", ".txt", ".gz", ".toml"))


def printable(name: str) -> str:
    """Return a file's name with what is no text, as older archives have it, written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def check_films(table: "pd.DataFrame", folder: Path, work: Path | None) -> None:
    """Raise InputError where none of the table's films is there, with what is."""
    if not table["path"].any():
        found = describe_files(folder, work)
        found = f"none of the {len(table)} films of the table is there; {found}"
        raise InputError(f"{folder}: {found}")


def describe_files(folder: Path, work: Path | None) -> str:
    """Say which files lie below a folder, at any depth, and what films should be like."""
    found = defaultdict(list)
    for here, _, files in walk(folder, work):
        for name in sorted(files):
            if not name.endswith((".csv", ".csv.gz", ".txt", ".toml", ".json")):
                path = here / name
                found[path.suffix].append(printable(path.relative_to(folder).as_posix()))
    kinds = [f"{len(names)} x {kind or 'file'} such as {names[0]}" for kind, names in found.items()]
    wanted = f"unpacked, at most {FILM_DEPTH} folders deep, and named as in the table"
    return f"it holds {', '.join(kinds) or 'no other files'}; films should be {wanted}"
