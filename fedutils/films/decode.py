"""Films decoded once into a resumable uint8 store, with its index and report."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
from PIL import Image

from ..base.device import count_cores
from ..base.errors import InputError
from ..base.files import open_store, read_written, run_lock, sha256, write_atomic
from ..base.findings import findings_of
from ..base.parameters import Parameters, parameter
from .find import check_films
from .formats import read_grey
from .read import DataSet
from .split import check_splits
from .suspects import find_suspects
from .twins import find_twins

STORE_VERSION = 2
FILMS_A_CHUNK = 256  # films between two entries in the journal: what a kill costs at most
INDEX_COLUMNS = [
    "image_index", "row", "source", "patient_id", "follow_up", "age", "sex", "view", "scanner",
    "split",
]  # fmt: skip
FILM_COLUMNS = ["image_index", "problem", "mode", "width", "height", "pixels"]


@dataclass(frozen=True)
class FilmParameters(Parameters):
    """How films are stored."""

    image_size: int = parameter(
        0, "side of the stored films in pixels", bounds=(32, 1024), profiles=(64, 224)
    )
    twins: str = parameter(
        "keep", "near-equal films of two patients: keep them, named in the report, or drop all",
        allowed=("keep", "drop"),
    )  # fmt: skip
    suspects: str = parameter(
        "report", "films that look inverted, turned, mirrored or unlike a chest: report, or drop",
        allowed=("report", "drop"),
    )  # fmt: skip


def decode_film(path: Path, image_size: int) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Decode one film to grey uint8 (image_size, image_size), and describe it.

    Whatever its format, depth and colour mode, a film becomes one grey channel; see `formats`.
    `pixels` tells equal films, whatever their file format: a hash of the stored film and a
    checksum of all grey pixels. A film that cannot be read, or not in one way alone, gives None and
    the reason under "problem".
    """
    seen: dict[str, Any] = dict.fromkeys(FILM_COLUMNS[1:], "")
    try:
        if path.exists() and not path.is_file():  # the table's path is empty, or it is a pipe
            raise FileNotFoundError("the folder has no film of this name")
        grey, seen["mode"] = read_grey(path)
        seen |= {"width": grey.width, "height": grey.height}
    except Exception as error:  # whatever is raised here is this film's fault and is reported
        problem = "empty file" if path.is_file() and not path.stat().st_size else str(error)
        return None, seen | {"problem": f"{type(error).__name__}: {problem}".replace("\n", " ")}
    small = grey.resize((image_size, image_size), Image.Resampling.BILINEAR)
    seen["pixels"] = sha256(small.tobytes() + crc32(grey.tobytes()).to_bytes(4))
    return np.asarray(small), seen


