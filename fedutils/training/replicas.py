"""Replicas: one model a device; clients train side by side."""

import dataclasses
import math
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ..base.device import find_devices
from ..base.errors import in_a_line
from ..base.parameters import Parameters, parameter
from ..base.scores import log_loss, mean_auroc
from ..base.state import State, find_fault, to_cpu
from ..client import Client, Update
from ..films.phantom.write import draw_batch
from ..model import ChestResNet, build_resnet34
from ..rounds import Job, Progress, predict_with
from ..run import TRUNK, model_file, read_model, write_model
from .batchnorm import measure_safely

Result = TypeVar("Result")


@dataclass(frozen=True)
class ReplicaParameters(Parameters):
    """What a run computes on, and for how long."""

    device: str = parameter(
        "auto", "auto, cpu, cuda:0 or several such as cuda:0,cuda:1", identity=False
    )
    threads: int = parameter(
        0, "CPU threads a model replica; 0: the cores divided among the replicas", bounds=(0, 1024)
    )
    max_hours: float = parameter(
        0.0, "stop cleanly at a round boundary before this; 0: never", bounds=(0.0, math.inf),
        identity=False,
    )  # fmt: skip

    def check(self) -> None:
        """Raise InputError for a device that is not there."""
        find_devices(self.device)


def start_model(settings: Parameters, seed: int) -> ChestResNet:
    """Build the model that a run starts from; a random trunk is calibrated on phantom films."""
    built = settings.weights, settings.tracked, settings.batchnorm, seed
    return build_resnet34(
        *built, precision=settings.precision, draw_films=lambda: draw_batch(32, 64)
    )


class Models:
    """One model a device, as the jobs of a run start from it; built once for all arms of a seed."""

    def __init__(self, settings: Parameters, threads: int) -> None:
        self.settings, self.threads = settings, threads
        self.seed, self.models = -1, []
        self.start: State = {}

    def replicas(self, job: Job) -> "Replicas":
        """Return the models as a job starts from them."""
        if job.seed != self.seed:
            self.models = self._build(job.seed)
            self.start, self.seed = to_cpu(self.models[0].state_dict()), job.seed
        for model in self.models:
            model.load(self.start)
            model.batchnorm = job.settings.batchnorm
        local = {name: self.start[name] for name in self.models[0].local_names()}
        return Replicas(self.models, self.threads, local)

    def _build(self, seed: int) -> list[ChestResNet]:
        """Build one model a device; all seeds share the first one's trunk."""
        if not model_file(self.settings.run, TRUNK).is_file():
            first = start_model(self.settings, self.settings.seed_list[0])
            state = {k: v for k, v in to_cpu(first.state_dict()).items() if not first.is_tracked(k)}
            write_model(self.settings.run, TRUNK, state)
        devices = find_devices(self.settings.device)
        models = [start_model(self.settings, seed).place(device) for device in devices]
        for model in models:
            model.load(read_model(self.settings.run, TRUNK))
        return models


class Replicas:
    """One model for each device; clients train side by side and come back in the order given."""

    def __init__(self, models: list[ChestResNet], threads: int, start: State | None = None) -> None:
        self.models, self.threads = models, threads
        self.start = start or {}  # local BatchNorm, for clients that have kept none of their own

    def fit(
        self, clients: list[Client], sent: State, kept: dict[str, State], round: int
    ) -> Iterator[tuple[Update, State]]:
        """Train each client from `sent`; yield its update and what it keeps, in the given order."""
        start = self.start | sent
        return self._each(
            clients, lambda c, model: fit_safely(c, model, start, kept.get(c.name, {}), round)
        )

    def measure(
        self, clients: list[Client], state: State, round: int
    ) -> Iterator[tuple[State, str]]:
        """Let each client measure BatchNorm under a state; yield that, or why not, in order."""
        return self._each(clients, lambda c, model: measure_safely(c, model, state, round))

    def _each(self, clients: list[Client], task: Callable[..., Result]) -> Iterator[Result]:
        """Call task(client, model) on whichever replica is free; yield in the given order."""
        free: queue.SimpleQueue[ChestResNet] = queue.SimpleQueue()
        for model in self.models:
            free.put(model)

        def work(client: Client) -> Result:
            """Borrow a replica."""
            model = free.get()
            try:
                return task(client, model)
            finally:
                free.put(model)

        if len(self.models) == 1:
            yield from map(work, clients)  # lazily: one update in memory at a time
            return
        start = torch.set_num_threads, (self.threads,)  # it counts for the calling thread alone
        with ThreadPoolExecutor(len(self.models), "replica", *start) as pool:
            yield from pool.map(work, clients)

    def validate(self, job: Job, now: Progress) -> tuple[float, float]:
        """Return loss and mean AUROC of the aggregated model on the job's validation films."""
        labels = job.validation.labels
        logits = predict_with(self.models[0], job.validation, now.state, now.clients)
        if not np.isfinite(logits).all():  # a model that is broken is no better than none
            return math.nan, math.nan
        return log_loss(labels, logits), mean_auroc(labels, logits)


def fit_safely(
    client: Client, model: ChestResNet, sent: State, kept: State, round: int
) -> tuple[Update, State]:
    """Train a client; whatever goes wrong there costs its update, with a reason, not the round."""
    try:
        update, keep = client.fit(model, sent, kept, round)
        if update.status != "ok":
            return update, kept
    except Exception as error:  # any fault of a client is named in the history
        return Update(client.name, 0, status="failed", reason=in_a_line(error)), kept
    status, reason = find_fault(update.state)
    limit = client.settings.client_seconds
    if not (status or client.withholds_loss or math.isfinite(update.train_loss)):
        status, reason = "non-finite", "training loss is not finite"
    if not status and limit and update.seconds > limit:
        status, reason = "late", f"took {update.seconds:.1f} s, client_seconds is {limit:g}"
    if not status:
        return update, keep
    # The server has seen an update that it leaves out: what it cost is spent.
    spent = {name: value for name, value in keep.items() if name in client.spent}
    return dataclasses.replace(update, status=status, reason=reason), kept | spent
