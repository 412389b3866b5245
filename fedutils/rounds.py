"""Job, Progress, one round as on paper."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from .base.errors import SumFailed
from .base.fixed import ONE, Pool
from .base.parameters import Parameters, parameter
from .base.rng import generator
from .base.state import LOSS, State, cast_like, count_bytes, state_hash
from .client import Client, Update, predict
from .dataset import ChestXrayDataset
from .fedavg import FedAvg, WeightedMean
from .model import ChestResNet
from .run import Model

UNMEASURED = "unmeasured"  # the update counted, but its client's BatchNorm did not
Row = dict[str, Any]


@dataclass(frozen=True)
class RoundParameters(Parameters):
    """How many rounds, and who takes part in one."""

    rounds: int = parameter(
        0, "of federation (where target_epsilon sets the noise, a change is another run)",
        bounds=(1, 10_000), identity=False, profiles=(4, 15),
    )  # fmt: skip
    client_fraction: float = parameter(1.0, "share of clients in a round", bounds=(1e-6, 1.0))
    min_clients: int = parameter(
        1, "fewer answers stop it (with client_fraction below 1 a change is another run)",
        bounds=(1, 100_000), identity=False,
    )  # fmt: skip
    client_seconds: float = parameter(
        0.0, "a client that takes longer is left out of the round; 0: never", bounds=(0.0, math.inf)
    )


@dataclass(frozen=True)
class Job:
    """One model to train: an arm, a seed, and in the arm `local` the client that owns the model."""

    arm: str
    seed: int
    clients: list[Client]
    validation: ChestXrayDataset
    owner: str = ""

    @property
    def settings(self) -> Parameters:
        """The settings of the job's arm."""
        return self.clients[0].settings

    @property
    def model(self) -> Model:
        """The model that comes of it, with its name in files."""
        return Model(self.arm, self.seed, self.owner)

    @property
    def name(self) -> str:
        """The model's name in files, such as federated-s0 or local-s0-client-1."""
        return self.model.name


class FederationError(RuntimeError):
    """Fewer than `min_clients` answered; all is saved up to the last round boundary."""

    def __init__(self, job: Job, rows: list[Row], why: object = "too few clients answered") -> None:
        self.rows = rows
        faults = [f"{r['client']} {r['status']} ({r['reason']})" for r in rows if r["reason"]]
        super().__init__(f"{job.name}, round {rows[0]['round']}: {why}: {'; '.join(faults)}")


@dataclass
class Progress:
    """What training carries from round to round: tensors, and the history so far."""

    state: State
    server: State = field(default_factory=dict)
    clients: dict[str, State] = field(default_factory=dict)
    round: int = 0
    best: list[float] = field(default_factory=lambda: [-math.inf, -math.inf])
    best_round: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


class Executor(Protocol):
    """Where clients train: replicas on this machine's devices, or hospitals behind a network."""

    def pool(self, job: Job, strategy: FedAvg) -> Pool:
        """Return what puts together what `fit` or `measure` will yield next."""

    def fit(
        self, clients: list[Client], sent: State, kept: dict[str, State], round: int
    ) -> Iterator[tuple[Update, State]]:
        """Train each client from `sent`; yield its update and what it keeps, in the given order."""

    def measure(
        self, clients: list[Client], state: State, round: int
    ) -> Iterator[tuple[State, str]]:
        """Let each client measure BatchNorm under a state; yield that, or why not, in order."""

    def validate(self, job: Job, now: Progress) -> tuple[float, float]:
        """Return loss and mean AUROC of the aggregated model on the job's validation films."""


def sample_clients(job: Job, settings: Parameters, round: int) -> list[Client]:
    """Draw the round's clients: a share of them, at least `min_clients`, in the order of names."""
    share = math.floor(settings.client_fraction * len(job.clients) + 0.5)
    count = min(max(share, settings.min_clients), len(job.clients))
    chosen = generator(job.seed, "sample", round).choice(len(job.clients), count, replace=False)
    return [job.clients[i] for i in sorted(chosen)]


