"""Films decoded once into a resumable uint8 store, and the Dataset that reads it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .findings import FINDINGS, InputError
from .nih import NihData
from .rng import generator

STORE_VERSION = 1
CHUNK = 256  # films between two entries in the journal: what a kill costs at most
INDEX_COLUMNS = [
    "image_index", "row", "patient_id", "follow_up", "age", "sex", "view", "scanner", "split",
]  # fmt: skip
FILM_COLUMNS = ["image_index", "problem", "mode", "width", "height", "sha256"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_ANGLE, MAX_SHIFT = 7.0, 0.05  # degrees; share of the film's side


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
        for start in range(done, len(table), CHUNK):
            chunk = table.iloc[start : start + CHUNK]
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
        done = whole // CHUNK * CHUNK
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


def write_atomic(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write a file so that after a kill at any moment the old or the new content is there.

    `content` may be a function that writes to the path that it is given.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content) if isinstance(content, bytes) else content(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


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


def choose_films(table: pd.DataFrame, max_films: int, seed: int) -> pd.DataFrame:
    """Return at most `max_films` films (0: all) of whole patients, drawn by patient."""
    if not max_films or len(table) <= max_films:
        return table
    films = table["patient_id"].value_counts().sort_index()
    order = generator(seed, "max_films").permutation(len(films))
    total = films.iloc[order].cumsum()
    return table[table["patient_id"].isin(total.index[total <= max_films])]


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


def read_report(prepared: Path) -> dict[str, Any]:
    """Read `report.json`; raise InputError where notebook 02 has not run."""
    path = prepared / "report.json"
    if not path.is_file():
        raise InputError(f"{path} is not there: run notebook 02_preprocess first")
    return json.loads(path.read_text())


def read_index(prepared: Path) -> pd.DataFrame:
    """Read `index.csv` as notebook 02 wrote it; a finding that nobody looked for is NaN."""
    text = ("image_index", "patient_id", "sex", "view", "scanner", "split")
    index = pd.read_csv(prepared / "index.csv", dtype=dict.fromkeys(text, str))
    index[list(text)] = index[list(text)].fillna("")
    return index.astype(dict.fromkeys(FINDINGS, np.float32))


class ChestXrayDataset(torch.utils.data.Dataset):
    """Films and labels of some rows of the index, read from the store without decoding anything.

    `dataset[i]` is a film, uint8 (1, H, W), and its labels, float32 (14,), NaN where unknown;
    `dataset.batch(positions)` reads many at once. `dataset.index` is the table of its films.
    After `holding(features)` a film is what the model's frozen trunk made of it.
    """

    def __init__(self, prepared: Path, index: pd.DataFrame | None = None) -> None:
        self.index = (read_index(prepared) if index is None else index).reset_index(drop=True)
        self.store = np.load(prepared / "images.npy", mmap_mode="r")
        self.labels = self.index[list(FINDINGS)].to_numpy(np.float32)
        self._rows = self.index["row"].to_numpy()

    def __len__(self) -> int:
        """Count the films."""
        return len(self._rows)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """Return one film, uint8 (1, H, W) or features (C, h, w), and its labels, float32 (14,)."""
        films, labels = self.batch([position])
        return films[0], labels[0]

    def batch(
        self, positions: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Return films, uint8 (B, 1, H, W), and labels, float32 (B, 14), on a device.

        Features are (B, C, h, w), channels last as they are stored.
        """
        films = torch.from_numpy(self.store[self._rows[positions]])
        films = films[:, None] if films.ndim == 3 else films.permute(0, 3, 1, 2)
        labels = torch.from_numpy(self.labels[positions])
        if torch.device(device).type == "cuda":  # pinned, the copy overlaps with the last step
            films, labels = films.pin_memory(), labels.pin_memory()
        return films.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def holding(self, features: np.ndarray) -> "ChestXrayDataset":
        """Return the same films as features (N, h, w, C), a row for each row of the store."""
        part = self.where(np.full(len(self), True))
        part.store = features
        return part

    def where(self, keep: pd.Series | np.ndarray) -> "ChestXrayDataset":
        """Return the films for which the mask is true; the store is shared, not copied."""
        part = object.__new__(ChestXrayDataset)
        part.store, part.index = self.store, self.index[np.asarray(keep)].reset_index(drop=True)
        part.labels, part._rows = self.labels[np.asarray(keep)], self._rows[np.asarray(keep)]
        return part


def normalise(films: Tensor, rng: np.random.Generator | None = None) -> Tensor:
    """Turn uint8 films (B, 1, H, W) into the network's input, float32 (B, 3, H, W), channels last.

    With a generator each film is first turned by up to 7 degrees and shifted by up to 5 % of its
    side; never flipped, since hearts are on the left. ImageNet's mean and deviation are used.
    """
    grey = films.float().div_(255)
    if rng is not None:
        grey = _turn_and_shift(grey, rng)
    # With plain numbers, since a tensor made here would make a GPU wait for the CPU in every step.
    channels = [(grey - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    return torch.cat(channels, dim=1).contiguous(memory_format=torch.channels_last)


def _turn_and_shift(grey: Tensor, rng: np.random.Generator) -> Tensor:
    """Rotate and shift each film of a batch by its own draw."""
    angle = np.radians(rng.uniform(-MAX_ANGLE, MAX_ANGLE, len(grey)))
    shift = rng.uniform(-2 * MAX_SHIFT, 2 * MAX_SHIFT, (2, len(grey)))  # the grid spans -1 to 1
    rows = [[np.cos(angle), -np.sin(angle), shift[0]], [np.sin(angle), np.cos(angle), shift[1]]]
    theta = torch.from_numpy(np.array(rows, np.float32).transpose(2, 0, 1))
    theta = theta.to(grey.device, non_blocking=True)
    grid = F.affine_grid(theta, list(grey.shape), align_corners=False)
    return F.grid_sample(grey, grid, padding_mode="border", align_corners=False)
