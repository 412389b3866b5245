"""Replicas: one model a device; clients train side by side."""

import copy
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..base.device import find_devices
from ..base.errors import in_a_line
from ..base.fixed import Pool
from ..base.parameters import Parameters, parameter
from ..base.scores import judge, only_of, validation_sums
from ..base.state import LARGEST, State, find_misfit, to_cpu
from ..base.threads import Item, Result, Shared
from ..client import Client, Update
from ..fedavg import FedAvg
from ..films.phantom.write import draw_batch
from ..model import ChestResNet, build_resnet34
from ..rounds import Job, Progress, predict_with
from ..run import TRUNK, model_file, read_model, write_model
from .batchnorm import measure_safely


@dataclass(frozen=True)
class ReplicaParameters(Parameters):
    """What a run computes on, and for how long."""

    device: str = parameter(
        "auto", "a model replica on each: auto (all GPUs, else cpu), cpu (one a core), or a list"
        " such as cuda:0,cuda:1", identity=False,
    )  # fmt: skip
    threads: int = parameter(
        0, "CPU threads of a replica; 0: one on the CPU, the cores divided among GPUs",
        bounds=(0, 1024),
    )  # fmt: skip
    max_hours: float = parameter(
        0.0, "stop cleanly at a round boundary before this; 0: never", bounds=(0.0, math.inf),
        identity=False,
    )  # fmt: skip

    def check(self) -> None:
        """Raise InputError for a device that is not there."""
        find_devices(self.device)


def start_model(settings: Parameters, seed: int, outputs: int) -> ChestResNet:
    """Build the model that a run starts from; a random trunk is calibrated on phantom films."""
    return build_resnet34(
        settings.weights, settings.tracked, settings.batchnorm, seed, outputs=outputs,
        precision=settings.precision, draw_films=lambda: draw_batch(32, 64),
    )  # fmt: skip


class Models:
    """The model replicas of a run, one for each device, which its jobs share; built at first use.

    There are at most `most`, as many as clients may ever train at once, with an output a finding.
    All seeds share the trunk of the run's first one.
    """

    def __init__(self, settings: Parameters, most: int, outputs: int) -> None:
        self.settings, self.devices = settings, find_devices(settings.device)[:most]
        self.outputs = outputs
        self.known: tuple[int, State] = (-1, {})  # the last seed asked for, and where it starts
        self.built: Shared[ChestResNet] | None = None
        self.local: set[str] = set()  # BatchNorm's state, which may stay with the clients
        self.lock = threading.Lock()

    @property
    def shared(self) -> Shared[ChestResNet]:
        """The replicas."""
        with self.lock:
            self.built = self.built or self._build()
            return self.built

    @property
    def first(self) -> ChestResNet:
        """A replica to ask for names, sizes and the trunk, while it may be in use."""
        return self.shared.tools[0]

    def _build(self) -> Shared[ChestResNet]:
        """Build the replicas on the trunk of the run, which the first one writes."""
        model = start_model(self.settings, self.settings.seed_list[0], self.outputs)
        self.known = self.settings.seed_list[0], to_cpu(model.tracked_state())
        if not model_file(self.settings.run, TRUNK).is_file():
            state = {k: v for k, v in to_cpu(model.state_dict()).items() if not model.is_tracked(k)}
            write_model(self.settings.run, TRUNK, state)
        model.load(read_model(self.settings.run, TRUNK))
        model.batchnorm = "local"
        self.local, model.batchnorm = model.local_names(), self.settings.batchnorm
        shared = Shared([model, *(copy.deepcopy(model) for _ in self.devices[1:])])

        def interrupt(*about: object) -> None:
            """Stop whoever computes."""
            if shared.stopped.is_set():
                raise KeyboardInterrupt

        for replica, device in zip(shared.tools, self.devices, strict=True):
            replica.place(device).register_forward_pre_hook(interrupt)
        return shared

    def start(self, seed: int) -> State:
        """Return the tracked state that a seed's models start from, on the CPU."""
        with self.lock:
            self.built = self.built or self._build()  # which knows the first seed's
            if seed != self.known[0]:
                fresh = start_model(self.settings, seed, self.outputs)
                self.known = seed, to_cpu(fresh.tracked_state())
            return self.known[1]

    def replicas(self, job: Job) -> "Replicas":
        """Return the executor of a job."""
        shared, start = self.shared, {}
        if job.settings.batchnorm == "local":
            start = {name: self.start(job.seed)[name] for name in self.local}
        return Replicas(shared, job.settings.batchnorm, start)


