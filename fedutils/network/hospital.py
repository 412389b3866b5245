"""A hospital behind Flower and its films: all that ever leaves it but keys and shares of masks.

The tracked state, counts, losses, the hospital's name and findings, what its patients were exposed
to, and of an error its kind, not its text. Under masks of the first three only sums are told.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord
from safetensors.torch import load_file, save

from ..base.device import find_devices, set_up
from ..base.errors import InputError
from ..base.files import write_atomic
from ..base.findings import SPLITS
from ..base.fixed import Whole
from ..base.provenance import code_hash
from ..base.scores import only_of, validation_sums
from ..base.state import State, find_odd, is_beside, state_hash
from ..client import Client, predict
from ..dataset import ChestXrayDataset, read_report
from ..evidence.pooled import Plan, Sums, draw_sums, grid_sums, span_sums
from ..model import ChestResNet
from ..privacy.ledger import note_open
from ..privacy.masks import MaskFault
from ..training.arms import client_class
from ..training.batchnorm import measure_safely
from ..training.checkpoint import KEPT_ROUNDS
from ..training.halfway import Halfway
from ..training.masked import encode, known_rows, read_whole, split_rows
from ..training.replicas import fit_safely, start_model
from .demands import read_run_settings
from .messages import LOST, SEPARATOR, Answer, pack, trunk_hash, unpack
from .site import Content, Site, answer, name_sum

KEPT = KEPT_ROUNDS + 2  # files of what a client keeps


class Hospital(Site):
    """One message about films that lie here; InputError where they do not fit what it asks."""

    def __init__(self, order: ConfigRecord, node: dict[str, Any]) -> None:
        super().__init__(order, node)
        self.settings = read_run_settings(self.config, order["run"], node)
        self.rows: list[int] = []  # of `known_rows`, what a sum will show
        self.weights = ""  # the hash of the parameters that came
        prepared = self.settings.prepared
        for key in ("image_size", "seed"):
            found, wanted = read_report(prepared)[key], getattr(self.settings, key)
            if found != wanted:
                raise InputError(f"{prepared} has {key}={found}, the run {wanted}: repeat 02")
        self.films = ChestXrayDataset(prepared)

    def split(self, name: str) -> ChestXrayDataset:
        """Return the films of a split."""
        return self.films.where(self.films.index["split"] == name)

    def model(self) -> ChestResNet:
        """Build the model; InputError where its frozen trunk is not the server's."""
        settings = self.settings
        set_up(self.config["threads"], settings.precision)  # before a trunk is calibrated
        model = start_model(settings, settings.seed_list[0], len(self.films.findings))
        if trunk_hash(model) != self.order["trunk"]:
            raise InputError(f"weights={settings.weights!r}: not the trunk of the server")
        return model.place(find_devices(settings.device)[0])

    def model_for(self, sent: State, beside: bool = False) -> ChestResNet:
        """Build the model for a state that came; InputError where that is not the whole of it.

        What a strategy sends `beside` may come with it.
        """
        model = self.model()
        plain = {name: value for name, value in sent.items() if not (beside and is_beside(name))}
        if fault := find_odd(plain, model.tracked_state())[1]:
            raise InputError(f"the state that came is not the whole of what is tracked: {fault}")
        named = {name: plain[name] for name, _ in model.named_parameters() if name in plain}
        self.weights = state_hash(named)
        return model

    def shown(self, kind: str, split: str) -> list[int]:
        """Return the findings of which enough hospitals in a sum have labels in a split."""
        count = len(self.films.findings)
        if "masks" not in self.order:
            raise MaskFault(f"{kind}: the offer of {self.name} did not arrive")
        offers, what = self.masks["offers"], self.sum_asked_for(kind)
        rows = self.masker().common(what, offers, split_rows(split, count))
        self.rows += rows
        return [row % count for row in rows]

    def labels(self, kind: str, split: str) -> np.ndarray:
        """Return a split's labels, as far as a masked sum may show them."""
        return only_of(self.split(split).labels, self.shown(kind, split))

    def judge(self, kind: str, sent: State, split: str) -> tuple[np.ndarray, ...]:
        """Return of a split's films labels (n, k), a model's probabilities (n, k), and patients.

        No films where none of their labels may be shown.
        """
        films, labels, model = self.split(split), self.labels(kind, split), self.model_for(sent)
        model.load(sent)
        chances = 1 / (1 + np.exp(-predict(model, films).astype(np.float64)))
        some = slice(None if self.shown(kind, split) else 0)
        return labels[some], chances[some], films.index["patient_id"].to_numpy()[some]

    def client(self) -> Client:
        """Return the client of this hospital, of the class that the settings ask for."""
        seed = self.order.get("seed", self.settings.seed_list[0])
        return client_class(self.settings)(self.name, self.split("train"), self.settings, seed)

    def numbers_asked_for(self, kind: str) -> list[str]:
        """Return two names of what goes into a sum: of this run, and in whichever run it is.

        Neither knows the parameters of training or BatchNorm's state, of which another value might
        give the same numbers: those of the same weights, seed and round are for one list alone.
        """
        when = [] if kind == "count" else [self.asked["seed"], self.asked["round"]]
        names = [name_sum(kind, [self.run_key, *when])]
        if kind != "count":
            when = when if kind in ("fit", "measure") else []
            names.append(name_sum(kind, [self.order["trunk"], self.weights, *when]))
        return names

    def hide(self, kind: str, numbers: State) -> State:
        """Return integers under the masks of the sum that the order names."""
        if "masks" not in self.order:
            raise MaskFault(f"{kind}: the offer of {self.name} did not arrive")
        masks, what, called = self.masks, self.sum_asked_for(kind), self.numbers_asked_for(kind)
        with self.masking() as masker:
            if kind in ("fit", "measure"):
                masker.hold(f"whole of {self.run_key}", masks["whole"])
            return masker.mask(what, called, masks["offers"], masks["shares"], numbers, self.rows)

    def encoded(self, kind: str, state: State, client: Client) -> State:
        """Return what leaves of a state: all of it, or under masks what the client adds up."""
        if not self.settings.secure_aggregation:
            return state
        shown = self.shown(kind, "train") if kind == "fit" else []
        return self.hide(kind, encode(state, read_whole(*self.masks["whole"]), client, shown))

    def receive(self, sent: State) -> State | None:
        """Return the state that a message is about; None where what it builds on is not here.

        One that came whole is kept, for the next messages to build on. Raises InputError for
        another state than the message names.
        """
        base, new = (self.order.get(key, "") for key in ("base", "hash"))
        if not sent and not base and not new:
            return sent
        for name in filter(None, (base, new)):
            if not re.fullmatch(r"[0-9a-f]{64}", name):
                raise InputError("a state is named by its hash")
        folder = self.settings.run / "sent"
        if base:
            path = folder / f"{base}.safetensors"
            state = load_file(path) | sent if path.is_file() else {}
            return state if state_hash(state) == new else None
        if state_hash(sent) != new:
            raise InputError("the state is not the one that the message names")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / f"{new}.safetensors", save(sent))
            for old in set(folder.glob("*.safetensors")) - {folder / f"{new}.safetensors"}:
                old.unlink()
        except (OSError, InputError) as error:  # then the next message comes whole, too
            print(f"{folder}: {error}", flush=True)
        return sent

    def halfway(self, kept: State) -> Halfway:
        """Return what keeps the client's progress inside the round that it is asked for."""
        films = read_report(self.settings.prepared)["fingerprint"]
        about = [self.run_key, self.asked, state_hash(kept), films, code_hash(), torch.__version__]
        return Halfway(self.settings.run / "halfway", about)

    def kept(self, round: int) -> Path:
        """Name the file of what the client keeps after a round, such as SCAFFOLD's variate."""
        return self.settings.run / "kept" / f"s{self.order['seed']}-{round:05d}.safetensors"

    def load_kept(self, before: int, round: int) -> State:
        """Return what was kept after an earlier round; InputError where only newer is here.

        Then the message is an old one that came again, or the server has lost too many rounds.
        """
        path = self.kept(before)
        if path.is_file():
            return load_file(path)
        if before and any(newer > self.kept(round) for newer in self.all_kept()):
            raise InputError(f"{path} is no longer here: round {round} was over long ago")
        return {}

    def all_kept(self) -> list[Path]:
        """List what is kept of this seed, by round."""
        return sorted(self.kept(0).parent.glob(f"s{self.order['seed']}-*.safetensors"))

    def keep(self, keep: State, before: int, round: int) -> None:
        """Write what the client keeps after a round, and drop what no server can go back to.

        That writes a round while the next one trains, and keeps one more. An old message that comes
        again drops nothing newer.
        """
        path = self.kept(round)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(keep))
        upto = [one for one in self.all_kept() if one <= path and one != self.kept(before)]
        for old in upto[:-KEPT]:
            old.unlink(missing_ok=True)