def run_round(job: Job, now: Progress, executor: Executor, strategy: FedAvg) -> list[Row]:
    """Move `now` to the next round boundary, as on paper; return its rows: of clients, then of all.

    Send the state; each drawn client trains on its own films; average what comes back, in any
    order; take the strategy's step. Raises FederationError below `min_clients`.
    """
    sent = strategy.download(now.state, now.server)
    chosen = sample_clients(job, strategy.settings, now.round + 1)
    pool, rows = executor.pool(job, strategy), []
    for update, kept in executor.fit(chosen, sent, now.clients, now.round + 1):
        rows.append(client_row(job, now.round + 1, update, sent))
        if update.status == "ok":
            pool.add(update.client, update.state | update.loss)
        if kept:
            now.clients[update.client] = kept
    wanted = min(strategy.settings.min_clients, len(job.clients))
    if pool.sums.count < max(wanted, strategy.settings.least_clients):
        raise FederationError(job, rows)
    try:
        mean, share, films = pool.result(now.state)
    except SumFailed as error:
        raise FederationError(job, rows, error) from error
    loss = mean.pop(LOSS, torch.tensor(math.nan)).item()
    moved, now.server = strategy.step(now.state, mean, now.server, share)
    now.state = now.state | moved  # what no client sends stays as it is
    now.round += 1
    return [*rows, {"train_loss": loss, "examples": films}]


def client_row(job: Job, round: int, update: Update, sent: State) -> Row:
    """Return the history's row of one client's update; only the federated arm sends anything."""
    row = {"arm": job.arm, "seed": job.seed, "round": round} | vars(update)
    state, travels = row.pop("state"), job.arm == "federated"
    sizes = {"bytes_up": count_bytes(state) * travels, "bytes_down": count_bytes(sent) * travels}
    return row | sizes


def aggregate_row(job: Job, now: Progress, rows: list[Row], whole: Row, executor: Executor) -> Row:
    """Return the row of the aggregated model: its own validation, and sums over the clients."""
    loss, auroc = executor.validate(job, now)
    about = {"arm": job.arm, "seed": job.seed, "round": now.round, "client": job.owner} | whole
    return about | {
        "val_loss": loss,
        "val_auroc": auroc,
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "status": "ok",
        "reason": "",
        "epsilon": max([row["epsilon"] for row in budget(job, now)], default=math.nan),
        "state_sha256": state_hash(now.state),
    }


def budget(job: Job, now: Progress) -> list[Row]:
    """Return what each hospital of a model has spent; empty without differential privacy.

    Hospitals share no patient, so the model has spent what its worst hospital has.
    """
    about = {"arm": job.arm, "seed": job.seed, "client": job.owner}
    said = [client.account(now.clients.get(client.name, {})) for client in job.clients]
    return [about | row for row in said if row]


def over_budget(job: Job, now: Progress, settings: RoundParameters) -> str:
    """Say which client's budget the next round would exceed; empty where it may begin."""
    drawn = sample_clients(job, settings, now.round + 1)
    reasons = (client.over_budget(now.clients.get(client.name, {})) for client in drawn)
    return next(filter(None, reasons), "")


def predict_with(
    model: ChestResNet, films: ChestXrayDataset, state: State, clients: dict[str, State]
) -> np.ndarray:
    """Return logits (N, k) under a global state; local BatchNorm judges its own client's films."""
    model.load(state)
    local = model.local_names()
    if not local:
        return predict(model, films)
    logits = np.empty((len(films), model.fc.out_features), np.float32)
    for name in films.index["client"].unique():
        mask = (films.index["client"] == name).to_numpy()
        model.load(local_state({name: clients[name]} if name in clients else clients, local))
        logits[mask] = predict(model, films.where(mask))
    return logits


def local_state(clients: dict[str, State], names: set[str]) -> State:
    """Average what clients keep under these names: one's own, or all's for unknown patients."""
    mean = WeightedMean()
    for kept in clients.values():
        mean.add({k: v for k, v in kept.items() if k in names}, ONE // len(clients))
    return cast_like(mean.result(), next(iter(clients.values()))) if mean.count else {}
