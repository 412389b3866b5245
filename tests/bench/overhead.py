"""Federation against a bare loop on the same batches, turn by turn in one process; itemised.

After each round of the federation, from sending the state to its history, the bare loop trains on the
batches of that round, with as many models side by side, and validates the same films: it does nothing
but what arithmetic asks for, and is the limit of a round. A checkpoint is written
while the next round trains: here it begins after the bare loop's turn, so that the federation's next
round meets it, as in use, and the bare loop never does. With two local epochs a client trains on 384
films a round; one of the demo on 360, one of five with all of NIH's on 17,000.
"""

import itertools
import queue
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workload

from fedutils import ChestXrayDataset, Client, FedAvg, Training, rounds
from fedutils.base.scores import judge, validation_sums
from fedutils.client import predict
from fedutils.fedavg import WeightedMean
from fedutils.model import ChestResNet
from fedutils.training import checkpoint
from fedutils.training.checkpoint import Writer
from fedutils.training.replicas import Models

ITEMS = [
    (WeightedMean, "add", "aggregation"),
    (WeightedMean, "result", "aggregation"),
    (FedAvg, "step", "aggregation"),
    (rounds, "state_hash", "hash of the state"),
    (Writer, "wait", "waiting for the checkpoint"),
    (Training, "_write_tables", "history, beside the next round"),
    (checkpoint, "save_progress", "checkpoint, beside the next round"),
    (Training, "_write_models", "best model, beside the next round"),
]


class Deferred(Writer):
    """Begins to write when it is told that the bare loop's turn is over."""

    held: Callable[[], None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Wait as the writer does, and hold back what comes."""
        self.wait()
        self.held = write

    def release(self) -> None:
        """Begin to write."""
        if self.held:
            super().start(self.held)
        self.held = None


def bare_loop(training: Training) -> Callable[[int], None]:
    """Return the function that trains on a round's batches, and validates: what no code can spare.

    As many models as the run has replicas, each with as many threads, train side by side; a client's
    batches lie in memory, as films or as what the trunk made of them.
    """
    job, threads = training.jobs[0], training.config["threads"]
    films = {c.name: c.films.batch(np.arange(len(c.films))) for c in job.clients}
    models: queue.SimpleQueue[ChestResNet] = queue.SimpleQueue()
    count = len(training.models.devices)
    for _ in range(count):
        model = workload.random_network("frozen").place("cpu")
        model.precision = training.settings.precision
        models.put(model)

    def train_client(client: Client, round: int) -> None:
        """Train a model that is free on what a client trains on in that round."""
        model, (pixels, truth) = models.get(), films[client.name]
        batches = ((pixels[chosen], truth[chosen]) for chosen in client._batches(round))
        workload.train_alone(model, batches)
        models.put(model)

    def look(part: ChestXrayDataset) -> np.ndarray:
        """Predict a part of the validation films."""
        model = models.get()
        logits = predict(model, part)
        models.put(model)
        return logits

    def train(round: int) -> None:
        """Train and validate."""
        with ThreadPoolExecutor(count, "bare", torch.set_num_threads, (threads,)) as pool:
            list(pool.map(train_client, job.clients, itertools.repeat(round)))
            logits = np.concatenate(list(pool.map(look, job.validation.parts(count))))
        judge([validation_sums(job.validation.labels, logits)])

    return train


def main(work: str, pairs: int, **changes: Any) -> None:
    """Measure so many pairs after one round of warming up; seconds of each, and the items' share.

    `changes` are parameters of the federation's run.
    """
    settings = workload.settings(Path(work), rounds=pairs + 1, **changes)
    shutil.rmtree(settings.run, ignore_errors=True)
    films, began = workload.films(Path(work)), time.perf_counter()
    watch = workload.Watch()
    watch.on(Models, "replicas", "start")
    for item in ITEMS:
        watch.on(*item)
    training = Training(settings, films)
    training.writer = Deferred()
    startup = time.perf_counter() - began
    laps, federated, plain, bare = workload.Laps(), [], [], []

    def turn(*_: object) -> None:
        """End a round of the federation, and let the bare loop have its turn."""
        laps.lap()
        federated.append(laps.seconds[-1])
        if len(federated) == 1:
            watch.seconds = {"start": watch.seconds["start"]}
            bare.append(bare_loop(training))  # features, if any, are there by now
            laps.lap()
        bare[0](len(federated))
        laps.lap()
        plain.append(laps.seconds[-1])
        training.writer.release()
        laps.lap()

    training.train(turn)
    startup += watch.seconds.pop("start")
    share = {label: s / sum(federated[1:]) for label, s in watch.seconds.items()}
    workload.report(federated=federated[1:], bare=plain[1:], startup=startup, share=share)


if __name__ == "__main__":
    main(**workload.arguments())
