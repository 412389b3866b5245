"""Films decoded once into a resumable uint8 store, with its index and report."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ..base.errors import InputError
from ..base.files import write_atomic
from ..base.findings import FINDINGS
from ..base.parameters import Parameters, parameter
from .read import NihData

STORE_VERSION = 1
FILMS_A_CHUNK = 256  # films between two entries in the journal: what a kill costs at most
INDEX_COLUMNS = [
    "image_index", "row", "patient_id", "follow_up", "age", "sex", "view", "scanner", "split",
]  # fmt: skip
FILM_COLUMNS = ["image_index", "problem", "mode", "width", "height", "sha256"]


@dataclass(frozen=True)
class FilmParameters(Parameters):
    """How films are stored."""

    image_size: int = parameter(
        0, "side of the stored films in pixels", bounds=(32, 1024), profiles=(64, 224)
    )


def decode_film(path: Path, image_size: int) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Decode one film to grey uint8 (image_size, image_size), and describe it.

    RGB, RGBA and palette files become one grey channel. The hash is that of the grey pixels at full
    size, so that equal films are found whatever their file format. A film that cannot be read gives
    None and the reason under "problem".
    """
    seen: dict[str, Any] = dict.fromkeys(FILM_COLUMNS[1:], "")
    try:
        with Image.open(path) as film:
            seen |= {"mode": film.mode, "width": film.width, "height": film.height}
            if film.mode.startswith(("I", "F")):
                raise ValueError(
                    f"mode {film.mode}: more than 8 bits a pixel; convert it to 8 first"
                )
            grey = film.convert("L")
    except Exception as error:  # whatever Pillow raises here is this film's fault and is reported
        problem = "empty file" if path.is_file() and not path.stat().st_size else str(error)
        return None, seen | {"problem": f"{type(error).__name__}: {problem}".replace("\n", " ")}
    seen["sha256"] = hashlib.sha256(grey.tobytes()).hexdigest()
    return np.asarray(grey.resize((image_size, image_size), Image.Resampling.BILINEAR)), seen


