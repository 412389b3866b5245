"""Masked sums in the simulation: the same protocol as over a network, in one process."""

import dataclasses
import math
from collections.abc import Iterator

import torch

from ..base.errors import InputError
from ..base.fixed import ONE, Pool, Whole
from ..base.scores import judge
from ..base.state import State
from ..client import Client, Update
from ..fedavg import FedAvg, WeightedMean
from ..privacy.masks import MaskedSum, Masker, MaskFault
from ..rounds import Job, Progress
from .replicas import Replicas

SUM, SHARE, ALL = "sum/", "share/", "share"


def encode(state: State, whole: Whole, client: Client) -> State:
    """Return what a client adds to the mean as integers (int64), which masks can hide."""
    own = WeightedMean()
    own.add(state, *whole.shares(client))
    if own.share > ONE:
        raise MaskFault(f"{client.name}: its films are more than all")
    return encoded(own)


def encoded(mean: WeightedMean) -> State:
    """Return a mean's sums and shares as tensors by name."""
    shares = {SHARE + name: torch.as_tensor(share) for name, share in mean.shares.items()}
    return {SUM + k: v for k, v in mean.sums.items()} | shares | {ALL: torch.tensor(mean.share)}


class MaskedPool(Pool):
    """What clients send under masks; once the sum is whole, `executor` takes them off."""

    def __init__(self, job: Job, strategy: FedAvg, whole: Whole, executor: "Masked") -> None:
        super().__init__(strategy.aggregator(), job.clients)
        self.whole, self.executor = whole, executor

    def add(self, client: str, state: State) -> None:
        """Add what a client sends."""
        self.executor.sum.add(client, state)
        self.sums.count += 1

    def result(self, before: State) -> tuple[State, float, float]:
        """Return the mean, and of how much it is: of which part of all films, and how many."""
        total = self.executor.unmask()
        self.sums.share = int(total.pop(ALL))
        for name in [name for name in total if name.startswith(SUM)]:
            share = total.pop(SHARE + name.removeprefix(SUM))
            self.sums.sums[name.removeprefix(SUM)] = total.pop(name)
            self.sums.shares[name.removeprefix(SUM)] = share if share.ndim else int(share)
        return self.sums.result(before), *self.whole.part(self.sums.share)


class Masked:
    """An executor in which the server sees sums alone; `inner` trains the job's clients."""

    def __init__(self, inner: Replicas, job: Job) -> None:
        self.inner, self.whole = inner, Whole.of(job.clients)
        least = job.settings.min_clients
        if len(job.clients) < least:
            raise InputError(
                f"min_clients={least}, but there are {len(job.clients)} to mask a sum of"
            )
        self.maskers = {c.name: Masker(c.name, job.name, least, {}) for c in job.clients}
        self.introduced = {name: one.introduce() for name, one in self.maskers.items()}

    def pool(self, job: Job, strategy: FedAvg) -> MaskedPool:
        """Return what puts together what `fit` or `measure` will yield next."""
        return MaskedPool(job, strategy, self.whole, self)

    def fit(
        self, clients: list[Client], sent: State, kept: dict[str, State], round: int
    ) -> Iterator[tuple[Update, State]]:
        """Train each client; yield what it sends under masks and what it keeps, in the order."""
        self._open(f"fit {round}", [client.name for client in clients])
        names = {client.name: client for client in clients}
        for update, keep in self.inner.fit(clients, sent, kept, round):
            if update.status == "ok":
                numbers = encode(update.state | update.loss, self.whole, names[update.client])
                hidden = {"train_loss": math.nan, "examples": math.nan}
                hidden["state"] = self._mask(update.client, numbers)
                update = dataclasses.replace(update, **hidden)
            yield update, keep

    def measure(
        self, clients: list[Client], state: State, round: int
    ) -> Iterator[tuple[State, str]]:
        """Let each client measure BatchNorm; yield it under masks, or why not, in order."""
        self._open(f"measure {round}", [client.name for client in clients])
        found = self.inner.measure(clients, state, round)
        for client, (measured, fault) in zip(clients, found, strict=True):
            if not fault:
                measured = self._mask(client.name, encode(measured, self.whole, client))
            yield measured, fault

    def validate(self, job: Job, now: Progress) -> tuple[float, float]:
        """Return loss and mean AUROC, within hospitals, of the aggregated model on their films."""
        sums = self.inner.validation_sums(job, now)
        self._open(f"validate {now.round}", list(sums))
        for name, own in sums.items():
            self.sum.add(name, self._mask(name, {k: torch.from_numpy(v) for k, v in own.items()}))
        return judge([{name: value.numpy() for name, value in self.unmask().items()}])

    def unmask(self) -> State:
        """Return the sum of what came, by the shares of those whose numbers are in it."""
        one = self.sum
        came = {name: self.maskers[name] for name in one.survivors}
        return one.finish({k: m.reveal(one.what, one.survivors) for k, m in came.items()})

    def _open(self, what: str, names: list[str]) -> None:
        members = {name: self.introduced[name] for name in names}
        offered = {name: self.maskers[name].offer(what, members) for name in names}
        self.sum = MaskedSum(what, offered)

    def _mask(self, name: str, numbers: State) -> State:
        """Return what a client sends of its numbers."""
        one = self.sum
        shares = one.shares_for(name)
        return self.maskers[name].mask(one.what, one.what, one.offers, shares, numbers)
