"""Federation against a bare loop on the same batches, turn by turn in one process; itemised.

After each round of the federation, from sending the state to its history, the bare loop trains one
model of its own on the batches of that round and validates the same films. A checkpoint is written
while the next round trains: here it begins after the bare loop's turn, so that the federation's next
round meets it, as in use, and the bare loop never does. Two local epochs make it 384 films a client and
round; a client of the demo has 482, one of five with all of NIH's has 17,000.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import workload
from torch import Tensor

from fedutils import FedAvg, Training, rounds
from fedutils.base.scores import log_loss, mean_auroc
from fedutils.client import predict
from fedutils.fedavg import WeightedMean
from fedutils.training import training as boundary
from fedutils.training.checkpoint import Writer
from fedutils.training.replicas import Models

ITEMS = [
    (WeightedMean, "add", "aggregation"),
    (WeightedMean, "result", "aggregation"),
    (FedAvg, "step", "aggregation"),
    (rounds, "state_hash", "hash of the state"),
    (Writer, "wait", "waiting for the checkpoint"),
    (Training, "_history_with", "history"),
    (boundary, "save_progress", "checkpoint, beside the next round"),
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
    """Return the function that trains one model on a round's batches, and validates it."""
    job = training.jobs[0]
    films = [client.films.batch(np.arange(len(client.films))) for client in job.clients]
    model = workload.build()

    def batches(round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the federation's clients train on in that round, in their order."""
        for client, (pixels, truth) in zip(job.clients, films, strict=True):
            for positions in client._batches(round):
                yield pixels[positions], truth[positions]

    def train(round: int) -> None:
        """Train and validate."""
        model.train()
        optimizer = workload.optimizer(model)
        for pixels, truth in batches(round):
            loss = workload.loss(model, pixels, truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logits = predict(model, job.validation)
        log_loss(job.validation.labels, logits)
        mean_auroc(job.validation.labels, logits)

    return train


def main(work: str, pairs: int, **changes: Any) -> None:
    """Measure so many pairs after one round of warming up; seconds of each, and the items' share.

    `changes` are parameters of the federation's run. The bare loop has all threads in any case.
    """
    settings = workload.settings(Path(work), rounds=pairs + 1, local_epochs=2, **changes)
    shutil.rmtree(settings.run, ignore_errors=True)
    films, began = workload.films(Path(work)), time.perf_counter()
    watch = workload.Watch()
    watch.on(Models, "replicas", "start")
    for item in ITEMS:
        watch.on(*item)
    training = Training(settings, films)
    training.writer = Deferred()
    startup = time.perf_counter() - began
    bare = bare_loop(training)
    laps, federated, plain = workload.Laps(), [], []

    def turn(*_: object) -> None:
        """End a round of the federation, and let the bare loop have its turn."""
        laps.lap()
        federated.append(laps.seconds[-1])
        if len(federated) == 1:
            watch.seconds = {"start": watch.seconds["start"]}
        bare(len(federated))
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
