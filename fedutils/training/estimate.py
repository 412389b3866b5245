"""How long the rounds will take, from a few batches on this very device."""

import shutil
import time
from collections.abc import Sequence

import numpy as np

from ..base.state import State, state_hash, to_cpu
from ..client import predict
from ..fedavg import FedAvg
from ..rounds import Job, Progress
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
    model = models.replicas(left[0][0]).models[0]
    sent = strategy(settings, set()).download(to_cpu(model.tracked_state()), {})
    films = largest.films.holding(features.stand_in()) if features else largest.films
    sizes, took = [], []
    for batches in (2, 2, 6):  # the first warms up
        some = films.where(np.arange(len(films)) < batches * settings.batch_size)
        sizes.append(len(some) * settings.local_epochs)
        trial = type(largest)("trial", some, settings, 0, strategy)
        took.append(trial.fit(model, sent, {}, 1)[0].seconds)
    more = sizes[2] - sizes[1]
    film = (took[2] - took[1]) / more if more and took[2] > took[1] else took[2] / sizes[2]
    fixed = max(0.0, took[2] - film * sizes[2])
    began = time.perf_counter()
    predict(model, some)
    judge = (time.perf_counter() - began) / len(some)
    boundary = _boundary_seconds(models, sent)
    for job, rounds in left:
        share = job.settings.client_fraction / min(len(job.clients), len(models.models))
        seen = sum(len(client.films) for client in job.clients) * job.settings.local_epochs
        train = share * (film * seen + fixed * len(job.clients))
        ahead += rounds * (train + judge * len(job.validation) + boundary)
    return ahead


def _boundary_seconds(models: Models, state: State) -> float:
    """Time what each round does beside training: hash the state, and save it."""
    began, folder = time.perf_counter(), models.settings.run / "checkpoint" / "trial"
    save_progress(folder, Progress(state, rows=[{"state_sha256": state_hash(state)}]), "trial")
    shutil.rmtree(folder)
    return time.perf_counter() - began
