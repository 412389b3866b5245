"""A hospital behind Flower: the ClientApp.

What leaves it is written in `answer`, `query`, `fit`, `batchnorm` and `validate`, and nowhere else:
the tracked state, counts, losses, the hospital's name, what its patients were exposed to, and of an
error its kind, not its text.
"""

import dataclasses
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file, save

from ..base.device import find_devices, set_up
from ..base.errors import InputError
from ..base.files import write_atomic
from ..base.scores import auroc, log_loss
from ..base.state import State
from ..client import Client, predict
from ..dataset import ChestXrayDataset, read_report
from ..model import ChestResNet
from ..privacy.ledger import Ledger
from ..run import Model
from ..settings import FIELDS, Settings
from ..training.arms import client_class
from ..training.batchnorm import measure_safely
from ..training.replicas import fit_safely, start_model
from .messages import Answer, pack, trunk_hash, unpack

client_app = ClientApp()


class Hospital:
    """One message at a SuperNode: what the server asks for, and the films that lie here.

    `node_config` says who and where: `name`, and `work_dir` in which notebook 02 has prepared the
    films. Raises InputError where they do not fit the run.
    """

    def __init__(self, order: ConfigRecord, node_config: dict[str, Any]) -> None:
        config = json.loads(order["config"])
        given = Settings(**{key: config[key] for key in FIELDS if key in config})
        here = {"work_dir": node_config["work_dir"], "name": order["run"], "device": "auto"}
        self.order, self.settings = order, dataclasses.replace(given, **here)
        self.name, self.threads = str(node_config["name"]), config["threads"]
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
        """Build the model; raise InputError where its frozen trunk is not the server's."""
        settings = self.settings
        set_up(self.threads, settings.precision)  # before a trunk is calibrated
        model = start_model(settings, settings.seed_list[0])
        if trunk_hash(model) != self.order["trunk"]:
            raise InputError(f"weights={settings.weights!r}: not the trunk of the server")
        return model.place(find_devices(settings.device)[0])

    def client(self) -> Client:
        """Return the client of this hospital, of the class that the settings ask for."""
        seed = self.order.get("seed", self.settings.seed_list[0])
        return client_class(self.settings)(self.name, self.split("train"), self.settings, seed)

    def kept(self, round: int) -> Path:
        """Name the file of what the client keeps after a round, such as SCAFFOLD's variate."""
        return self.settings.run / "kept" / f"s{self.order['seed']}-{round:05d}.safetensors"


def answer(
    message: Message, context: Context, work: Callable[[Hospital, State], Answer]
) -> Message:
    """Do what a message asks and reply; an error's text stays in this hospital's log."""
    words, numbers, state = {"status": "ok", "reason": ""}, {}, {}
    try:
        hospital = Hospital(message.content.config_records["order"], dict(context.node_config))
        sent = unpack(message)
        more, numbers, state = work(hospital, sent)
        words |= more
    except Exception as error:  # its text may hold paths, or the names of films and so of patients
        traceback.print_exc()
        words = {"status": "failed", "reason": f"{type(error).__name__}; see the hospital's log"}
    content = {"words": ConfigRecord(words), "numbers": MetricRecord(numbers)}
    return Message(RecordDict(content | {"state": pack(state)}), reply_to=message)


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this is, and what its update counts in the mean."""
    return answer(
        message,
        context,
        lambda here, _: ({"name": here.name}, {"weight": here.client().weight}, {}),
    )


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this hospital's films from what the server sent."""
    return answer(message, context, fit)


@client_app.train("measure")
def measure(message: Message, context: Context) -> Message:
    """Measure BatchNorm of the new global model on this hospital's films."""
    return answer(message, context, batchnorm)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Judge the aggregated model on this hospital's validation films."""
    return answer(message, context, validate)


def fit(here: Hospital, sent: State) -> Answer:
    """Run the client's `fit` as the simulation does; what the client keeps stays in this hospital.

    The order says after which round an update from here last arrived, so that what was kept beside
    a lost one is never used; what a lost one spent is, by the ledger.
    """
    seed, round, before = (here.order[key] for key in ("seed", "round", "kept"))
    path, client, model = here.kept(before), here.client(), Model("federated", seed).name
    ledger = Ledger(here.settings.run / "ledger.json")
    kept = (load_file(path) if path.is_file() else {}) | ledger.read(model)
    if stop := client.over_budget(kept):
        return {"status": "stopped", "reason": stop}, {}, {}
    update, keep = fit_safely(client, here.model(), sent, kept, round)
    if client.spent:
        ledger.write(model, {name: keep[name] for name in client.spent if name in keep})
    if update.status != "ok":
        print(f"{here.name}, round {round}: {update.reason}", flush=True)
        return {"status": update.status, "reason": update.reason.partition(":")[0]}, {}, {}
    if keep:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(here.kept(round), save(keep))
        for old in set(path.parent.glob(f"s{seed}-*.safetensors")) - {path, here.kept(round)}:
            old.unlink()
    numbers = {"examples": update.examples}
    numbers |= {} if client.withholds_loss else {"train_loss": update.train_loss}
    said = {"account": client.account(keep), "stop": client.over_budget(keep)}
    return {"said": json.dumps(said)} if said["account"] else {}, numbers, update.state


def batchnorm(here: Hospital, sent: State) -> Answer:
    """Return what BatchNorm sees here, as the simulation's clients measure it."""
    measured, fault = measure_safely(here.client(), here.model(), sent, here.order["round"])
    if fault:
        print(f"{here.name}, round {here.order['round']}: {fault}", flush=True)
    words = {"status": "failed", "reason": fault.partition(":")[0]} if fault else {}
    return words, {}, measured


def validate(here: Hospital, sent: State) -> Answer:
    """Return sums: of the loss, of known labels, and for each finding of pairs and ordered pairs.

    A pair is a film with and one without the finding, ordered if the first scores higher (a tie is
    half). Summed over hospitals they give the AUROC within hospitals, and no film's score leaves.
    """
    films, model = here.split("val"), here.model()
    model.load(sent)
    labels, logits = films.labels, predict(model, films)
    known = int((~np.isnan(labels)).sum())
    pairs = [int((column == 1).sum() * (column == 0).sum()) for column in labels.T]
    areas = [auroc(*columns) for columns in zip(labels.T, logits.T, strict=True)]
    ordered = [area * n if n else 0.0 for area, n in zip(areas, pairs, strict=True)]
    loss = log_loss(labels, logits) * known if known else 0.0
    return {}, {"loss": loss, "labels": known, "pairs": pairs, "ordered": ordered}, {}
