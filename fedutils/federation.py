"""The round loop, the three arms and the history: federated, centralised and local training.

Centralised is one client that holds everything, local is each client alone: the same loop and the
same budget for all. A model depends on its arm's settings alone, so runs that differ in others
share it, such as the centralised arm of several partitions.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import queue
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from .batchnorm import PooledBatchNorm, measure_batchnorm
from .checkpoint import Progress, Writer, last_identity, load_progress, run_lock, save_progress
from .client import Client, Update, predict
from .device import find_devices, set_up
from .features import FeatureStore
from .fedavg import STRATEGIES, FedAvg, WeightedMean, cast_like
from .findings import InputError
from .images import ChestXrayDataset, read_report, write_atomic
from .metrics import log_loss, mean_auroc
from .model import ChestResNet, build_resnet34
from .privacy import STEPS, PrivateClient
from .rng import generator
from .settings import Settings
from .weights import State, state_hash, to_cpu

HISTORY = [
    "arm", "seed", "round", "client", "train_loss", "val_loss", "val_auroc", "examples", "bytes_up",
    "bytes_down", "seconds", "status", "reason", "epsilon", "state_sha256",
]  # fmt: skip
# What means nothing to a client that trains alone, and to one that holds everything.
FEDERATED_ONLY = (
    "strategy", "mu", "server_momentum", "aggregation", "trim", "client_fraction", "min_clients",
    "client_seconds",
)  # fmt: skip
PARTITIONED = ("partition", "num_clients", "alpha")
UNMEASURED = "unmeasured"  # the update counted, but its client's BatchNorm did not
Row = dict[str, Any]
Result = TypeVar("Result")
OnRound = Callable[[Row, pd.DataFrame], None]
OnFeatures = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """One model to train: an arm, a seed, and in the arm `local` the client that owns the model."""

    arm: str
    seed: int
    clients: list[Client]
    validation: ChestXrayDataset
    owner: str = ""

    @property
    def settings(self) -> Settings:
        """The settings of the job's arm."""
        return self.clients[0].settings

    @property
    def name(self) -> str:
        """The job's name in files, such as federated-s0 or local-s0-client-1."""
        return "-".join(filter(None, [self.arm, f"s{self.seed}", self.owner]))


class FederationError(RuntimeError):
    """Fewer than `min_clients` answered; all is saved up to the last round boundary."""

    def __init__(self, job: Job, rows: list[Row]) -> None:
        self.rows = rows
        faults = [f"{r['client']} {r['status']} ({r['reason']})" for r in rows if r["reason"]]
        where = f"{job.name}, round {rows[0]['round']}"
        super().__init__(f"{where}: too few clients answered: {'; '.join(faults)}")


def arm_settings(settings: Settings, arm: str) -> Settings:
    """Return the settings of one arm, with the defaults for all that means nothing to it.

    Who trains alone federates nothing, and keeps its BatchNorm to itself by any policy; the
    centralised arm knows no clients. Each arm has its learning rate.
    """
    alone = {"server_lr": 1.0} | {name: getattr(Settings, name) for name in FEDERATED_ONLY}
    alone |= {"batchnorm": "average"} if settings.batchnorm == "local" else {}
    changes: dict[str, dict[str, Any]] = {
        "federated": {},
        "local": alone | {"lr": settings.lr_local or settings.lr},
        "centralised": alone
        | {"lr": settings.lr_centralised or settings.lr}
        | {name: getattr(Settings, name) for name in PARTITIONED},
    }
    return dataclasses.replace(settings, lr_centralised=0.0, lr_local=0.0, **changes[arm])


def plan(settings: Settings, films: ChestXrayDataset) -> list[Job]:
    """List the models to train, from films whose index has the columns `client` and `split`."""
    train, val = (films.where(films.index["split"] == split) for split in ("train", "val"))
    names = sorted(films.index["client"].unique())
    parts = {name: train.where(train.index["client"] == name) for name in names}
    own = {name: val.where(val.index["client"] == name) for name in names}
    jobs, kind = [], PrivateClient if settings.dp == "patient" else Client
    for seed, arm in itertools.product(settings.seed_list, settings.arm_list):
        how = arm_settings(settings, arm), seed
        if arm == "centralised":
            jobs.append(Job(arm, seed, [kind("all", train, *how)], val))
            continue
        hospitals = [kind(name, part, *how) for name, part in parts.items()]
        if arm == "federated":
            jobs.append(Job(arm, seed, hospitals, val))
        else:
            jobs += [
                Job(arm, seed, [client], own[client.name], client.name) for client in hospitals
            ]
    return jobs


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
        return log_loss(labels, logits), mean_auroc(labels, logits)


