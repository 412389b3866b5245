"""What FLOP and decoding allow for the hand-written loop's task: nothing is done twice, or beside.

Each film is decoded once, by Pillow on all cores; the frozen trunk runs once over it; layer4 and fc
train from what that gave, in memory, a replica a core. No start, no federation, no file, no history,
no validation; and what clients take is divided by the cores, as if none ever waited for another.
"""

import itertools
import multiprocessing
import queue
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import torch
import workload
from PIL import Image
from torch import Tensor

from fedutils import build_resnet34
from fedutils.base.device import count_cores, keep_freed_memory
from fedutils.films.phantom.cases import FINDINGS
from fedutils.model import ChestResNet

CORES = count_cores()


def decode(path: str, size: int) -> np.ndarray:
    """Open, decode and resize one film; uint8 (size, size)."""
    with Image.open(path) as film:
        return np.asarray(film.convert("L").resize((size, size), Image.Resampling.BILINEAR))


def main(films: str, weights: str, size: int, batch: int, rounds: int, epochs: int) -> None:
    """Decode, run the trunk, train; the seconds of each part."""
    keep_freed_memory()  # as we do
    table, laps = pd.read_csv(films), workload.Laps()
    with multiprocessing.Pool(CORES) as pool:
        pixels = pool.starmap(decode, zip(table["path"], itertools.repeat(size)))
    store = torch.from_numpy(np.stack(pixels))[:, None]
    labels = torch.from_numpy(table[list(FINDINGS)].to_numpy("float32"))
    laps.lap()
    free: queue.SimpleQueue[ChestResNet] = queue.SimpleQueue()
    for _ in range(CORES):
        free.put(build_resnet34(weights, "layer4,fc", "average", outputs=14).place("cpu").train())
    clients = [np.flatnonzero(table["client"] == name) for name in sorted(set(table["client"]))]

    @torch.no_grad()
    def trunk(part: Tensor) -> Tensor:
        """Run the frozen layers once."""
        model = free.get()
        try:
            return model.features(part)
        finally:
            free.put(model)

    def train(number: int) -> float:
        """Train one client's epochs on a replica; return the seconds."""
        model, rng, began = free.get(), np.random.default_rng(number), time.perf_counter()
        orders = (rng.permutation(clients[number]) for _ in range(epochs))
        parts = (
            part for order in orders for part in np.split(order, range(batch, len(order), batch))
        )
        workload.train_alone(model, ((features[part], labels[part]) for part in parts))
        free.put(model)
        return time.perf_counter() - began

    with ThreadPoolExecutor(CORES, "bound", torch.set_num_threads, (1,)) as pool:
        features = torch.cat(list(pool.map(trunk, store.split(batch))))
        laps.lap()
        took = [sum(pool.map(train, range(len(clients)))) / CORES for _ in range(rounds)]
    workload.report(seconds=sum(laps.seconds) + sum(took), parts=laps.seconds, rounds=took)


if __name__ == "__main__":
    main(**workload.arguments())
