"""Training: a run's models, one after the other, each to its last round."""

import dataclasses
import json
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch

from .. import rounds
from ..base.device import set_up
from ..base.errors import InputError
from ..base.files import run_lock, write_atomic
from ..base.parameters import Parameters
from ..base.threads import NOTICED
from ..dataset import ChestXrayDataset, read_report
from ..fedavg import FedAvg
from ..privacy.ledger import note_open
from ..run import HISTORY, write_global_model, write_model
from ..strategies import STRATEGIES
from . import arms, batchnorm, checkpoint, estimate, features, identity, masked, replicas

OnRound = Callable[[rounds.Row, pd.DataFrame], None]
OnFeatures = Callable[[int, int], None]


class Training:
    """A run: the models to train, how far each has come, and what a round boundary writes.

    `films.index` carries `client` and `split`. InputError where the folder holds another run.
    """

    def __init__(
        self, settings: Parameters, films: ChestXrayDataset, strategy: type[FedAvg] | None = None
    ) -> None:
        self.strategy = strategy or STRATEGIES[settings.strategy]
        settings = arms.with_strategy(settings, self.strategy)
        self.settings, self.run, self.films = settings, settings.run, films
        self.writer = checkpoint.Writer()
        known_as = identity.name_class(self.strategy)
        self.config = identity.open_run(settings, known_as, self._fingerprint())
        # Before a model is built, whose calibration depends on the threads in its last bits.
        set_up(self.config["threads"], settings.precision)
        self.jobs = self._plan(films)
        at_once = sum(len(job.clients) for job in self.jobs)
        self.models = replicas.Models(
            settings, 1 if films is None else at_once, len(self._findings())
        )
        self.lock = threading.RLock()  # of the history, which jobs side by side write
        self.seconds = 0.0  # that train() took in this session
        there = [(job, now) for job in self.jobs if (now := self._load(job))]
        self.rows = {job.name: now.rows for job, now in there}
        self.spent = {job.name: rounds.budget(job, now) for job, now in there}
        self.features = None
        if settings.cache_features:
            fingerprint = self.config["fingerprint"]
            self.features = features.FeatureStore(self.models.shared, films, settings, fingerprint)
            self.features.check_disk()

    def train(
        self, on_round: OnRound | None = None, on_features: OnFeatures = lambda done, total: None
    ) -> pd.DataFrame:
        """Train every model to its last round, from wherever it stands; return the history.

        `on_round` gets the row of the aggregated model and the history so far, `on_features` the
        number of films that have features, and of all. Stops at a round boundary before `max_hours`
        are over. Raises FederationError when too few clients answer, and InputError when another
        process writes this run, or features would take too long.
        """
        began = time.perf_counter()
        with run_lock(self.run):
            (self.run / "finished.json").unlink(missing_ok=True)
            if any(self._rounds_left()):
                identity.note_start(self.run)
                self.models.shared.stopped.clear()
            self._write_tables()  # also of a run whose models are all another's
            deadline = time.monotonic() + (self.settings.max_hours or math.inf) * 3600
            if self.features:
                self._compute_features(on_features)
            whole = all(self._train_jobs(deadline, on_round))
            self._account_for_all()
            if whole:
                for job in [job for job in self.jobs if job.arm == "federated"][:1]:
                    write_global_model(self.run, job.name)
                write_atomic(self.run / "finished.json", json.dumps(self.config).encode())
        self.seconds = time.perf_counter() - began
        return self.history()

    def _write_tables(self) -> None:
        """Write the history and the budgets so far, and whose patients are where, if nobody has."""
        write_atomic(self.run / "history.csv", self.history().to_csv(index=False).encode())
        if spent := [row for job in self.jobs for row in self.spent.get(job.name, [])]:
            budgets = pd.DataFrame(spent).to_csv(index=False)
            write_atomic(self.run / "privacy.csv", budgets.encode())
        if self.films is not None and not (self.run / "clients.csv").is_file():
            placed = self.films.index[["patient_id", "client", "split"]].drop_duplicates()
            write_atomic(self.run / "clients.csv", placed.to_csv(index=False).encode())

    def _account_for_all(self) -> None:
        """Bring the budgets of models that ended early up to what the last one has released."""
        if self.settings.dp != "off":
            for job in self.jobs:
                folder = self.run / "checkpoint" / job.name
                if now := checkpoint.load_progress(folder, self._identity(job)):
                    self.spent[job.name] = rounds.budget(job, now)
            self._write_tables()

    def history(self) -> pd.DataFrame:
        """Return the rows of all rounds so far, as `history.csv` has them."""
        rows = [row for job in self.jobs for row in self.rows.get(job.name, [])]
        return pd.DataFrame(rows, columns=HISTORY)

    def estimate_seconds(self) -> float:
        """Estimate the time for the rounds that are left, from a few batches on this device."""
        left = list(zip(self.jobs, self._rounds_left(), strict=True))
        return estimate.estimate_seconds(left, self.models, self.strategy, self.features)

    def _rounds_left(self) -> list[int]:
        """Count the rounds that each model still has to train."""
        done = [self.rows.get(job.name, [{"round": 0}])[-1]["round"] for job in self.jobs]
        return [max(0, self.settings.rounds - number) for number in done]

    def _compute_features(self, progress: OnFeatures) -> None:
        """Let the frozen trunk run once, where its output is not there yet, and train from that."""
        hours = self.features.seconds_left() / 3600
        if hours > (self.settings.max_hours or math.inf):
            what = f"max_hours={self.settings.max_hours:g}: features alone take about {hours:.2f} h"
            raise InputError(f"{what}: give more, choose fewer films or cache_features=false")
        self.jobs = self._plan(self.films.holding(self.features.fill(progress)))

    def _plan(self, films: ChestXrayDataset) -> list[rounds.Job]:
        jobs = arms.plan(self.settings, films, self.strategy)
        identity.keep_ledgers(jobs, self.config)
        return jobs

    def _findings(self) -> list[str]:
        """Return what the model has an output for each of."""
        return self.films.findings

    def _executor(self, job: rounds.Job) -> rounds.Executor:
        """Return where the clients of a job train."""
        replicas = self.models.replicas(job)
        return masked.Masked(replicas, job) if job.settings.secure_aggregation else replicas

    def _fingerprint(self) -> str:
        """Return that of the prepared films; raise InputError where they have another size."""
        if self.films is None:  # over a network they stay where they are
            return ""
        prepared, wanted = self.settings.prepared, self.settings.image_size
        report = read_report(prepared)
        if (size := report.get("image_size", wanted)) != wanted:
            what = f"{prepared} holds films of {size} pixels, but image_size is {wanted}"
            raise InputError(f"{what}: give notebooks 02 and 03 the same profile or image_size")
        return report["fingerprint"]

    def _identity(self, job: rounds.Job) -> str:
        return identity.model_identity(job, self.config)

    def _load(self, job: rounds.Job) -> rounds.Progress | None:
        """Load how far a job has come, here or in a finished run that shares its model."""
        known = self._identity(job)
        own = checkpoint.load_progress(self.run / "checkpoint" / job.name, known)
        if own or self.films is None:  # over a network the hospitals of another run may be others
            return own
        return checkpoint.adopt_progress(self.run, job.model, known, self.settings.rounds)

    def _train_jobs(self, deadline: float, on_round: OnRound | None) -> list[bool]:
        """Train all models, as many side by side as there are replicas; tell which are whole.

        `on_round` is called in this thread. Where a model fails, or this is interrupted, the others
        are interrupted, too: each goes on from its last round boundary.
        """
        count = min(len(self.models.devices), len(self.jobs))
        if count == 1 or self.settings.total_epsilon:  # another model would spend the same budget
            return [self._train_job(job, deadline, on_round) for job in self.jobs]
        said: queue.SimpleQueue[rounds.Row | Future] = queue.SimpleQueue()
        own = (self.config["threads"],)
        with ThreadPoolExecutor(count, "job", torch.set_num_threads, own) as pool:
            futures: list[Future] = []
            try:  # from the first one on: it trains by now, and would keep an interrupt waiting
                for job in self.jobs:
                    futures.append(
                        pool.submit(self._train_job, job, deadline, lambda row, _: said.put(row))
                    )
                    futures[-1].add_done_callback(said.put)
                while not all(future.done() for future in futures) or not said.empty():
                    try:
                        news = said.get(timeout=NOTICED)  # of a round, or of a model's end
                    except queue.Empty:
                        continue
                    if isinstance(news, Future):
                        news.result()
                    elif on_round:
                        on_round(news, self.history())
                return [future.result() for future in futures]
            except BaseException:
                self.models.shared.stopped.set()
                for future in futures:
                    future.cancel()
                raise

    def _train_job(self, job: rounds.Job, deadline: float, on_round: OnRound | None) -> bool:
        """Train one model until its last round; return False if the time is up before."""
        now, seconds = self._load(job), 0.0
        if now and now.round >= self.settings.rounds:
            return True
        executor = self._executor(job)
        local = self.models.local if job.settings.batchnorm == "local" else set()
        server = self.strategy if job.arm == "federated" else FedAvg
        strategy = server(job.settings, {n for n, _ in self.models.first.named_parameters()})
        if now is None:
            first = self.models.start(job.seed)
            now = rounds.Progress({k: v for k, v in first.items() if k not in local})
        self._note_open(job)
        try:
            while now.round < self.settings.rounds:
                began = time.monotonic()
                if began + seconds > deadline:
                    return False
                if reason := rounds.over_budget(job, now, strategy.settings):
                    with self.lock:
                        self._stop(job, now, local, reason)
                    return True
                self._one_round(job, now, executor, strategy)
                with self.lock:
                    self._write_boundary(job, now, local)
                seconds = time.monotonic() - began
                if on_round:
                    on_round(now.rows[-1], self.history())
            return True
        finally:
            with self.lock:
                self.writer.wait()

    def _note_open(self, job: rounds.Job) -> None:
        """Write into the ledger whose films are trained on here without privacy."""
        if self.settings.dp == "off" and self.films is not None:
            work, release = Path(self.settings.work_dir), identity.name_release(job, self.config)
            for client in job.clients:
                note_open(work, release, client.name, client.films.index["patient_id"])

    def _stop(self, job: rounds.Job, now: rounds.Progress, local: set[str], reason: str) -> None:
        """End a model before its last round, name the reason in the history, and say so."""
        if not now.rows:
            raise InputError(f"{job.name} {reason}: not even one round is possible")
        now.rows[-1]["reason"] = reason
        self._write_boundary(job, now, local)
        print(f"{job.name} {reason}", flush=True)

    def _one_round(
        self, job: rounds.Job, now: rounds.Progress, executor: rounds.Executor, strategy: FedAvg
    ) -> None:
        """Train, aggregate, validate the aggregated model, and keep it if it is the best so far."""
        began = time.perf_counter()
        try:
            *rows, whole = rounds.run_round(job, now, executor, strategy)
        except rounds.FederationError as error:
            with self.lock:
                self.writer.wait()
                self.rows[job.name] = now.rows + error.rows
                self._write_tables()
            raise
        if strategy.settings.batchnorm == "precise":
            batchnorm.refresh_batchnorm(job, now, executor, rows, strategy)
        for fault in (row for row in rows if row["status"] != "ok"):
            who = f"{fault['client']} {fault['status']}: {fault['reason']}"
            print(f"{job.name}, round {now.round}: {who}", flush=True)
        row = rounds.aggregate_row(job, now, rows, whole, executor)
        row["seconds"] = time.perf_counter() - began
        # A single client's row says the same as that of its model.
        now.rows += [*rows, row] if job.arm == "federated" else [row]
        score = [-math.inf if math.isnan(v) else v for v in (row["val_auroc"], -row["val_loss"])]
        unjudged = now.best == [-math.inf, -math.inf]  # so far: then the last round is kept
        if score > now.best or unjudged:
            now.best, now.best_round = score, now.round

    def _write_boundary(self, job: rounds.Job, now: rounds.Progress, local: set[str]) -> None:
        """Write a round boundary, and the model if it is the best, while the next round trains."""
        now = dataclasses.replace(now, clients=dict(now.clients), rows=list(now.rows))
        self.rows[job.name], self.spent[job.name] = now.rows, rounds.budget(job, now)

        def write() -> None:
            """Write the model, the checkpoint, the history and the budgets, in this order."""
            if now.best_round == now.round:
                self._write_models(job, now, local)
            checkpoint.save_progress(self.run / "checkpoint" / job.name, now, self._identity(job))
            self._write_tables()

        self.writer.start(write)

    def _write_models(self, job: rounds.Job, now: rounds.Progress, local: set[str]) -> None:
        """Write the tracked state, and each client's own BatchNorm beside it where it is local."""
        parts = {job.name: now.state | rounds.local_state(now.clients, local)}
        if local and job.arm == "federated":
            parts |= {
                f"{job.name}-{k}": rounds.local_state({k: v}, local) for k, v in now.clients.items()
            }
        for name, state in parts.items():
            write_model(self.run, name, state, round=str(now.round))