def fit_safely(
    client: Client, model: ChestResNet, sent: State, kept: State, round: int
) -> tuple[Update, State]:
    """Train a client; whatever goes wrong there costs its update, with a reason, not the round."""
    try:
        update, keep = client.fit(model, sent, kept, round)
    except Exception as error:  # any fault of a client is named in the history
        return Update(client.name, 0, status="failed", reason=in_a_line(error)), kept
    bad = non_finite(update.state)
    limit = client.settings.client_seconds
    withheld = isinstance(client, PrivateClient)
    if bad or not (withheld or math.isfinite(update.train_loss)):
        status, reason = "non-finite", f"{(bad or ['training loss'])[0]} is not finite"
    elif limit and update.seconds > limit:
        status, reason = "late", f"took {update.seconds:.1f} s, client_seconds is {limit:g}"
    else:
        return update, keep
    # The server has seen an update that it leaves out: what it cost is spent.
    spent = {name: value for name, value in keep.items() if name == STEPS}
    return dataclasses.replace(update, status=status, reason=reason), kept | spent


def measure_safely(
    client: Client, model: ChestResNet, state: State, round: int
) -> tuple[State, str]:
    """Measure a client's BatchNorm; return it, or nothing and the reason."""
    try:
        measured = measure_batchnorm(client, model, state, round)
    except Exception as error:  # named in the history, as a fault in training is
        return {}, in_a_line(error)
    bad = non_finite(measured)
    return ({}, f"{bad[0]} is not finite") if bad else (measured, "")


def in_a_line(error: Exception) -> str:
    """Write an error as the history has it."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def non_finite(state: State) -> list[str]:
    """Name the tensors that hold NaN or infinity."""
    # A sum is quicker than a look at each value; it may also overflow, so that decides.
    suspects = [name for name, value in state.items() if not math.isfinite(value.sum())]
    return [name for name in suspects if not state[name].isfinite().all()]


def sample_clients(job: Job, settings: Settings, round: int) -> list[Client]:
    """Draw the round's clients: a share of them, at least `min_clients`, in the order of names."""
    share = math.floor(settings.client_fraction * len(job.clients) + 0.5)
    count = min(max(share, settings.min_clients), len(job.clients))
    chosen = generator(job.seed, "sample", round).choice(len(job.clients), count, replace=False)
    return [job.clients[i] for i in sorted(chosen)]


def run_round(job: Job, now: Progress, replicas: Replicas, strategy: FedAvg) -> list[Row]:
    """Move `now` to the next round boundary, as on paper; return the clients' rows of the history.

    Send the state; each drawn client trains on its own films; average what comes back, in the order
    of the clients; take the strategy's step. Raises FederationError below `min_clients`.
    """
    sent = strategy.download(now.state, now.server)
    chosen = sample_clients(job, strategy.settings, now.round + 1)
    aggregator, rows = strategy.aggregator(), []
    for update, kept in replicas.fit(chosen, sent, now.clients, now.round + 1):
        rows.append(client_row(job, now.round + 1, update, sent))
        if update.status == "ok":
            aggregator.add(update.state, update.examples)
        if kept:
            now.clients[update.client] = kept
    if aggregator.count < min(strategy.settings.min_clients, len(job.clients)):
        raise FederationError(job, rows)
    share = aggregator.weight / sum(client.weight for client in job.clients)
    moved, now.server = strategy.step(now.state, aggregator.result(), now.server, share)
    now.state = now.state | moved  # what no client sends stays as it is
    now.round += 1
    if strategy.settings.batchnorm == "precise":
        refresh_batchnorm(job, now, replicas, rows)
    return rows


def refresh_batchnorm(job: Job, now: Progress, replicas: Replicas, rows: list[Row]) -> None:
    """Put measured BatchNorm statistics into the new global state; note bytes and faults in `rows`.

    Clients whose update counted take part. Where none can measure, the averages stay.
    """
    counted = {row["client"]: row for row in rows if row["status"] == "ok"}
    clients = [client for client in job.clients if client.name in counted]
    pool, travels = PooledBatchNorm(), job.arm == "federated"
    for client, (measured, fault) in zip(
        clients, replicas.measure(clients, now.state, now.round), strict=True
    ):
        row = counted[client.name]
        row["bytes_up"] += count_bytes(measured) * travels
        row["bytes_down"] += count_bytes(now.state) * travels
        if fault:
            row |= {"status": UNMEASURED, "reason": f"BatchNorm not measured: {fault}"}
        else:
            pool.add(measured, len(client.films))
    now.state = now.state | pool.result(now.state)


