"""A client's training step, and reading its batches from the store, against the kernels alone."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import workload
from torch.utils.flop_counter import FlopCounterMode

from fedutils import Client, FedAvg
from fedutils.base.device import keep_freed_memory


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(work: str, pairs: int) -> None:
    """Let a client train two epochs, then the kernels alone on the same batches in memory.

    One replica of one thread, as on the CPU; what reading costs is a share of the kernels' time.
    """
    torch.set_num_threads(1)
    keep_freed_memory()  # as a run does
    everything = workload.films(Path(work))
    films = everything.where(everything.index["client"] == everything.index["client"].min())
    films = films.where(films.index["split"] == "train")
    settings = workload.settings(Path(work), threads=1, local_epochs=2)
    client = Client("client", films, settings, 0, FedAvg)
    model, bare = (workload.random_network("frozen").place("cpu") for _ in range(2))
    sent = {name: value.clone() for name, value in model.tracked_state().items()}
    pixels, truth = films.batch(np.arange(len(films)))

    def kernels(round: int) -> None:
        """Compute what the client's epochs ask of the processor, and nothing else."""
        batches = ((pixels[chosen], truth[chosen]) for chosen in client._batches(round))
        workload.train_alone(bare, batches)

    def read(round: int) -> None:
        """Read all batches of the epochs."""
        for positions in client._batches(round):
            films.batch(positions)

    with FlopCounterMode(display=False) as counted:
        kernels(0)  # which warms up
    client.fit(model, sent, {}, 0)
    steps = [lambda number: client.fit(model, sent, {}, number), kernels, read]
    laps = np.zeros((pairs, len(steps)))
    for number in range(pairs):
        for column in sorted(range(len(steps)), reverse=number % 2 == 1):
            laps[number, column] = seconds(functools.partial(steps[column], number + 1))
    ours, alone, reading = laps.T
    rate = counted.get_total_flops() / alone / 1e9
    about = {"steps": alone / ours, "reading": reading / alone, "rate": rate}
    workload.report(**{name: values.tolist() for name, values in about.items()})


if __name__ == "__main__":
    main(**workload.arguments())
