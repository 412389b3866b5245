"""Training: a run's models, one after the other, each to its last round."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from .. import rounds
from ..base.device import set_up
from ..base.errors import InputError
from ..base.files import run_lock, write_atomic
from ..base.parameters import Parameters
from ..base.state import to_cpu
from ..dataset import ChestXrayDataset, read_report
from ..fedavg import FedAvg
from ..privacy.client import refuse_beyond_total
from ..privacy.ledger import note_open
from ..run import HISTORY, write_global_model, write_model
from ..strategies import STRATEGIES
from .arms import plan
from .batchnorm import refresh_batchnorm
from .checkpoint import Writer, adopt_progress, load_progress, save_progress
from .estimate import estimate_seconds
from .features import FeatureStore
from .identity import model_identity, name_class, note_start, open_run
from .replicas import Models

OnRound = Callable[[rounds.Row, pd.DataFrame], None]
OnFeatures = Callable[[int, int], None]


class Training:
    """A run: the models to train, how far each has come, and what a round boundary writes.

    `films.index` carries `client` and `split`. InputError where the folder holds another run.
    """

    def __init__(
        self, settings: Parameters, films: ChestXrayDataset, strategy: type[FedAvg] | None = None
    ) -> None:
        self.settings, self.run, self.films = settings, settings.run, films
        self.writer = Writer()
        self.strategy = strategy or STRATEGIES[settings.strategy]
        self.config = open_run(settings, name_class(self.strategy), self._fingerprint())
        # Before a model is built, whose calibration depends on the threads in its last bits.
        set_up(self.config["threads"], settings.precision)
        self.models = Models(settings, self.config["threads"])
        self.jobs = self._plan(films)
        self.seconds = 0.0  # that train() took in this session
        self.local: set[str] = set()  # BatchNorm that stays with the clients of the job in work
        there = [(job, now) for job in self.jobs if (now := self._load(job))]
        self.rows = {job.name: now.rows for job, now in there}
        self.spent = {job.name: rounds.budget(job, now) for job, now in there}
        self.features = None
        if settings.cache_features:
            trunk = self.models.replicas(self.jobs[0]).models[0]
            self.features = FeatureStore(trunk, films, settings, self.config["fingerprint"])
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
                note_start(self.settings)
            deadline = time.monotonic() + (self.settings.max_hours or math.inf) * 3600
            if self.features:
                self._compute_features(on_features)
            if all([self._train_job(job, deadline, on_round) for job in self.jobs]):
                for job in [job for job in self.jobs if job.arm == "federated"][:1]:
                    write_global_model(self.run, job.name)
                write_atomic(self.run / "finished.json", json.dumps(self.config).encode())
        self.seconds = time.perf_counter() - began
        return self.history()

    def history(self) -> pd.DataFrame:
        """Return the rows of all rounds so far, as `history.csv` has them."""
        rows = [row for job in self.jobs for row in self.rows.get(job.name, [])]
        return pd.DataFrame(rows, columns=HISTORY)

    def estimate_seconds(self) -> float:
        """Estimate the time for the rounds that are left, from a few batches on this device."""
        left = list(zip(self.jobs, self._rounds_left(), strict=True))
        return estimate_seconds(left, self.models, self.strategy, self.features)

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
        jobs = plan(self.settings, films, self.strategy)
        for job in jobs:
            for client in job.clients:
                client.keep_ledger(*self._release(job))
        refuse_beyond_total(client for job in jobs for client in job.clients)
        return jobs

    def _executor(self, job: rounds.Job) -> rounds.Executor:
        """Return where the clients of a job train."""
        return self.models.replicas(job)

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
        return model_identity(job, self.config)

    def _release(self, job: rounds.Job) -> tuple[Path, str]:
        """Name a job's model in the ledger: the work folder, and the model with what it is."""
        return Path(self.settings.work_dir), f"{job.name} {self._identity(job)[:16]}"

    def _load(self, job: rounds.Job) -> rounds.Progress | None:
        """Load how far a job has come, here or in a finished run that shares its model."""
        own = load_progress(self.run / "checkpoint" / job.name, self._identity(job))
        if own or self.films is None:  # over a network the hospitals of another run may be others
            return own
        return adopt_progress(self.run, job.model, self._identity(job), self.settings.rounds)

    def _train_job(self, job: rounds.Job, deadline: float, on_round: OnRound | None) -> bool:
        """Train one model until its last round; return False if the time is up before."""
        now, seconds = self._load(job), 0.0
        if now and now.round >= self.settings.rounds:
            return True
        executor, model = self._executor(job), self.models.models[0]
        server = self.strategy if job.arm == "federated" else FedAvg
        strategy = server(job.settings, {name for name, _ in model.named_parameters()})
        self.local = model.local_names()
        if now is None:
            first = to_cpu(model.tracked_state())
            now = rounds.Progress({k: v for k, v in first.items() if k not in self.local})
        self._note_open(job)
        try:
            while now.round < self.settings.rounds:
                began = time.monotonic()
                if began + seconds > deadline:
                    return False
                if reason := rounds.over_budget(job, now, strategy.settings):
                    self._stop(job, now, reason)
                    return True
                self._one_round(job, now, executor, strategy)
                self._write_boundary(job, now)
                seconds = time.monotonic() - began
                if on_round:
                    on_round(now.rows[-1], self.history())
            return True
        finally:
            self.writer.wait()

    def _note_open(self, job: rounds.Job) -> None:
        """Write into the ledger whose films are trained on here without privacy."""
        if self.settings.dp == "off" and self.films is not None:
            for client in job.clients:
                note_open(*self._release(job), client.name, client.films.index["patient_id"])

    def _stop(self, job: rounds.Job, now: rounds.Progress, reason: str) -> None:
        """End a model before its last round, name the reason in the history, and say so."""
        if not now.rows:
            raise InputError(f"{job.name} {reason}: not even one round is possible")
        now.rows[-1]["reason"] = reason
        self._write_boundary(job, now)
        print(f"{job.name} {reason}", flush=True)

    def _one_round(
        self, job: rounds.Job, now: rounds.Progress, executor: rounds.Executor, strategy: FedAvg
    ) -> None:
        """Train, aggregate, validate the aggregated model, and keep it if it is the best so far."""
        began = time.perf_counter()
        try:
            rows = rounds.run_round(job, now, executor, strategy)
        except rounds.FederationError as error:
            self.writer.wait()
            write_atomic(self.run / "history.csv", self._history_with(job, now.rows + error.rows))
            raise
        if strategy.settings.batchnorm == "precise":
            refresh_batchnorm(job, now, executor, rows, strategy)
        row = rounds.aggregate_row(job, now, rows, executor)
        row["seconds"] = time.perf_counter() - began
        # A single client's row says the same as that of its model.
        now.rows += [*rows, row] if job.arm == "federated" else [row]
        score = [-math.inf if math.isnan(v) else v for v in (row["val_auroc"], -row["val_loss"])]
        if score > now.best or score[1] == -math.inf:  # without validation films the last is kept
            now.best, now.best_round = score, now.round

    def _write_boundary(self, job: rounds.Job, now: rounds.Progress) -> None:
        """Write a round boundary, and the model if it is the best, while the next round trains."""
        now = dataclasses.replace(now, clients=dict(now.clients), rows=list(now.rows))
        history = self._history_with(job, now.rows)
        self.spent[job.name] = rounds.budget(job, now)
        spent = [row for job in self.jobs for row in self.spent.get(job.name, [])]

        def write() -> None:
            """Write the model, the checkpoint, the history and the budgets, in this order."""
            if now.best_round == now.round:
                self._write_models(job, now)
            save_progress(self.run / "checkpoint" / job.name, now, self._identity(job))
            write_atomic(self.run / "history.csv", history)
            if spent:
                budgets = pd.DataFrame(spent).to_csv(index=False)
                write_atomic(self.run / "privacy.csv", budgets.encode())

        self.writer.start(write)

    def _history_with(self, job: rounds.Job, rows: list[rounds.Row]) -> bytes:
        """Return the content of `history.csv` with these rows of a job."""
        self.rows[job.name] = rows
        return self.history().to_csv(index=False).encode()

    def _write_models(self, job: rounds.Job, now: rounds.Progress) -> None:
        """Write the tracked state, and each client's own BatchNorm beside it where it is local."""
        parts = {job.name: now.state | rounds.local_state(now.clients, self.local)}
        if self.local and job.arm == "federated":
            parts |= {
                f"{job.name}-{k}": rounds.local_state({k: v}, self.local)
                for k, v in now.clients.items()
            }
        for name, state in parts.items():
            write_model(self.run, name, state, round=str(now.round))