def answers(work: Callable[[Hospital, State], Answer]) -> Callable[[Message, Context], Message]:
    """Let a function do what a message asks of this hospital's films, and reply."""

    @functools.wraps(work)
    def reply(message: Message, context: Context) -> Message:
        """Reply with what the work says; or ask for the whole state, where it builds on another."""

        def there(order: ConfigRecord, node: dict[str, Any]) -> tuple[dict[str, str], Content]:
            """Return words, numbers and tensors."""
            hospital = Hospital(order, node)
            sent = hospital.receive(unpack(message))
            if sent is None:
                return {"status": LOST}, {}
            words, numbers, state = work(hospital, sent)
            return words, {"numbers": MetricRecord(numbers), "state": pack(state)}

        return answer(message, context, there)

    return reply


@answers
def introduce(here: Hospital, sent: State) -> Answer:
    """Say who this is, which findings it knows, and what its update counts in the mean.

    Of which findings it has labels it says at any rate, by split, for masked sums; under masks only
    that it counts: how much, the server learns of all together.
    """
    client = here.client()
    knows = known_rows(client.known, *(here.split(name).known for name in SPLITS[1:]))
    words = {"name": here.name, "findings": SEPARATOR.join(here.films.findings)}
    with here.masking() as masker:
        words["introduction"] = json.dumps(masker.introduce(here.node["node"], knows))
    if here.settings.secure_aggregation:
        return words, {"weight": 1, "known": [1] * len(here.films.findings)}, {}
    return words, {"weight": client.weight, "known": client.known}, {}