def decode_films(
    table: pd.DataFrame,
    folder: Path,
    prepared: Path,
    image_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> pd.DataFrame:
    """Decode the films of `table` (image_index, path) on all cores into `prepared/images.npy`.

    Returns one row a film in the table's order, which is the order of the store: image_index,
    problem (empty where it was read), mode, width, height, sha256. Work goes to a folder beside and
    is moved into place at the end; a journal written behind each chunk lets a killed run go on.
    Raises InputError where the disk is too small.
    """
    key = _store_key(table, folder, image_size)
    if (prepared / "films.csv").is_file() and _read_key(prepared) == key:
        return _read_films(prepared / "films.csv")
    work = prepared / f"decoding-{key[:12]}"
    store, done = _open_store(work, len(table), image_size)
    progress(done, len(table))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without holding the GIL
        for start in range(done, len(table), FILMS_A_CHUNK):
            chunk = table.iloc[start : start + FILMS_A_CHUNK]
            seen = pool.map(lambda path: decode_film(folder / path, image_size), chunk["path"])
            _write_chunk(work, store, start, chunk["image_index"], list(seen))
            progress(start + len(chunk), len(table))
    del store
    _publish(work, prepared, key)
    return _read_films(prepared / "films.csv")


def _store_key(table: pd.DataFrame, folder: Path, image_size: int) -> str:
    """Name what is decoded: the films in order with their file sizes, at which size, by what."""
    paths = [folder / path for path in table["path"]]
    sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
    films = [f"{name} {size}" for name, size in zip(table["image_index"], sizes, strict=True)]
    return hashlib.sha256(f"{STORE_VERSION}|{image_size}|{films}".encode()).hexdigest()


def _read_key(prepared: Path) -> str:
    """Return the key of the store that lies in `prepared`, or nothing."""
    path = prepared / "images.key"
    return path.read_text() if path.is_file() else ""


def _open_store(work: Path, films: int, image_size: int) -> tuple[np.ndarray, int]:
    """Create the store or reopen it, and tell how many films the journal vouches for."""
    journal, path = work / "films.csv", work / "images.npy"
    shape = (films, image_size, image_size)
    if journal.is_file() and path.is_file():
        whole = journal.read_bytes().rpartition(b"\n")[0].count(b"\n")  # less the header
        done = whole // FILMS_A_CHUNK * FILMS_A_CHUNK
        _truncate_journal(journal, done)
        return np.lib.format.open_memmap(path, mode="r+"), done
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    need, free = films * image_size**2, shutil.disk_usage(work).free
    if need > free * 0.98:
        raise InputError(
            f"{work}: the store needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        )
    store = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    journal.write_text(",".join(FILM_COLUMNS) + "\n")
    return store, 0


def _truncate_journal(journal: Path, films: int) -> None:
    """Cut the journal back to whole chunks: a kill may have come in the middle of a line."""
    lines = journal.read_bytes().splitlines(keepends=True)
    write_atomic(journal, b"".join(lines[: films + 1]))


def _write_chunk(
    work: Path, store: np.ndarray, start: int, names: pd.Series, seen: list[tuple]
) -> None:
    """Write films to the store, then, once they are on disk, their lines to the journal."""
    for offset, (film, _) in enumerate(seen):
        store[start + offset] = 0 if film is None else film
    store.flush()
    rows = pd.DataFrame([s for _, s in seen], columns=FILM_COLUMNS[1:])
    rows.insert(0, "image_index", names.to_numpy())
    with (work / "films.csv").open("a", newline="") as journal:
        rows.to_csv(journal, header=False, index=False)
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


def _read_films(path: Path) -> pd.DataFrame:
    """Read the journal of a finished store."""
    return pd.read_csv(path, dtype=dict.fromkeys(FILM_COLUMNS, str), keep_default_na=False)


def example_films(
    data: NihData, size: int = 256
) -> tuple[dict[str, np.ndarray], dict[str, list[tuple[float, ...]]]]:
    """Decode one film for each finding: uint8 (size, size), and its boxes in these pixels.

    The rule: a film with a box of that finding if there is one, then the fewest other findings,
    then the first name. A finding without a readable film is left out.
    """
    films, boxes = {}, {}
    table = data.table[data.table["path"] != ""]
    others = table[list(FINDINGS)].sum(axis=1)
    for finding in FINDINGS:
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
    that they follow any resize. `about` (release, image_size, ...) goes into the report too.
    """
    table = table.reset_index(drop=True).assign(row=np.arange(len(table)))
    good = (films["problem"] == "").to_numpy()
    index = table[good & (table["split"] != "")].sort_values("image_index")
    index = index[INDEX_COLUMNS + list(FINDINGS)].astype(dict.fromkeys(FINDINGS, "Int8"))
    content = index.to_csv(index=False).encode()
    write_atomic(prepared / "index.csv", content)
    inside = boxes.merge(films[["image_index", "width", "height"]][good], on="image_index")
    size = inside[["width", "height"]].astype(float)
    for name, side in zip("xywh", ["width", "height"] * 2, strict=True):
        inside[name] /= size[side]
    write_atomic(
        prepared / "boxes.csv",
        inside[["image_index", "finding", *"xywh"]].to_csv(index=False).encode(),
    )
    digest = hashlib.sha256(content + "".join(films["sha256"]).encode())
    digest.update(f"{STORE_VERSION}|{about['image_size']}".encode())
    report = {"fingerprint": digest.hexdigest(), **about, **_describe(index, films)}
    report["boxes"] = len(inside)
    write_atomic(prepared / "report.json", json.dumps(report, indent=1).encode())
    return report


def _describe(index: pd.DataFrame, films: pd.DataFrame) -> dict[str, Any]:
    """Count films, patients, splits, colour modes and sizes; name broken films and duplicates."""
    broken = films[films["problem"] != ""]
    good = films[films["problem"] == ""]
    twins = good[good.duplicated("sha256", keep=False)].groupby("sha256")["image_index"]
    sizes = (good["width"] + "x" + good["height"]).value_counts()
    by_split = index.groupby("split")["patient_id"].agg(films="size", patients="nunique")
    return {
        "films": len(index),
        "patients": int(index["patient_id"].nunique()),
        "splits": by_split.to_dict("index"),
        "modes": good["mode"].value_counts().to_dict(),
        "sizes": sizes.to_dict(),
        "quarantined": dict(zip(broken["image_index"], broken["problem"], strict=True)),
        "duplicates": sorted(names.tolist() for _, names in twins),
    }