def client_row(job: Job, round: int, update: Update, sent: State) -> Row:
    """Return the history's row of one client's update; only the federated arm sends anything."""
    row = {"arm": job.arm, "seed": job.seed, "round": round} | vars(update)
    state, travels = row.pop("state"), job.arm == "federated"
    return row | {
        "bytes_up": count_bytes(state) * travels,
        "bytes_down": count_bytes(sent) * travels,
    }


def count_bytes(state: State) -> int:
    """Return the size of a state's tensors, in bytes."""
    return sum(value.numel() * value.element_size() for value in state.values())


def aggregate_row(job: Job, now: Progress, rows: list[Row], replicas: Replicas) -> Row:
    """Return the row of the aggregated model: its own validation, and sums over the clients."""
    good = pd.DataFrame([row for row in rows if row["status"] in ("ok", UNMEASURED)])
    loss, auroc = replicas.validate(job, now)
    return {
        "arm": job.arm,
        "seed": job.seed,
        "round": now.round,
        "client": job.owner,
        "train_loss": float(np.average(good["train_loss"], weights=good["examples"])),
        "val_loss": loss,
        "val_auroc": auroc,
        "examples": int(good["examples"].sum()),
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
    private = [client for client in job.clients if isinstance(client, PrivateClient)]
    return [about | client.account(now.clients.get(client.name, {})) for client in private]


def over_budget(job: Job, now: Progress, settings: Settings) -> str:
    """Say which client's budget the next round would exceed; empty where it may begin."""
    drawn = sample_clients(job, settings, now.round + 1)
    private = [client for client in drawn if isinstance(client, PrivateClient)]
    reasons = [client.over_budget(now.clients.get(client.name, {})) for client in private]
    return next(filter(None, reasons), "")


def predict_with(
    model: ChestResNet, films: ChestXrayDataset, state: State, clients: dict[str, State]
) -> np.ndarray:
    """Return logits (N, 14) under a global state; local BatchNorm judges its own client's films."""
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
    for _, kept in sorted(clients.items()):
        mean.add({k: v for k, v in kept.items() if k in names}, 1)
    return cast_like(mean.result(), next(iter(clients.values()))) if mean.count else {}


class Training:
    """A run: the models to train, how far each has come, and what a round boundary writes.

    `films.index` carries `client` and `split`. An own strategy is given as a class derived from
    FedAvg. Raises InputError where the run folder holds another run.
    """

    def __init__(
        self, settings: Settings, films: ChestXrayDataset, strategy: type[FedAvg] | None = None
    ) -> None:
        self.settings, self.run, self.films = settings, settings.run, films
        self.writer = Writer()
        self.strategy = strategy or STRATEGIES[settings.strategy]
        self.config = open_run(settings, self.strategy, self._fingerprint())
        # Before a model is built, whose calibration depends on the threads in its last bits.
        set_up(self.config["threads"], settings.precision)
        self.jobs = self._plan(films)
        self.seconds = 0.0  # that train() took in this session
        there = [(job, now) for job in self.jobs if (now := self._load(job))]
        self.rows = {job.name: now.rows for job, now in there}
        self.spent = {job.name: budget(job, now) for job, now in there}
        self._models: list[ChestResNet] = []
        self._start: dict[int, State] = {}
        self.features = None
        if settings.cache_features:
            model = self._replicas(self.jobs[0]).models[0]
            self.features = FeatureStore(model, films, settings, self.config["fingerprint"])
            self.features.check_disk()

    def train(
        self, on_round: OnRound | None = None, on_features: OnFeatures = lambda done, total: None
    ) -> pd.DataFrame:
        """Train every model to its last round, from wherever it stands; return the history.

        `on_round` gets the row of the aggregated model and the history so far; `on_features` the
        number of films whose features are there, and of all. Stops at a round boundary when the
        next round would end after `max_hours`. Raises FederationError when too few clients answer,
        and InputError when another process writes this run, or features would take too long.
        """
        began = time.perf_counter()
        with run_lock(self.run):
            (self.run / "finished.json").unlink(missing_ok=True)
            deadline = time.monotonic() + (self.settings.max_hours or math.inf) * 3600
            if self.features:
                self._compute_features(on_features)
            if all([self._train_job(job, deadline, on_round) for job in self.jobs]):
                self._write_global_model()
                write_atomic(self.run / "finished.json", json.dumps(self.config).encode())
        self.seconds = time.perf_counter() - began
        return self.history()

    def history(self) -> pd.DataFrame:
        """Return the rows of all rounds so far, as `history.csv` has them."""
        rows = [row for job in self.jobs for row in self.rows.get(job.name, [])]
        return pd.DataFrame(rows, columns=HISTORY)

    def estimate_seconds(self) -> float:
        """Estimate the time for the rounds that are left, from a few batches on this device."""
        largest = max((c for job in self.jobs for c in job.clients), key=lambda c: len(c.films))
        some = np.arange(len(largest.films)) < 3 * self.settings.batch_size
        films, ahead = largest.films.where(some), 0.0
        if self.features:
            films, ahead = films.holding(self.features.stand_in()), self.features.seconds_left()
        trial = type(largest)("trial", films, self.settings, seed=0)
        model = self._replicas(self.jobs[0]).models[0]
        sent = self.strategy(self.settings, set()).download(to_cpu(model.tracked_state()), {})
        train = [trial.fit(model, sent, {}, round)[0].seconds for round in (1, 2)][-1]
        began = time.perf_counter()
        predict(model, trial.films)
        each = np.array([train, time.perf_counter() - began, 0.0]) / len(trial.films)
        each[2] = self._boundary_seconds(sent)
        rounds = float(sum(each @ self._films_left(job) for job in self.jobs))
        return ahead + rounds if rounds else 0.0

    def _boundary_seconds(self, state: State) -> float:
        """Time what each round does beside training: hash the state, and save it."""
        began, folder = time.perf_counter(), self.run / "checkpoint" / "trial"
        save_progress(folder, Progress(state, rows=[{"state_sha256": state_hash(state)}]), "trial")
        shutil.rmtree(folder)
        return time.perf_counter() - began

    def _compute_features(self, progress: OnFeatures) -> None:
        """Let the frozen trunk run once, where its output is not there yet, and train from that."""
        hours = self.features.seconds_left() / 3600
        if hours > (self.settings.max_hours or math.inf):
            raise InputError(
                f"max_hours={self.settings.max_hours:g}: features alone take about {hours:.2f} h"
                " here; give more, choose fewer films or cache_features=false"
            )
        self.jobs = self._plan(self.films.holding(self.features.fill(progress)))

    def _films_left(self, job: Job) -> np.ndarray:
        """Count films still to be trained on, to be validated on one device, and rounds."""
        rounds = self.settings.rounds - max([0, *(r["round"] for r in self.rows.get(job.name, []))])
        side_by_side = min(len(job.clients), len(find_devices(self.settings.device)))
        films = sum(len(c.films) for c in job.clients) * self.settings.client_fraction
        train = films * self.settings.local_epochs / side_by_side
        return max(0, rounds) * np.array([train, len(job.validation), 1.0])

    def _plan(self, films: ChestXrayDataset) -> list[Job]:
        return plan(self.settings, films)

    def _fingerprint(self) -> str:
        """Return that of the prepared films; raise InputError where they have another size."""
        prepared, wanted = self.settings.prepared, self.settings.image_size
        report = read_report(prepared)
        if (size := report.get("image_size", wanted)) != wanted:
            raise InputError(
                f"{prepared} holds films of {size} pixels, but image_size is {wanted}: give the"
                " same profile or image_size to notebooks 02 and 03"
            )
        return report["fingerprint"]

    def _identity(self, job: Job) -> str:
        """Return a hash of all that a job's model depends on, and of nothing else."""
        own = {"trunk": self.settings.seed_list[0]} | {
            name: value
            for name, value in job.settings.identity().items()
            if name not in ("data_dir", "arms", "seeds", "lr_centralised", "lr_local")
        }
        server = self.config["server"] if job.arm == "federated" else FedAvg.__name__
        own |= {"server": server} | {k: self.config[k] for k in ("threads", "fingerprint")}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    def _load(self, job: Job) -> Progress | None:
        """Load how far a job has come, here or in a finished run that shares its model."""
        own = load_progress(self.run / "checkpoint" / job.name, self._identity(job))
        return own or self._adopt(job)

    def _adopt(self, job: Job) -> Progress | None:
        """Copy an equal job's model and checkpoint from a finished run beside this one, if any."""
        identity, part = self._identity(job), f"checkpoint/{job.name}"
        for run in (path.parent for path in sorted(self.run.parent.glob("*/finished.json"))):
            if run == self.run or last_identity(run / part) != identity:
                continue
            now = load_progress(run / part, identity)
            if now and now.round <= self.settings.rounds:
                copy_models(run / "models", self.run / "models", job)
                save_progress(self.run / part, now, identity)
                return now
        return None

    def _replicas(self, job: Job) -> Replicas:
        """Return one model a device as a job starts from it; built once for all arms of a seed."""
        if job.seed not in self._start:
            self._models = self._build_replicas(job.seed)
            self._start = {job.seed: to_cpu(self._models[0].state_dict())}
        for model in self._models:
            model.load(self._start[job.seed])
            model.batchnorm = job.settings.batchnorm
        local = {k: self._start[job.seed][k] for k in self._models[0].local_names()}
        return Replicas(self._models, self.config["threads"], local)

    def _build(self, seed: int) -> ChestResNet:
        how = self.settings.weights, self.settings.tracked, self.settings.batchnorm
        return build_resnet34(*how, seed, precision=self.settings.precision)

    def _build_replicas(self, seed: int) -> list[ChestResNet]:
        """Build one model a device; all seeds share the first one's trunk."""
        trunk = self.run / "models" / "trunk.safetensors"
        if not trunk.is_file():
            first = self._build(self.settings.seed_list[0])
            state = {k: v for k, v in to_cpu(first.state_dict()).items() if not first.is_tracked(k)}
            write_atomic(trunk, partial(save_file, state))
        models = [self._build(seed).place(device) for device in find_devices(self.settings.device)]
        for model in models:
            model.load(load_file(trunk))
        return models

    def _train_job(self, job: Job, deadline: float, on_round: OnRound | None) -> bool:
        """Train one model until its last round; return False if the time is up before."""
        now, seconds = self._load(job), 0.0
        if now and now.round >= self.settings.rounds:
            return True
        replicas = self._replicas(job)
        model = replicas.models[0]
        server = self.strategy if job.arm == "federated" else FedAvg
        strategy = server(job.settings, {name for name, _ in model.named_parameters()})
        local = model.local_names()
        if now is None:
            first = to_cpu(model.tracked_state())
            now = Progress({k: v for k, v in first.items() if k not in local})
        try:
            while now.round < self.settings.rounds:
                began = time.monotonic()
                if began + seconds > deadline:
                    return False
                if reason := over_budget(job, now, strategy.settings):
                    self._stop(job, now, reason, local)
                    return True
                self._one_round(job, now, replicas, strategy)
                self._write_boundary(job, now, local)
                seconds = time.monotonic() - began
                if on_round:
                    on_round(now.rows[-1], self.history())
            return True
        finally:
            self.writer.wait()

    def _stop(self, job: Job, now: Progress, reason: str, local: set[str]) -> None:
        """End a model before its last round, name the reason in the history, and say so."""
        if not now.rows:
            raise InputError(f"{job.name} {reason}: not even one round is possible")
        now.rows[-1]["reason"] = reason
        self._write_boundary(job, now, local)
        print(f"{job.name} {reason}", flush=True)

    def _one_round(self, job: Job, now: Progress, replicas: Replicas, strategy: FedAvg) -> None:
        """Train, aggregate, validate the aggregated model, and keep it if it is the best so far."""
        began = time.perf_counter()
        try:
            rows = run_round(job, now, replicas, strategy)
        except FederationError as error:
            self.writer.wait()
            write_atomic(self.run / "history.csv", self._history_with(job, now.rows + error.rows))
            raise
        row = aggregate_row(job, now, rows, replicas)
        row["seconds"] = time.perf_counter() - began
        # A single client's row says the same as that of its model.
        now.rows += [*rows, row] if job.arm == "federated" else [row]
        score = [-math.inf if math.isnan(v) else v for v in (row["val_auroc"], -row["val_loss"])]
        if score > now.best or score[1] == -math.inf:  # without validation films the last is kept
            now.best, now.best_round = score, now.round

    def _write_boundary(self, job: Job, now: Progress, local: set[str]) -> None:
        """Write a round boundary, and the model if it is the best, while the next round trains."""
        now = dataclasses.replace(now, clients=dict(now.clients), rows=list(now.rows))
        history, budgets = self._history_with(job, now.rows), self._budgets_with(job, now)

        def write() -> None:
            """Write the model, the checkpoint, the history and the budgets, in this order."""
            if now.best_round == now.round:
                self._write_models(job, now, local)
            save_progress(self.run / "checkpoint" / job.name, now, self._identity(job))
            write_atomic(self.run / "history.csv", history)
            if budgets:
                write_atomic(self.run / "privacy.csv", budgets)

        self.writer.start(write)

    def _history_with(self, job: Job, rows: list[Row]) -> bytes:
        """Return the content of `history.csv` with these rows of a job."""
        self.rows[job.name] = rows
        return self.history().to_csv(index=False).encode()

    def _budgets_with(self, job: Job, now: Progress) -> bytes:
        """Return the content of `privacy.csv` with a job's budgets; nothing without privacy."""
        self.spent[job.name] = budget(job, now)
        spent = [row for job in self.jobs for row in self.spent.get(job.name, [])]
        return pd.DataFrame(spent).to_csv(index=False).encode() if spent else b""

    def _write_models(self, job: Job, now: Progress, local: set[str]) -> None:
        """Write the tracked state, and each client's own BatchNorm beside it where it is local."""
        parts = {job.name: now.state | local_state(now.clients, local)}
        if local and job.arm == "federated":
            parts |= {f"{job.name}-{k}": local_state({k: v}, local) for k, v in now.clients.items()}
        for name, state in parts.items():
            write = partial(save_file, state, metadata={"round": str(now.round)})
            write_atomic(self.run / "models" / f"{name}.safetensors", write)

    def _write_global_model(self) -> None:
        """Write the whole federated model of the first seed, for plain torchvision."""
        for job in [job for job in self.jobs if job.arm == "federated"][:1]:
            parts = [self.run / "models" / f"{name}.safetensors" for name in ("trunk", job.name)]
            whole = load_file(parts[0]) | load_file(parts[1])
            write_atomic(self.run / "global_model.safetensors", partial(save_file, whole))


def copy_models(source: Path, target: Path, job: Job) -> None:
    """Copy the best model of a job, its clients' own BatchNorm, and the trunk if there is none."""
    names = [f"{job.name}.safetensors", "trunk.safetensors"]
    if job.arm == "federated":
        names += [path.name for path in source.glob(f"{job.name}-*.safetensors")]
    for name in names:
        if name != "trunk.safetensors" or not (target / name).is_file():
            write_atomic(target / name, (source / name).read_bytes())


def read_history(run: Path) -> pd.DataFrame:
    """Read a run's `history.csv`; `client` is empty on the rows of aggregated models."""
    return pd.read_csv(run / "history.csv", dtype={"client": str}).fillna({"client": ""})


def best_rounds(history: pd.DataFrame) -> pd.DataFrame:
    """Return the row of each model's best validation round, which is the one that is kept.

    The highest AUROC counts, then the lowest loss, then the earlier round.
    """
    models = history[(history["client"] == "") | (history["arm"] == "local")]
    score = models.assign(score=models["val_auroc"].fillna(-math.inf))
    order = score.sort_values(["score", "val_loss", "round"], ascending=[False, True, True])
    return order.groupby(["arm", "seed", "client"]).head(1).drop(columns="score").sort_index()


def open_run(settings: Settings, strategy: type[FedAvg], fingerprint: str) -> dict[str, Any]:
    """Write `config.json` for a new run, or check that the one there is the same; return it.

    Threads a replica belong to a run: where the settings leave them open, a run that goes on keeps
    those it began with. Raises InputError that names what differs.
    """
    path = settings.run / "config.json"
    old = json.loads(path.read_text()) if path.is_file() else {}
    share = max(1, (os.cpu_count() or 1) // len(find_devices(settings.device)))
    config = settings.identity() | {
        "threads": settings.threads or old.get("threads") or share,
        "server": strategy.__name__,
        "fingerprint": fingerprint,
    }
    for key in [key for key in config if old and old.get(key) != config[key]]:
        raise InputError(
            f"{settings.run} is a run with {key}={old.get(key)!r}, not {config[key]!r}: choose"
            " another name, or delete that folder"
        )
    (settings.run / "models").mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(config, indent=1).encode())
    return config
