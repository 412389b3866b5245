"""Reading a batch from the store, against the training step that follows it."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import workload


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(work: str, steps: int) -> None:
    """Read random batches and train on each; report the shares of the step."""
    films, rng = workload.films(Path(work)), np.random.default_rng(0)
    model, batch = workload.build(), []
    model.train()
    optimizer = workload.optimizer(model)

    def read() -> None:
        """Read one batch of random films."""
        batch[:] = films.batch(rng.choice(len(films), workload.BATCH, replace=False))

    def step() -> None:
        """Train on it."""
        optimizer.zero_grad()
        workload.loss(model, *batch).backward()
        optimizer.step()

    pairs = [(seconds(read), seconds(step)) for _ in range(steps + 1)][1:]
    workload.report(shares=[reading / training for reading, training in pairs])


if __name__ == "__main__":
    main(**workload.arguments())
