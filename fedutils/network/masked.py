"""The server of a run whose hospitals send masked sums."""

import dataclasses
import json
import math
import secrets
from collections.abc import Iterator
from typing import Any

import torch
from flwr.app import Message

from ..base.errors import InputError
from ..base.files import write_atomic
from ..base.fixed import Whole
from ..base.scores import judge
from ..base.state import LOSS, State, find_odd
from ..fedavg import FedAvg
from ..privacy.masks import MaskedSum, MaskFault
from ..rounds import Job, Progress
from ..training.masked import MaskedPool, encode, read_whole
from . import messages
from .messages import Fault, Member
from .roster import check_validated
from .server import Network

WHOLE = "whole.json"  # what all hospitals count together
NOTHING = Whole(1, 1)


class MaskedNetwork(Network):
    """The executor of a run over a network in which the server sees sums alone."""

    whole = NOTHING
    sum: MaskedSum  # which is open
    silent: list[str]  # why some said nothing of it when they were asked last

    def pool(self, job: Job, strategy: FedAvg) -> MaskedPool:
        """Return what puts together what `fit` or `measure` will yield next."""
        return MaskedPool(job, strategy, self.whole, self)

    def gather(self, seconds: float) -> dict[str, dict[str, Any]]:
        """Wait until all hospitals are connected; let them add up, under masks, what they count."""
        counts, path = super().gather(seconds), self.settings.run / WHOLE
        if not path.is_file():
            zero = {name: torch.tensor(0) for name in dataclasses.asdict(NOTHING)}
            why = "not counted under masks: {}"
            found = self.collect("count", "query.count", {n: {} for n in counts}, {}, zero, why)
            found = read_whole(**{name: int(value) for name, value in found.items()})
            write_atomic(path, json.dumps(dataclasses.asdict(found)).encode())
        self.whole = Whole(**json.loads(path.read_text()))
        return counts

    def ask(
        self, kind: str, orders: dict[str, dict[str, Any]], state: State
    ) -> Iterator[tuple[str, Message | Fault]]:
        """Ask as `Network` does; what who has offered no masks for a sum says does not count."""
        bare = kind in ("query.agree", "query.reveal")
        for name, reply in super().ask(kind, orders, state):
            fits = bare or "masks" in orders[name] or isinstance(reply, tuple)
            yield name, reply if fits else ("failed", "it has offered no masks for this sum")

    def validate(self, job: Job, now: Progress) -> tuple[float, float]:
        """Return loss and mean AUROC on the validation films of the hospitals that answer."""
        orders = {c.name: {"seed": job.seed, "round": now.round} for c in job.clients}
        shapes = messages.sum_shapes(len(self.findings)).items()
        zero = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes}
        try:
            found = self.collect("validate", "evaluate", orders, now.state, zero)
        except MaskFault as error:
            print(f"round {now.round}: not validated: {error}", flush=True)
            check_validated(job, now, len(self.sum.survivors), {"": error})
            return math.nan, math.nan
        sums = {name: value.numpy() for name, value in found.items()}
        if not messages.could_be(sums, len(self.findings)):
            print(f"round {now.round}: not validated: the sum is none of any films", flush=True)
            return math.nan, math.nan
        return judge([sums])

    def collect(
        self, kind: str, message: str, orders: dict[str, dict[str, Any]], sent: State,
        wanted: State, all_or_none: str = "",
    ) -> State:  # fmt: skip
        """Ask for one sum of integers, shaped as `wanted`, and take its masks off.

        With `all_or_none`, the message of the InputError for those that are missing, nothing is
        unmasked without them: a sum of another list could not be had later.
        """
        for name, reply in self.ask(message, self.prepare(kind, orders, sent), sent):
            words, _, state = messages.read_reply(reply)
            if fault := words["reason"] or find_odd(state, wanted)[1]:
                print(f"{self.sum.what}: nothing of {name}: {fault}", flush=True)
            else:
                self.sum.add(name, state)
        missing = ", ".join(name for name in sorted(orders) if name not in self.sum.survivors)
        if all_or_none and missing:
            raise InputError(all_or_none.format(missing))
        return self.unmask()

    def prepare(
        self, kind: str, orders: dict[str, dict[str, Any]], sent: State
    ) -> dict[str, dict[str, Any]]:
        """Let hospitals offer keys for a sum; return their orders with what masks want of each."""
        self.discover()
        members = sorted(name for name in orders if name in self.nodes)
        masks = {"whole": list(dataclasses.astuple(self.whole)), "members": members}
        masks["nonce"] = secrets.token_hex(16)
        name = self.parcel(sent).hash if sent else ""
        about = {"kind": kind, "hash": name, "masks": json.dumps(masks)}
        about["introduced"] = json.dumps({name: self.introduced[name] for name in members})
        heard = self.hear("offer", {name: orders[name] | about for name in members})
        faults = {name: messages.offer_fault(said, members) for name, said in heard.items()}
        whats = [said["what"] for name, said in heard.items() if not faults[name]]
        what = max(set(whats), key=whats.count, default=kind)
        for name, said in heard.items():
            if fault := faults[name] or (
                "is asked for another sum" if said["what"] != what else ""
            ):
                print(f"{what}: {name} offers no mask: {fault}", flush=True)
        good = {n: said for n, said in heard.items() if not faults[n] and said["what"] == what}
        for said in good.values():  # and nothing else that somebody may have put there
            said["offer"] = {key: said["offer"][key] for key in messages.OFFER}
        self.sum = MaskedSum(what, good, len(members))
        masks["offers"] = self.sum.offers
        mine = {n: json.dumps(masks | {"shares": self.sum.shares_for(n)}) for n in good}
        return {n: order | ({"masks": mine[n]} if n in mine else {}) for n, order in orders.items()}

    def expect(self, state: State, member: Member, withheld: bool = False) -> State:
        """Return what a hospital is to send of a state: the integers of a sum."""
        loss = {} if withheld else {LOSS: torch.zeros((), dtype=torch.float64)}
        return encode(state | loss, self.whole, member)

    def unmask(self) -> State:
        """Return the open sum, by the shares of those whose numbers are in it."""
        one = self.sum
        if len(one.survivors) < self.settings.min_clients:
            raise MaskFault(
                f"{one.what}: too few for a sum: {', '.join(one.survivors) or 'nobody'}"
            )
        about = {"what": one.what, "survivors": json.dumps(one.survivors)}
        heard = self.hear("agree", dict.fromkeys(one.survivors, about))
        signed = {n: s["signature"] for n, s in heard.items() if messages.is_text(s, "signature")}
        if len(signed) < one.enough:
            raise MaskFault(f"too few agree on a list: {'; '.join(self.silent) or 'nobody'}")
        about = {"what": one.what, "signatures": json.dumps(signed)}
        revealed = self.hear("reveal", dict.fromkeys(signed, about))
        names = list(one.offers)
        return one.finish({n: s for n, s in revealed.items() if messages.is_text(s, *names)})

    def hear(self, kind: str, orders: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Ask hospitals about a sum; return what each says, and print why one says nothing."""
        heard, self.silent = {}, []
        for name, reply in self.ask(f"query.{kind}", orders, {}):
            words, _, _ = messages.read_reply(reply)
            heard[name], fault = messages.read_json(words)
            if fault:
                print(f"no {kind} of {name}: {fault}", flush=True)
                self.silent.append(f"{name}: {fault}")
                del heard[name]
        return heard
