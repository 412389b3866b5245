"""The server of a run whose hospitals send masked sums."""

import dataclasses
import json
import secrets
from typing import Any

import torch

from ..base.files import write_atomic
from ..base.fixed import Whole
from ..base.scores import judge
from ..base.state import State
from ..client import LOSS
from ..fedavg import FedAvg
from ..privacy.masks import MaskedSum, MaskFault
from ..rounds import Job, Progress
from ..training.masked import MaskedPool, encode
from . import messages
from .messages import Member
from .server import Network

WHOLE = "whole.json"  # what all hospitals count together
NOTHING = Whole(1, 1)


class MaskedNetwork(Network):
    """The executor of a run over a network in which the server sees sums alone."""

    whole = NOTHING
    sum: MaskedSum  # which is open

    def pool(self, job: Job, strategy: FedAvg) -> MaskedPool:
        """Return what puts together what `fit` or `measure` will yield next."""
        return MaskedPool(job, strategy, self.whole, self)

    def gather(self, seconds: float) -> dict[str, dict[str, Any]]:
        """Wait until all hospitals are connected; let them add up, under masks, what they count."""
        counts, path = super().gather(seconds), self.settings.run / WHOLE
        if not path.is_file():
            zero = {name: torch.tensor(0) for name in dataclasses.asdict(NOTHING)}
            found = self.collect("count", "query.count", {name: {} for name in counts}, {}, zero)
            write_atomic(path, json.dumps({k: int(v) for k, v in found.items()}).encode())
        self.whole = Whole(**json.loads(path.read_text()))
        return counts

    def validate(self, job: Job, now: Progress) -> tuple[float, float]:
        """Return loss and mean AUROC on the validation films of the hospitals that answer."""
        orders = {c.name: {"seed": job.seed, "round": now.round} for c in job.clients}
        zero = {
            name: torch.zeros(shape, dtype=torch.int64)
            for name, shape in messages.sum_shapes(len(self.findings)).items()
        }
        found = self.collect("validate", "evaluate", orders, now.state, zero)
        return judge([{name: value.numpy() for name, value in found.items()}])

    def collect(
        self, kind: str, message: str, orders: dict[str, dict[str, Any]], sent: State, wanted: State
    ) -> State:
        """Ask for one sum of integers, shaped as `wanted`, and take its masks off."""
        for name, reply in self.ask(message, self.prepare(kind, orders), sent):
            words, _, state = messages.read_reply(reply)
            fault = (
                words["reason"] if words["status"] != "ok" else messages.misfit(state, wanted)[1]
            )
            if fault:
                print(f"{self.sum.what}: nothing of {name}: {fault}", flush=True)
            else:
                self.sum.add(name, state)
        return self.unmask()

    def prepare(self, kind: str, orders: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Let hospitals offer keys for a sum; return their orders with what masks want of each."""
        what = f"{kind} {secrets.token_hex(8)}"
        members = {name: self.introduced[name] for name in orders if name in self.introduced}
        self.sum = MaskedSum(what, self.hear("offer", members, what, {"members": members}))
        whole = list(dataclasses.astuple(self.whole))
        masks = {
            name: {"what": what, "offers": self.sum.offers, "whole": whole}
            | {"shares": self.sum.shares_for(name)}
            for name in self.sum.offers
        }
        return {
            name: order | ({"masks": json.dumps(masks[name])} if name in masks else {})
            for name, order in orders.items()
        }

    def expect(self, state: State, member: Member, withheld: bool = False) -> State:
        """Return what a hospital is to send of a state: the integers of a sum."""
        loss = {} if withheld else {LOSS: torch.zeros((), dtype=torch.float64)}
        return encode(state | loss, self.whole, member)

    def unmask(self) -> State:
        """Return the open sum, by the shares of those whose numbers are in it."""
        one = self.sum
        if len(one.survivors) < self.settings.min_clients:
            there = ", ".join(one.survivors) or "nobody"
            raise MaskFault(f"{one.what}: too few for a sum: {there}")
        revealed = self.hear("reveal", one.survivors, one.what, {"survivors": one.survivors})
        return one.finish(revealed)

    def hear(self, kind: str, names: Any, what: str, about: dict[str, Any]) -> dict[str, Any]:
        """Ask hospitals about a sum; return what each says, and print why one says nothing."""
        order = {"what": what} | {key: json.dumps(value) for key, value in about.items()}
        heard = {}
        for name, reply in self.ask(f"query.{kind}", dict.fromkeys(names, order), {}):
            words, _, _ = messages.read_reply(reply)
            heard[name], fault = messages.read_json(words)
            if fault:
                print(f"{what}: no {kind} of {name}: {fault}", flush=True)
                del heard[name]
        return heard
