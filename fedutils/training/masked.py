"""Masked sums in the simulation: the same protocol as over a network, in one process."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch

from ..base.errors import InputError
from ..base.fixed import FILM, ONE, Counted, Pool, Whole
from ..base.scores import judge
from ..base.state import LARGEST, State, is_head
from ..client import Client, Update
from ..fedavg import FedAvg, WeightedMean
from ..privacy.masks import MaskedSum, Masker, MaskFault
from ..rounds import Job, Progress
from .replicas import Replicas

SUM, SHARE, ALL = "sum/", "share/", "share"


def encode(state: State, whole: Whole, client: Counted) -> State:
    """Return what a client adds to the mean as integers (int64), which masks can hide.

    A head's share stands by finding, as a finding may be unknown to any client. Raises MaskFault
    where its share is none of `whole`.
    """
    own, (share, known) = WeightedMean(), whole.shares(client)
    if max(share, *known) > ONE:
        raise MaskFault(f"{client.name}: its films are more than all")
    own.add(state, share, known)
    shares = {SHARE + name: torch.as_tensor(share) for name, share in own.shares.items()}
    for name in filter(is_head, state):
        rows = (len(known), *[1] * (state[name].ndim - 1))
        shares[SHARE + name] = torch.tensor(known).view(rows)
    return {SUM + k: v for k, v in own.sums.items()} | shares | {ALL: torch.tensor(own.share)}


def put_into_mean(total: State, sums: WeightedMean) -> None:
    """Put a sum of what clients encoded into an empty mean; MaskFault where no honest ones gave it.

    That is all that can be told of one who lies under masks: its name cannot.
    """
    sums.share = int(total[ALL])
    for name in [name.removeprefix(SUM) for name in total if name.startswith(SUM)]:
        value, share = total[SUM + name], total[SHARE + name]
        most = share.double() * LARGEST + share.bool() * 2.0**32  # which rounding never reaches
        inside = (share >= 0).all() and (share <= ONE + FILM).all() and sums.share > 0
        if name.endswith("running_var"):
            inside = inside and (value >= 0).all()
        if not inside or not (value.double().abs() <= most).all():
            raise MaskFault(f"the sum of {name} is none that honest hospitals give: somebody lies")
        sums.sums[name] = value
        sums.shares[name] = share if share.ndim else int(share)


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
        put_into_mean(self.executor.unmask(), self.sums)
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
        if not sums:
            return math.nan, math.nan
        none = {name: np.zeros_like(value) for name, value in next(iter(sums.values())).items()}
        names = [client.name for client in job.clients]
        self._open(f"validate {now.round}", names)
        for name in names:
            own = {k: torch.from_numpy(v) for k, v in sums.get(name, none).items()}
            self.sum.add(name, self._mask(name, own))
        return judge([{name: value.numpy() for name, value in self.unmask().items()}])

    def unmask(self) -> State:
        """Return the sum of what came, by the shares of those whose numbers are in it."""
        what, names = self.sum.what, self.sum.survivors
        signed = {name: self.maskers[name].agree(what, names) for name in names}
        return self.sum.finish({name: self.maskers[name].reveal(what, signed) for name in names})

    def _open(self, what: str, names: list[str]) -> None:
        members = {name: self.introduced[name] for name in names}
        offered = {name: self.maskers[name].offer(what, members) for name in names}
        self.sum = MaskedSum(what, offered, len(members))

    def _mask(self, name: str, numbers: State) -> State:
        """Return what a client sends of its numbers."""
        one = self.sum
        shares = one.shares_for(name)
        return self.maskers[name].mask(one.what, one.what, one.offers, shares, numbers)