class Replicas:
    """The executor of a job on this machine: its clients train side by side, on what is free."""

    def __init__(
        self, models: Shared[ChestResNet], batchnorm: str, start: State | None = None
    ) -> None:
        self.models, self.batchnorm = models, batchnorm
        self.start = start or {}  # local BatchNorm, for clients that have kept none of their own

    def pool(self, job: Job, strategy: FedAvg) -> Pool:
        """Return what puts together what `fit` or `measure` will yield next."""
        return Pool(strategy.aggregator(), job.clients)

    def fit(
        self, clients: list[Client], sent: State, kept: dict[str, State], round: int
    ) -> Iterator[tuple[Update, State]]:
        """Train each client from `sent`; yield its update and what it keeps, in the given order."""
        start = self.start | sent
        return self._each(
            lambda c, model: fit_safely(c, model, start, kept.get(c.name, {}), round), clients
        )

    def measure(
        self, clients: list[Client], state: State, round: int
    ) -> Iterator[tuple[State, str]]:
        """Let each client measure BatchNorm under a state; yield that, or why not, in order."""
        return self._each(lambda c, model: measure_safely(c, model, state, round), clients)

    def validate(self, job: Job, now: Progress) -> tuple[float, float]:
        """Return loss and mean AUROC, within hospitals, of the aggregated model on their films."""
        return judge(self.validation_sums(job, now).values())

    def validation_sums(
        self, job: Job, now: Progress, findings: Sequence[int] | None = None
    ) -> dict[str, dict[str, np.ndarray]]:
        """Return by hospital what `judge` adds up; none of a broken model, no better than that.

        Of these `findings` alone, by default of all.
        """
        films = job.validation
        labels = films.labels if findings is None else only_of(films.labels, findings)
        parts = films.parts(1 if self.start else len(self.models.tools))
        found = self._each(lambda p, model: predict_with(model, p, now.state, now.clients), parts)
        logits = np.concatenate(list(found))
        if not np.isfinite(logits).all():
            return {}
        own = films.index.groupby("client").indices.items()
        return {name: validation_sums(labels[rows], logits[rows]) for name, rows in own}

    def _each(
        self, task: Callable[[Item, ChestResNet], Result], items: list[Item]
    ) -> Iterator[Result]:
        """Yield task(item, model) in the given order, each on whichever replica is free."""

        def work(item: Item, model: ChestResNet) -> Result:
            """Work by the job's policy of BatchNorm: another job may have used the replica."""
            model.batchnorm = self.batchnorm
            return task(item, model)

        return self.models.each(work, items)


def fit_safely(
    client: Client, model: ChestResNet, sent: State, kept: State, round: int
) -> tuple[Update, State]:
    """Train a client; whatever goes wrong there costs its update, with a reason, not the round."""
    try:
        update, keep = client.fit(model, sent, kept, round)
        if update.status != "ok":
            return update, kept
        wanted = client.returns(model, sent) - model.local_names()
        status, reason = find_misfit(update.state, {name: sent[name] for name in wanted})
    except Exception as error:  # any fault of a client is named in the history
        return Update(client.name, 0, status="failed", reason=in_a_line(error)), kept
    limit = client.settings.client_seconds
    if not (status or client.withholds_loss or abs(update.train_loss) <= LARGEST):
        status, reason = "non-finite", "training loss is not finite"
    if not status and limit and update.seconds > limit:
        status, reason = "late", f"took {update.seconds:.1f} s, client_seconds is {limit:g}"
    if client.withholds_loss:
        update = dataclasses.replace(update, train_loss=math.nan)
    if not status:
        return update, keep
    # The server has seen an update that it leaves out: what it cost is spent.
    spent = {name: value for name, value in keep.items() if name in client.spent}
    return dataclasses.replace(update, status=status, reason=reason), kept | spent
