"""How long the rounds will take, from a few batches on this very device."""

import dataclasses
import shutil
import time
from collections.abc import Sequence

import numpy as np

from ..base.state import State, state_hash
from ..client import predict
from ..dataset import ChestXrayDataset
from ..fedavg import FedAvg
from ..model import ChestResNet
from ..rounds import Job, Progress
from .batchnorm import MEASURED_FILMS
from .checkpoint import save_progress
from .features import FeatureStore
from .replicas import Models


def estimate_seconds(
    left: Sequence[tuple[Job, int]],
    models: Models,
    strategy: type[FedAvg],
    features: FeatureStore | None,
) -> float:
    """Estimate the time for jobs and the number of rounds that each has left.

    A client's round costs something for each film and something fixed, such as to load the state:
    on a GPU that is more than a few batches take, so few and more films are timed.
    """
    if not any(rounds for _, rounds in left):
        return 0.0
    settings, ahead = models.settings, features.seconds_left() if features else 0.0
    largest = max((c for job, _ in left for c in job.clients), key=lambda client: client.weight)
    sent = strategy(settings, set()).download(models.start(left[0][0].seed), {})
    films = largest.films.holding(features.stand_in()) if features else largest.films
    shared, count = models.shared, len(models.devices)
    once = dataclasses.replace(settings, local_steps=0)  # a trial goes through its films
    sizes, took = [], []

    def trial(some: ChestXrayDataset, model: ChestResNet) -> float:
        """Time a client's round on some films."""
        client = type(largest)("trial", some, once, 0, strategy)
        return client.fit(model, sent, {}, 1)[0].seconds

    few, more = (1, 3) if models.devices[0].type == "cpu" else (2, 6)
    for batches in (few, few, more):  # the first warms up; all replicas work, as they will
        some = films.where(np.arange(len(films)) < batches * settings.batch_size)
        sizes.append(len(some) * settings.local_epochs)
        took.append(float(np.mean(list(shared.each(trial, [some] * count)))))
    apart = sizes[2] - sizes[1]
    film = (took[2] - took[1]) / apart if apart and took[2] > took[1] else took[2] / sizes[2]
    fixed = max(0.0, took[2] - film * sizes[2])
    began = time.perf_counter()
    list(shared.each(lambda films, model: predict(model, films), [some] * count))
    judge = (time.perf_counter() - began) / len(some) / count
    boundary, whole, longest = _boundary_seconds(models, sent), 0.0, 0.0
    for job, rounds in left:
        share, passes = job.settings.client_fraction, job.settings.passes
        most = MEASURED_FILMS if job.settings.batchnorm == "precise" else 0
        sizes = [len(client.films) for client in job.clients]
        costs = [fixed + film * passes(n) * n + judge * count * min(most, n) for n in sizes]
        beside = judge * len(job.validation) + boundary
        longest = max(longest, rounds * (share * _side_by_side(costs, count) + beside))
        whole += rounds * (share * sum(costs) / count + beside)
    return ahead + max(longest, whole)


def _side_by_side(costs: Sequence[float], count: int) -> float:
    """Return when the last client is done, if each takes the replica that is free first."""
    ends = [0.0] * count
    for cost in costs:
        ends[ends.index(min(ends))] += cost
    return max(ends)


def _boundary_seconds(models: Models, state: State) -> float:
    """Time what each round does beside training: hash the state, and save it."""
    began, folder = time.perf_counter(), models.settings.run / "checkpoint" / "trial"
    save_progress(folder, Progress(state, rows=[{"state_sha256": state_hash(state)}]), "trial")
    shutil.rmtree(folder)
    return time.perf_counter() - began
