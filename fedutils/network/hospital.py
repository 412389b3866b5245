"""A hospital behind Flower: the ClientApp, with all that ever leaves a hospital.

The tracked state, counts, losses, the hospital's name and findings, what its patients were exposed
to, and of an error its kind, not its text.
"""

import dataclasses
import functools
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file, save

from ..base.device import find_devices, set_up
from ..base.errors import InputError
from ..base.files import sha256, write_atomic
from ..base.scores import validation_sums
from ..base.state import State
from ..client import Client, predict
from ..dataset import ChestXrayDataset, read_report
from ..model import ChestResNet
from ..privacy.ledger import note_open
from ..settings import FIELDS, Settings
from ..training.arms import client_class
from ..training.batchnorm import measure_safely
from ..training.replicas import fit_safely, start_model
from .messages import LOST, SEPARATOR, Answer, pack, trunk_hash, unpack

client_app = ClientApp()


class Hospital:
    """One message at a SuperNode, and the films that lie here; InputError where they do not fit.

    `node_config` has its `name`, the `work_dir` in which notebook 02 prepared the films, and maybe
    a `device`, and `weights`: its own copy of the file that the server starts from.
    """

    def __init__(self, order: ConfigRecord, node_config: dict[str, Any]) -> None:
        config = json.loads(order["config"])
        given = Settings(**{key: config[key] for key in FIELDS if key in config})
        here = {"work_dir": node_config["work_dir"], "name": order["run"]}
        here["device"] = node_config.get("device", "auto")
        if "weights" in node_config and given.weights != "none":
            here["weights"] = node_config["weights"]
        self.order, self.settings = order, dataclasses.replace(given, **here)
        self.name, self.threads = str(node_config["name"]), config["threads"]
        known = json.dumps(config | {"total_epsilon": 0})  # a limit is no part of what is trained
        self.run_key = f"{order['run']} {sha256(known.encode())[:16]}"
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
        model = start_model(settings, settings.seed_list[0], len(self.films.findings))
        if trunk_hash(model) != self.order["trunk"]:
            raise InputError(f"weights={settings.weights!r}: not the trunk of the server")
        return model.place(find_devices(settings.device)[0])

    def client(self) -> Client:
        """Return the client of this hospital, of the class that the settings ask for."""
        seed = self.order.get("seed", self.settings.seed_list[0])
        return client_class(self.settings)(self.name, self.split("train"), self.settings, seed)

    def receive(self, sent: State) -> State | None:
        """Return the state that a message is about; None where what it builds on is not here.

        One that came whole is kept, for the next messages to build on.
        """
        base, new = (self.order.get(key) for key in ("base", "hash"))
        folder = self.settings.run / "sent"
        if base:
            path = folder / f"{base}.safetensors"
            return load_file(path) | sent if path.is_file() else None
        if new:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("*.safetensors"):
                old.unlink()
            write_atomic(folder / f"{new}.safetensors", save(sent))
        return sent

    def kept(self, round: int) -> Path:
        """Name the file of what the client keeps after a round, such as SCAFFOLD's variate."""
        return self.settings.run / "kept" / f"s{self.order['seed']}-{round:05d}.safetensors"


def answers(work: Callable[[Hospital, State], Answer]) -> Callable[[Message, Context], Message]:
    """Let a function do what a message asks, and reply; an error's text stays in this hospital."""

    @functools.wraps(work)
    def answer(message: Message, context: Context) -> Message:
        """Reply with what the work says, or with the kind of its error."""
        words, numbers, state = {"status": "ok", "reason": ""}, {}, {}
        try:
            hospital = Hospital(message.content.config_records["order"], dict(context.node_config))
            sent = hospital.receive(unpack(message))
            if sent is None:
                words["status"] = LOST
            else:
                more, numbers, state = work(hospital, sent)
                words |= more
        except Exception as error:  # its text may hold paths, or names of films and so of patients
            traceback.print_exc()
            reason = f"{type(error).__name__}; see the hospital's log"
            words = {"status": "failed", "reason": reason}
        content = {"words": ConfigRecord(words), "numbers": MetricRecord(numbers)}
        return Message(RecordDict(content | {"state": pack(state)}), reply_to=message)

    return answer


@client_app.query()
@answers
def query(here: Hospital, sent: State) -> Answer:
    """Say who this is, which findings it knows, and what its update counts in the mean."""
    client = here.client()
    words = {"name": here.name, "findings": SEPARATOR.join(here.films.findings)}
    return words, {"weight": client.weight, "known": client.known}, {}


@client_app.train()
@answers
def fit(here: Hospital, sent: State) -> Answer:
    """Run the client's `fit` as the simulation does; what the client keeps stays in this hospital.

    What was kept beside a lost update is never used; what that spent is, by the ledger.
    """
    seed, round, before = (here.order[key] for key in ("seed", "round", "kept"))
    path, client = here.kept(before), here.client()
    about = f"{here.run_key} s{seed}"
    work = Path(here.settings.work_dir)
    client.keep_ledger(work, about, always=True)
    if client.mechanism == "off":
        note_open(work, about, client.name, client.films.index["patient_id"])
    kept = load_file(path) if path.is_file() else {}
    if stop := client.over_budget(kept):
        return {"status": "stopped", "reason": stop}, {}, {}
    update, keep = fit_safely(client, here.model(), sent, kept, round)
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


@client_app.train("measure")
@answers
def batchnorm(here: Hospital, sent: State) -> Answer:
    """Return what BatchNorm sees here, as the simulation's clients measure it."""
    client = here.client()
    if client.withholds_loss or here.settings.batchnorm != "precise":
        return {"status": "failed", "reason": "BatchNorm of this run stays here"}, {}, {}
    measured, fault = measure_safely(client, here.model(), sent, here.order["round"])
    if fault:
        print(f"{here.name}, round {here.order['round']}: {fault}", flush=True)
    words = {"status": "failed", "reason": fault.partition(":")[0]} if fault else {}
    return words, {}, measured


@client_app.evaluate()
@answers
def validate(here: Hospital, sent: State) -> Answer:
    """Return the sums of the films for validation, as the simulation adds them up."""
    films, model = here.split("val"), here.model()
    model.load(sent)
    sums = validation_sums(films.labels, predict(model, films))
    return {}, {name: value.tolist() for name, value in sums.items()}, {}
