"""The phantom on disk: films, table, boxes and split lists in NIH's own layout."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from ...base.device import count_cores
from ...base.errors import InputError
from .cases import DEFAULT_PATIENTS, DEFAULT_SIZE, FINDINGS, Film, phantom_table, to_films
from .signs import draw_film

FORMAT_VERSION = 4
NOTICE = "PHANTOM: synthetic drawings, not patients; nothing measured on them is clinical evidence."
NIH_COLUMNS = [
    "Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender",
    "View Position", "Width", "Height", "Spacing",
]  # fmt: skip
NIH_HEADER = (
    ",".join(NIH_COLUMNS[:7]) + ",OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
)
BOXED = FINDINGS[:8]  # the findings that NIH's radiologists boxed


def draw_batch(count: int, size: int = DEFAULT_SIZE, seed: int = 0) -> np.ndarray:
    """Draw `count` films, uint8 (count, size, size), of patients that no written phantom has."""
    table = phantom_table(max(20, count), seed)
    table["Patient ID"] += 90_000_000
    films = to_films(table)[:count]
    return np.stack(_in_threads(lambda film: draw_film(film, size, seed)[0], films))


def _in_threads(work: Callable, *arguments: Iterable) -> list:
    """Map `work` over its arguments with a thread for each core; results keep their order."""
    # glibc hands the pages of every freed array back to the system, and fetching them anew costs
    # as much as drawing does, until it has once seen a larger block come and go.
    np.ones(1 << 24, dtype=np.uint8)
    with ThreadPoolExecutor(count_cores()) as pool:
        return list(pool.map(work, *arguments))


def write_phantom(
    folder: Path, patients: int = DEFAULT_PATIENTS, size: int = DEFAULT_SIZE, seed: int = 0
) -> Path:
    """Write the phantom in NIH's Kaggle layout, or do nothing if it is already there.

    `size` is the edge of the films in pixels. The folder appears as a whole or not at all; the same
    arguments give the same bytes. InputError where it holds something else, or for a size below 64.
    """
    if size < 64:
        raise InputError(f"size={size}: the phantom's films need at least 64 pixels")
    folder = Path(folder)
    manifest = {"notice": NOTICE, "format_version": FORMAT_VERSION, "finished": True}
    manifest |= {"patients": patients, "size": size, "seed": seed}
    if _manifest(folder) == manifest:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "phantom"
        _write(fresh, phantom_table(patients, seed), manifest)
        if _manifest(folder) is not None:
            shutil.rmtree(folder)
        fresh.rename(folder)
    return folder


def _manifest(folder: Path) -> dict | None:
    """Return what PHANTOM.json says, None for no folder or an empty one; refuse other folders."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    try:
        return json.loads((folder / "PHANTOM.json").read_text())
    except ValueError:
        return {}
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds files but no phantom: name an empty folder") from error


def _write(folder: Path, table: pd.DataFrame, manifest: dict) -> None:
    """Write all files of the phantom: PHANTOM.json first, so that a torn folder is recognised."""
    parts = np.where(np.arange(len(table)) < len(table) / 2, "images_001", "images_002")
    for part in ("images_001", "images_002"):
        (folder / part / "images").mkdir(parents=True)
    (folder / "PHANTOM.json").write_text(json.dumps(manifest | {"finished": False}))

    def draw(film: Film, part: str, rgba: bool) -> dict[str, tuple]:
        """Draw one film into a PNG file and return its boxes."""
        pixels, boxes = draw_film(film, manifest["size"], manifest["seed"])
        image = Image.fromarray(pixels)
        image = image.convert("RGBA") if rgba else image
        image.save(folder / part / "images" / film.name, compress_level=1)
        return boxes

    rgba = np.arange(len(table)) % 97 == 13  # NIH has 4 of them in 1,000
    _write_tables(folder, table, _in_threads(draw, to_films(table), parts, rgba))
    (folder / "PHANTOM.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _write_tables(folder: Path, table: pd.DataFrame, boxes: list[dict[str, tuple]]) -> None:
    """Write the table, the boxes of the test films and the two lists, with NIH's own quirks."""
    body = table[NIH_COLUMNS].assign(repeated=table["Spacing"], empty="")
    text = NIH_HEADER + body.to_csv(index=False, header=False, lineterminator="\n")
    (folder / "Data_Entry_2017.csv").write_text(text)
    lines = ["Image Index,Finding Label,Bbox [x,y,w,h],,,"]
    for name, split, found in zip(table["Image Index"], table["split"], boxes, strict=True):
        for finding in BOXED if split == "test" else ():
            if finding in found:
                label = "Infiltrate" if finding == "Infiltration" else finding
                lines.append(",".join((name, label, *map(str, found[finding]))) + ",,,")
    (folder / "BBox_List_2017.csv").write_text("\n".join(lines) + "\n")
    for split, end in (("train_val", "\n"), ("test", "")):
        names = table.loc[table["split"] == split, "Image Index"]
        (folder / f"{split}_list.txt").write_text("\n".join(names) + end)
