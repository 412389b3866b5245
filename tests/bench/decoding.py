"""Notebook 02's decoding of 1024-pixel films, against the bare floor: Pillow in a process a core."""

import multiprocessing
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
    with multiprocessing.Pool(workload.THREADS) as pool:
        pool.map(bare, paths)  # starts the processes, and brings the films into the page cache
        for turn in range(pairs):
            shutil.rmtree(prepared, ignore_errors=True)
            arms = [
                (ours, lambda: fedutils.decode_films(table, source.folder, prepared, SIZE)),
                (floor, lambda: pool.map(bare, paths)),
            ]
            for seen, decode in arms if turn % 2 else arms[::-1]:
                laps = workload.Laps()
                decode()
                laps.lap()
                seen.append(films / laps.seconds[0])
    workload.report(ours=ours, floor=floor)


if __name__ == "__main__":
    main(**workload.arguments())
