"""Notebook 02's decoding of 1024-pixel films, against the bare floor: Pillow in a process a core."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pandas as pd
import workload
from PIL import Image

import fedutils

SIZE = 224


def bare(path: Path) -> int:
    """Open, decode and resize one film; a byte of it is enough to know that it was done."""
    with Image.open(path) as film:
        return film.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR).getpixel((0, 0))


def main(work: str, data: str, films: int, pairs: int) -> None:
    """Decode `films` films, the set repeated if it has fewer, by both; report films/s."""
    source = fedutils.open_data(data, work)
    table = source.table[source.table["path"] != ""][["image_index", "path"]]
    table = pd.concat([table] * -(-films // len(table))).head(films)
    paths, prepared = [source.folder / path for path in table["path"]], Path(work) / "decoded"
    ours, floor = [], []
    with multiprocessing.Pool(os.cpu_count()) as pool:
        pool.map(bare, paths)  # starts the processes, and brings the films into the page cache
        for _ in range(pairs):
            shutil.rmtree(prepared, ignore_errors=True)
            laps = workload.Laps()
            fedutils.decode_films(table, source.folder, prepared, SIZE)
            laps.lap()
            pool.map(bare, paths)
            laps.lap()
            ours.append(films / laps.seconds[0])
            floor.append(films / laps.seconds[1])
    workload.report(ours=ours, floor=floor)


if __name__ == "__main__":
    main(**workload.arguments())