def decode_films(
    table: pd.DataFrame,
    folder: Path,
    prepared: Path,
    image_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> pd.DataFrame:
    """Decode the films of `table` (image_index, path) on all cores into `prepared/images.npy`.

    Returns one row a film in the table's order, which is the order of the store: image_index,
    problem (empty where it was read), mode, width, height, pixels. Work goes to a folder beside and
    is moved into place at the end; a journal written behind each chunk lets a killed run go on, and
    a second process waits. A store is used again while names, sizes and times of the films are the
    same. Raises InputError where no film is there or can be read, or the disk is too small.
    """
    check_films(table, folder, prepared.parent)
    with run_lock(prepared, wait=True):
        films = _decode_once(table, folder, prepared, image_size, progress)
    if films["problem"].all():
        one = f"{folder / table['path'].iloc[0]}: {films['problem'][0]}"
        raise InputError(f"none of {len(films)} films can be read, such as {one}")
    return films


def _decode_once(
    table: pd.DataFrame, folder: Path, prepared: Path, image_size: int, progress: Callable
) -> pd.DataFrame:
    """Decode as `decode_films` does, unless the finished store is of these very films."""
    paths = [folder / path for path in table["path"]]
    stats = [path.stat() if path.is_file() else None for path in paths]
    times = [(about.st_size, about.st_mtime_ns) if about else () for about in stats]
    named = list(zip(table["image_index"], times, strict=True))
    key = sha256(f"{STORE_VERSION}|{image_size}|{named}".encode())
    marker, films = prepared / "images.key", prepared / "films.csv"
    if not (
        marker.is_file() and marker.read_text() == key
        and _is_whole(prepared, len(table), image_size)
    ):  # fmt: skip
        work = prepared / f"decoding-{key[:12]}"
        store, done = _open_store(work, len(table), image_size)
        progress(done, len(table))
        with ThreadPoolExecutor(count_cores()) as pool:  # Pillow decodes without holding the GIL
            for start in range(done, len(table), FILMS_A_CHUNK):
                chunk = slice(start, start + FILMS_A_CHUNK)
                seen = pool.map(lambda path: decode_film(path, image_size), paths[chunk])
                _write_chunk(work, store[chunk], table["image_index"].iloc[chunk], list(seen))
                progress(min(chunk.stop, len(table)), len(table))
        del store
        _publish(work, prepared, key)
    return read_written(films, *FILM_COLUMNS)


def _is_whole(prepared: Path, films: int, image_size: int) -> bool:
    """Tell whether store and journal hold so many films of this size."""
    try:
        store = open_store(prepared / "images.npy")
        lines = (prepared / "films.csv").read_bytes().count(b"\n")
    except (OSError, InputError):
        return False
    return store.shape == (films, image_size, image_size) and lines == films + 1


def _open_store(work: Path, films: int, image_size: int) -> tuple[np.ndarray, int]:
    """Create the store or reopen it, and tell how many films the journal vouches for."""
    journal, path = work / "films.csv", work / "images.npy"
    if journal.is_file() and path.is_file():
        lines = journal.read_bytes().splitlines(keepends=True)
        whole = sum(line.endswith(b"\n") for line in lines) - 1  # a kill may have come in a line
        done = whole // FILMS_A_CHUNK * FILMS_A_CHUNK
        write_atomic(journal, b"".join(lines[: done + 1]))
        return np.lib.format.open_memmap(path, mode="r+"), done
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    need, free = films * image_size**2 / 1e9, shutil.disk_usage(work).free / 1e9
    if need > free * 0.98:
        raise InputError(f"{work}: the store needs {need:.1f} GB, {free:.1f} GB are free")
    shape = (films, image_size, image_size)
    store = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    write_atomic(journal, (",".join(FILM_COLUMNS) + "\n").encode())
    return store, 0


def _write_chunk(work: Path, store: np.ndarray, names: pd.Series, seen: list[tuple]) -> None:
    """Write films to their place, then, once they are on disk, their lines to the journal."""
    for row, (film, _) in enumerate(seen):
        store[row] = 0 if film is None else film
    store.flush()
    rows = pd.DataFrame([about for _, about in seen], index=names)
    with (work / "films.csv").open("a", newline="") as journal:
        rows.to_csv(journal, header=False)
        journal.flush()
        os.fsync(journal.fileno())


def _publish(work: Path, prepared: Path, key: str) -> None:
    """Move a finished store into place; what was made from the one before goes first."""
    for name in ("report.json", "index.csv", "boxes.csv", "images.key"):
        (prepared / name).unlink(missing_ok=True)
    for name in ("images.npy", "films.csv"):
        (work / name).replace(prepared / name)
    write_atomic(prepared / "images.key", key.encode())
    for rest in prepared.glob("decoding-*"):
        shutil.rmtree(rest)


def example_films(
    data: DataSet, size: int = 256
) -> tuple[dict[str, np.ndarray | None], dict[str, list[tuple[float, ...]]]]:
    """Decode one film for each finding: uint8 (size, size), and its boxes in these pixels.

    The rule: a film with a box of that finding if there is one, then the fewest other findings,
    then the first name. A finding without a readable film has None.
    """
    findings = findings_of(data.table)
    films, boxes = dict.fromkeys(findings), {}
    table = data.table[data.table["path"] != ""]
    others = table[findings].sum(axis=1)
    for finding in findings:
        mine = data.boxes[data.boxes["finding"] == finding]
        boxed = ~table["image_index"].isin(mine["image_index"])
        order = table.assign(boxed=boxed, others=others)[table[finding] == 1]
        for film in order.sort_values(["boxed", "others", "image_index"]).head(1).itertuples():
            pixels, seen = decode_film(data.folder / film.path, size)
            if pixels is not None:
                films[finding] = pixels
                scale = np.tile([size / seen["width"], size / seen["height"]], 2)
                rows = mine.loc[mine["image_index"] == film.image_index, list("xywh")]
                boxes[finding] = [tuple(row) for row in rows.to_numpy() * scale]
    return films, boxes


def write_index(
    table: pd.DataFrame, films: pd.DataFrame, boxes: pd.DataFrame, prepared: Path, about: dict
) -> dict[str, Any]:
    """Write `index.csv`, `boxes.csv` and `report.json` for a decoded table; return the report.

    `table` has the store's rows in order, with a `split` column. Films with a problem are left out
    of the index and named in the report. Boxes are written as fractions of the film's sides, so
    that they follow any resize. `about` (release, image_size, ...) goes into the report too. Films
    of different patients that are near-equal are named there, and films that look wrong; with
    `twins` or `suspects` "drop" in `about` they are left out. Raises InputError where another
    process has stored other films since `films` were.
    """
    with run_lock(prepared, wait=True):
        stored = read_written(prepared / "films.csv", *FILM_COLUMNS)
        if not (stored.equals(films) and _is_whole(prepared, len(table), about["image_size"])):
            found = "another process has stored other films here meanwhile"
            raise InputError(f"{prepared}: {found}; run notebook 02_preprocess again")
        return _write_index(table, films, boxes, prepared, about)


def _write_index(
    table: pd.DataFrame, films: pd.DataFrame, boxes: pd.DataFrame, prepared: Path, about: dict
) -> dict[str, Any]:
    """Write what `write_index` says, and return the report."""
    about_source = {"source": table.get("source", "")}  # a table of one's own may have none
    table = table.reset_index(drop=True).assign(row=np.arange(len(table)), **about_source)
    readable = (films["problem"] == "").to_numpy()
    broken, good = films[~readable], films[readable]
    index = table[readable & (table["split"] != "")].sort_values("image_index")
    store = open_store(prepared / "images.npy")
    near, wrong = find_twins(store, index.join(films["pixels"])), find_suspects(store, index)
    for name, what, named in (
        ("twins", "near-equal", near[["film", "twin"]]),
        ("suspects", "suspect", wrong[["film"]]),
    ):
        if about.get(name) == "drop":
            index = index[~index["image_index"].isin(named.to_numpy().ravel())]
            check_splits(index, about.get("seed", 0), f"{name}=drop left out {what} films; ")
    findings = findings_of(table)
    index = index[INDEX_COLUMNS + findings].astype(dict.fromkeys(findings, "Int8"))
    content = index.to_csv(index=False).encode()
    write_atomic(prepared / "index.csv", content)
    inside = boxes.merge(good[["image_index", "width", "height"]], on="image_index")
    size = inside[["width", "height"]].astype(float)
    for name, side in zip("xywh", ["width", "height"] * 2, strict=True):
        inside[name] /= size[side]
    inside = inside[["image_index", "finding", *"xywh"]]
    write_atomic(prepared / "boxes.csv", inside.to_csv(index=False).encode())
    hashes = "".join(films["pixels"]) + f"{STORE_VERSION}|{about['image_size']}"
    twins = good[good.duplicated("pixels", keep=False)].groupby("pixels")["image_index"]
    by_split = index.groupby("split")["patient_id"].agg(films="size", patients="nunique")
    report = {
        "fingerprint": sha256(content + hashes.encode()),
        **about,
        "outputs": findings,
        "films": len(index),
        "patients": int(index["patient_id"].nunique()),
        "splits": by_split.to_dict("index"),
        "modes": good["mode"].value_counts().to_dict(),
        "sizes": (good["width"] + "x" + good["height"]).value_counts().to_dict(),
        "quarantined": dict(zip(broken["image_index"], broken["problem"], strict=True)),
        "duplicates": sorted(names.tolist() for _, names in twins),
        "near_equal": near.to_dict("split", index=False)["data"],
        "look_wrong": wrong.to_dict("split", index=False)["data"],
        "boxes": len(inside),
    }
    write_atomic(prepared / "report.json", json.dumps(report, indent=1).encode())
    return report
