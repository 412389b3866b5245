"""How long the rounds will take, from a few batches on this very device."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

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
    """Estimate the time for jobs and the number of rounds that each has left."""
    settings = models.settings
    largest = max((c for job, _ in left for c in job.clients), key=lambda c: len(c.films))
    some = np.arange(len(largest.films)) < 3 * settings.batch_size
    films, ahead = largest.films.where(some), 0.0
    if features:
        films, ahead = films.holding(features.stand_in()), features.seconds_left()
    trial = type(largest)("trial", films, settings, 0, strategy)
    model = models.replicas(left[0][0]).models[0]
    sent = strategy(settings, set()).download(to_cpu(model.tracked_state()), {})
    train = [trial.fit(model, sent, {}, round)[0].seconds for round in (1, 2)][-1]
    began = time.perf_counter()
    predict(model, trial.films)
    each = np.array([train, time.perf_counter() - began, 0.0]) / len(trial.films)
    each[2] = _boundary_seconds(settings.run / "checkpoint" / "trial", sent)
    rounds = sum(float(each @ _films_of_a_round(job, len(models.models))) * n for job, n in left)
    return ahead + rounds if rounds else 0.0


def _films_of_a_round(job: Job, replicas: int) -> np.ndarray:
    """Count films to be trained on one after the other, to be validated on, and boundaries."""
    side_by_side = min(len(job.clients), replicas)
    films = sum(len(client.films) for client in job.clients) * job.settings.client_fraction
    train = films * job.settings.local_epochs / side_by_side
    return np.array([train, len(job.validation), 1.0])


def _boundary_seconds(folder: Path, state: State) -> float:
    """Time what each round does beside training: hash the state, and save it."""
    began = time.perf_counter()
    save_progress(folder, Progress(state, rows=[{"state_sha256": state_hash(state)}]), "trial")
    shutil.rmtree(folder)
    return time.perf_counter() - began
