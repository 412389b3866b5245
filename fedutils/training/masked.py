"""Masked sums in the simulation: the same protocol as over a network, in one process."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import torch

from ..base.errors import InputError
from ..base.findings import SPLITS
from ..base.fixed import FILM, MOST_COUNTED, ONE, Counted, Pool, Whole
from ..base.scores import judge
from ..base.state import LARGEST, State, is_head
from ..client import Client, Update
from ..fedavg import FedAvg, WeightedMean
from ..privacy.masks import MaskedSum, Masker, MaskFault
from ..rounds import Job, Progress
from .replicas import Replicas

SUM, SHARE, ALL = "sum/", "share/", "share"
FLOOR = ONE * FILM // MOST_COUNTED  # the share of one film of the most that a sum counts


def known_rows(*parts: Iterable[float]) -> str:
    """Return which findings a client knows in each split, as its introduction says it."""
    return "".join("01"[count > 0] for part in parts for count in part)


def split_rows(split: str, findings: int) -> range:
    """Return where in `known_rows` a split's findings stand."""
    start = SPLITS.index(split) * findings
    return range(start, start + findings)


def read_whole(largest: object, weight: object) -> Whole:
    """Return what all films count together; MaskFault where no films could."""
    if not (isinstance(largest, int) and isinstance(weight, int)):
        raise MaskFault("what all hospitals count together is no number")
    if not 0 < weight <= largest < MOST_COUNTED:
        raise MaskFault(f"no hospitals count together {largest} and {weight}: somebody lies")
    return Whole(largest, weight)


def encode(
    state: State, whole: Whole, client: Counted, shown: Collection[int] | None = None
) -> State:
    """Return what a client adds to the mean as integers (int64), which masks can hide.

    A head's share stands by finding, as a finding may be unknown to any client; rows of findings
    that are not `shown` (all by default) are zeros. Raises MaskFault where its share is none of
    `whole`, or below FLOOR: with shares that round to little or nothing a false `whole` would leave
    the largest client alone in the sum. From FLOOR on rounding moves a share by less than 2^-12 of
    it, and one film has as much as long as all are fewer than 2^30.
    """
    own, (share, known) = WeightedMean(), whole.shares(client)
    if max(share, *known) > ONE:
        raise MaskFault(f"{client.name}: its films are more than all")
    counts = zip((client.weight, *client.known), (share, *known), strict=True)
    if any(count and part < FLOOR for count, part in counts):
        raise MaskFault(f"{client.name}: its films would count next to nothing among so many")
    known = [part * (shown is None or k in shown) for k, part in enumerate(known)]
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
        inside = (share >= 0).all() and (share <= ONE + FILM).all()
        inside = inside and 0 < sums.share <= ONE + FILM
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
    """An executor in which the server sees sums alone; `inner` trains the job's clients.

    Of a finding that fewer than `min_clients` of those in a sum have labels of, nobody sends its
    row of the head, which stays as it was, nor what is counted of it.
    """

    def __init__(self, inner: Replicas, job: Job) -> None:
        self.inner, self.whole = inner, Whole.of(job.clients)
        least = job.settings.min_clients
        if len(job.clients) < least:
            raise InputError(
                f"min_clients={least}, but there are {len(job.clients)} to mask a sum of"
            )
        self.maskers = {c.name: Masker(c.name, job.name, least, {}) for c in job.clients}
        self.introduced, self.findings = {}, len(job.clients[0].known)
        for client in job.clients:
            val = job.validation.where(job.validation.index["client"] == client.name)
            knows = known_rows(client.known, val.known)
            self.introduced[client.name] = self.maskers[client.name].introduce("", knows)

    def pool(self, job: Job, strategy: FedAvg) -> MaskedPool:
        """Return what puts together what `fit` or `measure` will yield next."""
        return MaskedPool(job, strategy, self.whole, self)

    def fit(
        self, clients: list[Client], sent: State, kept: dict[str, State], round: int
    ) -> Iterator[tuple[Update, State]]:
        """Train each client; yield what it sends under masks and what it keeps, in the order."""
        self._open(f"fit {round}", [client.name for client in clients])
        names, rows = {client.name: client for client in clients}, self._shown("train")
        for update, keep in self.inner.fit(clients, sent, kept, round):
            if update.status == "ok":
                numbers = encode(update.state | update.loss, self.whole, names[update.client], rows)
                hidden = {"train_loss": math.nan, "examples": math.nan}
                hidden["state"] = self._mask(update.client, numbers, rows)
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
        names = [client.name for client in job.clients]
        self._open(f"validate {now.round}", names)
        shown = self._shown("val")
        sums = self.inner.validation_sums(job, now, [k % self.findings for k in shown])
        if not sums:
            return math.nan, math.nan
        none = {name: np.zeros_like(value) for name, value in next(iter(sums.values())).items()}
        for name in names:
            own = {k: torch.from_numpy(v) for k, v in sums.get(name, none).items()}
            self.sum.add(name, self._mask(name, own, shown))
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

    def _shown(self, split: str) -> list[int]:
        """Return the rows of a split that enough of those in the open sum know."""
        one = self.sum
        masker = self.maskers[next(iter(one.offers))]
        return masker.common(one.what, one.offers, split_rows(split, self.findings))

    def _mask(self, name: str, numbers: State, rows: list[int] | None = None) -> State:
        """Return what a client sends of its numbers, which show these rows."""
        one = self.sum
        shares = one.shares_for(name)
        return self.maskers[name].mask(
            one.what, [one.what], one.offers, shares, numbers, rows or ()
        )