@answers
def count(here: Hospital, sent: State) -> Answer:
    """Return under masks what this hospital counts, so that shares of all films can be told."""
    numbers = dataclasses.asdict(Whole.of([here.client()]))
    return {}, {}, here.hide("count", {name: torch.tensor(n) for name, n in numbers.items()})


@answers
def fit(here: Hospital, sent: State) -> Answer:
    """Run the client's `fit` as the simulation does; what the client keeps stays in this hospital.

    What was kept beside a lost update is never used; what that spent is, by the ledger.
    """
    seed, round, before = (here.order[key] for key in ("seed", "round", "kept"))
    client = here.client()
    about = f"{here.run_key} s{seed}"
    work = Path(here.settings.work_dir)
    client.keep_ledger(work, about, always=True)
    if client.mechanism == "off":
        note_open(work, about, client.name, client.films.index["patient_id"])
    kept = here.load_kept(before, round)
    if stop := client.over_budget(kept):
        return {"status": "stopped", "reason": stop}, {}, {}
    client.halfway = here.halfway(kept)
    update, keep = fit_safely(client, here.model_for(sent, beside=True), sent, kept, round)
    if update.status != "ok":
        print(f"{here.name}, round {round}: {update.reason}", flush=True)
        reason = "" if here.settings.secure_aggregation else update.reason.partition(":")[0]
        return {"status": update.status, "reason": reason}, {}, {}
    if keep:
        here.keep(keep, before, round)
    numbers = {"examples": update.examples}
    numbers |= {} if client.withholds_loss else {"train_loss": update.train_loss}
    said = {"account": client.account(keep), "stop": client.over_budget(keep)}
    words, state = {"said": json.dumps(said)} if said["account"] else {}, update.state
    if here.settings.secure_aggregation:
        return words, {}, here.encoded("fit", state | update.loss, client)
    return words, numbers, state


@answers
def batchnorm(here: Hospital, sent: State) -> Answer:
    """Return what BatchNorm sees here, as the simulation's clients measure it."""
    client = here.client()
    if client.withholds_loss or here.settings.batchnorm != "precise":
        return {"status": "failed", "reason": "BatchNorm of this run stays here"}, {}, {}
    measured, fault = measure_safely(client, here.model_for(sent), sent, here.order["round"])
    if fault:
        print(f"{here.name}, round {here.order['round']}: {fault}", flush=True)
        reason = "its films" if here.settings.secure_aggregation else fault.partition(":")[0]
        return {"status": "failed", "reason": reason}, {}, {}
    return {}, {}, here.encoded("measure", measured, client)


@answers
def validate(here: Hospital, sent: State) -> Answer:
    """Return the sums of the films for validation, as the simulation adds them up."""
    here.halfway({})  # which drops what is left of a round that is over
    films, model, hidden = here.split("val"), here.model_for(sent), here.settings.secure_aggregation
    model.load(sent)
    labels = here.labels("validate", "val") if hidden else films.labels
    sums = validation_sums(labels, predict(model, films))
    if hidden:
        numbers = {name: torch.from_numpy(value) for name, value in sums.items()}
        return {}, {}, here.hide("validate", numbers)
    return {}, {name: value.tolist() for name, value in sums.items()}, {}


def counts(kind: str, work: Callable[[Hospital, State], Sums]) -> Callable[..., Message]:
    """Let a function count this hospital's films for a step of a test, and send it under masks."""

    def count(here: Hospital, sent: State) -> Answer:
        """Answer with whole numbers that add up to what is asked."""
        sums = {name: torch.from_numpy(value) for name, value in work(here, sent).items()}
        return {}, {}, here.hide(kind, sums)

    return answers(count)


@functools.partial(counts, "span")
def count_span(here: Hospital, sent: State) -> Sums:
    """Count films for validation by where a model's scores lie."""
    return span_sums(*here.judge("span", sent, "val"))


@functools.partial(counts, "grid")
def count_grid(here: Hospital, sent: State) -> Sums:
    """Count films for validation and test on a grid of a model's scores."""
    val, test = (here.judge("grid", sent, split) for split in SPLITS[1:])
    return grid_sums(here.labels("grid", "train"), val, test, json.loads(here.order["plan"]))


@functools.partial(counts, "draws")
def count_draws(here: Hospital, sent: State) -> Sums:
    """Count the resamples of test films, and what a model errs in them."""
    plan = Plan(**json.loads(here.order["plan"]))
    return draw_sums(*here.judge("draws", sent, "test"), plan, here.settings.seed)
