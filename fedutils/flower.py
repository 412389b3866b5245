"""The same client and the same round loop over a real network, with Flower (extra `flower`).

The ClientApp wraps `Client`, the ServerApp runs `Training`: only the way of an update is another.
What leaves a hospital is written in `answer`, `query`, `fit` and `validate`, and nowhere else: the
tracked state, counts, losses, the hospital's name, and of an error its kind, not its text.
"""

import dataclasses
import json
import math
import shlex
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import load, load_file, save

from .batchnorm import MEAN, VARIANCE
from .checkpoint import Progress
from .client import Client, Update, predict
from .device import find_devices, set_up
from .federation import (
    Job,
    Replicas,
    Row,
    Training,
    arm_settings,
    fit_safely,
    measure_safely,
    non_finite,
)
from .findings import InputError
from .images import ChestXrayDataset, read_report, write_atomic
from .metrics import auroc, log_loss
from .model import ChestResNet, build_resnet34
from .settings import TYPES, Settings, convert, read_parameters
from .weights import State, state_hash

POLL = 0.5  # seconds between two looks for a reply

client_app = ClientApp()
server_app = ServerApp()
Answer = tuple[dict[str, str], dict[str, Any], State]  # words, numbers, tensors
Fault = tuple[str, str]  # status and reason, as the history has them


class Hospital:
    """One message at a SuperNode: what the server asks for, and the films that lie here.

    `node_config` says who and where: `name`, and `work_dir` in which notebook 02 has prepared the
    films. Raises InputError where they do not fit the run.
    """

    def __init__(self, order: ConfigRecord, node_config: dict[str, Any]) -> None:
        config = json.loads(order["config"])
        given = Settings(**{key: config[key] for key in TYPES if key in config})
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
        how, precision = self.settings, self.settings.precision
        set_up(self.threads, precision)  # before a trunk is calibrated
        built = how.weights, how.tracked, how.batchnorm, how.seed_list[0]
        model = build_resnet34(*built, precision=precision)
        if trunk_hash(model) != self.order["trunk"]:
            raise InputError(f"weights={how.weights!r}: not the trunk of the server")
        return model.place(find_devices(how.device)[0])

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
    """Say who this is and how many training films lie here."""
    return answer(
        message,
        context,
        lambda here, _: ({"name": here.name}, {"films": len(here.split("train"))}, {}),
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
    """Run `Client.fit` as the simulation does; what the client keeps is kept in this hospital.

    The order says after which round an update from here last arrived, so that what was kept beside
    a lost one is never used.
    """
    seed, round, before = (here.order[key] for key in ("seed", "round", "kept"))
    path = here.kept(before)
    kept = load_file(path) if path.is_file() else {}
    client = Client(here.name, here.split("train"), here.settings, seed)
    update, keep = fit_safely(client, here.model(), sent, kept, round)
    if update.status != "ok":
        print(f"{here.name}, round {round}: {update.reason}", flush=True)
        return {"status": update.status, "reason": update.reason.partition(":")[0]}, {}, {}
    if keep:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(here.kept(round), save(keep))
        for old in set(path.parent.glob(f"s{seed}-*.safetensors")) - {path, here.kept(round)}:
            old.unlink()
    return {}, {"examples": update.examples, "train_loss": update.train_loss}, update.state


def batchnorm(here: Hospital, sent: State) -> Answer:
    """Return what BatchNorm sees here, as the simulation's clients measure it."""
    client = Client(here.name, here.split("train"), here.settings, here.order["seed"])
    measured, fault = measure_safely(client, here.model(), sent, here.order["round"])
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


def pack(state: State) -> ArrayRecord:
    """Pack a state as one array of bytes: Flower takes two requests for each array it sends."""
    return ArrayRecord({"state": Array(np.frombuffer(save(state), np.uint8))})


def unpack(message: Message) -> State:
    """Return the state in a message, with the bits and dtypes that were packed."""
    return load(message.content.array_records["state"]["state"].numpy().tobytes())


def trunk_hash(model: ChestResNet) -> str:
    """Return the hash of what is frozen, which never travels and must be the same everywhere."""
    return state_hash({k: v for k, v in model.state_dict().items() if not model.is_tracked(k)})


class Network(Replicas):
    """Stands where the simulation has its replicas: the hospitals behind a Flower grid.

    `films` has the number of training films of each hospital that ever connected, `nodes` the
    SuperNodes of those that are connected now.
    """

    def __init__(self, grid: Grid, settings: Settings) -> None:
        super().__init__([], 1)
        self.grid, self.settings = grid, settings
        self.config: dict[str, Any] = {}
        self.trunk = ""
        self.nodes: dict[str, int] = {}
        self.films: dict[str, int] = {}
        self.asked: dict[int, str] = {}  # SuperNodes ever seen, and their open query

    def fit(
        self, clients: list[Client], sent: State, kept: dict[str, State], round: int
    ) -> Iterator[tuple[Update, State]]:
        """Let the hospitals train; yield updates in the order given, whoever replies first.

        What a client keeps stays with it: here it is only the round after which it was kept.
        """
        began, about = time.perf_counter(), {"seed": clients[0].seed, "round": round}
        after = {c.name: int(kept.get(c.name, {}).get("round", 0)) for c in clients}
        orders = {name: about | {"kept": before} for name, before in after.items()}
        for name, reply in self.ask("train", orders, sent):
            update = read_update(name, reply, sent)
            took = time.perf_counter() - began
            yield dataclasses.replace(update, seconds=took), {"round": torch.tensor(round)}

    def measure(
        self, clients: list[Client], state: State, round: int
    ) -> Iterator[tuple[State, str]]:
        """Let the hospitals measure BatchNorm; yield that, or why not, in the order given."""
        orders = {c.name: {"seed": c.seed, "round": round} for c in clients}
        wanted = {k: v for k, v in state.items() if k.endswith((MEAN, VARIANCE))}
        for _, reply in self.ask("train.measure", orders, state):
            words, _, measured = read_reply(reply)
            fault = words["reason"] if words["status"] != "ok" else find_misfit(measured, wanted)
            yield ({}, fault) if fault else (measured, "")

    def validate(self, job: Job, now: Progress) -> tuple[float, float]:
        """Return loss and mean AUROC over the validation films of the hospitals that answer."""
        about = {"seed": job.seed, "round": now.round}
        sums = {"loss": 0.0, "labels": 0, "pairs": np.zeros(1), "ordered": np.zeros(1)}
        for name, reply in self.ask("evaluate", {c.name: about for c in job.clients}, now.state):
            try:
                words, numbers, _ = read_reply(reply)
                if words["status"] != "ok":
                    raise ValueError(words["reason"])
                sums = {key: np.add(value, numbers[key]) for key, value in sums.items()}
            except (ValueError, KeyError, TypeError) as error:
                print(f"round {now.round}: not validated at {name}: {error}", flush=True)
        shares = (sums["ordered"] / np.where(sums["pairs"], sums["pairs"], np.nan)).tolist()
        defined = [share for share in shares if not math.isnan(share)]
        loss = float(sums["loss"] / sums["labels"]) if sums["labels"] else math.nan
        return loss, float(np.mean(defined)) if defined else math.nan

    def ask(
        self, kind: str, orders: dict[str, dict[str, int]], state: State
    ) -> Iterator[tuple[str, Message | Fault]]:
        """Send each hospital its order; yield the replies in the order of `orders`.

        Replies that come before their turn wait in the SuperLink, one at a time is in memory here.
        """
        self.discover()
        record, there = pack(state), [name for name in orders if name in self.nodes]
        messages = [self.message(kind, self.nodes[n], orders[n], record) for n in there]
        ids = dict(zip(there, self.grid.push_messages(messages), strict=True))
        limit = self.settings.client_seconds
        end = time.monotonic() + (limit or math.inf)
        for name in orders:
            reply = self.wait(ids[name], end) if name in ids else ("failed", "not connected")
            yield name, reply or ("late", f"no reply in {limit:g} s")

    def wait(self, message_id: str, end: float) -> Message | None:
        """Return the reply to a message; None if there is none at the end."""
        while True:
            if replies := list(self.grid.pull_messages([message_id])):
                return replies[0]
            if time.monotonic() > end:
                return None
            time.sleep(POLL)

    def message(self, kind: str, node: int, about: dict[str, int], state: ArrayRecord) -> Message:
        """Write a message: the order with the run's parameters, and the state."""
        order = about | {"config": json.dumps(self.config), "trunk": self.trunk}
        content = {"order": ConfigRecord(order | {"run": self.settings.name}), "state": state}
        group = str(about.get("round", 0))
        return Message(RecordDict(content), node, kind, group_id=group)

    def discover(self) -> None:
        """Ask SuperNodes that are new who they are, and forget those that have gone; never waits.

        A SuperNode that comes back is a new one, and takes its hospital's place.
        """
        online = set(self.grid.get_node_ids())
        self.nodes = {name: node for name, node in self.nodes.items() if node in online}
        new = sorted(online - self.asked.keys())
        queries = [self.message("query", node, {}, pack({})) for node in new]
        self.asked |= dict(zip(new, self.grid.push_messages(queries), strict=True))
        for node in [node for node in self.asked if node in online and self.asked[node]]:
            reply = self.wait(self.asked[node], 0)
            if reply is None:
                continue
            self.asked[node] = ""
            words, numbers, _ = read_reply(reply)
            if words["status"] == "ok":
                self.nodes[words["name"]] = node
                self.films[words["name"]] = int(numbers["films"])
            print(f"SuperNode {node}: {words.get('name') or words['reason']}", flush=True)

    def gather(self, seconds: float) -> dict[str, int]:
        """Wait until all hospitals are connected; return the number of films of each.

        A run that goes on knows its hospitals, and after that time does without those that are
        missing. Raises InputError if a new run has not found them all.
        """
        path, end = self.settings.run / "hospitals.json", time.monotonic() + seconds
        known = json.loads(path.read_text()) if path.is_file() else {}
        wanted = len(known) or self.settings.num_clients
        while len(self.nodes) < wanted and time.monotonic() < end:
            self.discover()
            time.sleep(POLL)
        if not known and len(self.nodes) < wanted:
            there = ", ".join(sorted(self.nodes)) or "none"
            raise InputError(f"num_clients={wanted}: in {seconds:g} s these connected: {there}")
        films = known or {name: self.films[name] for name in sorted(self.nodes)}
        write_atomic(path, json.dumps(films).encode())
        return films


def read_reply(reply: Message | Fault) -> Answer:
    """Take a reply apart; where there is none, or none that can be read, it is a status."""
    try:
        if isinstance(reply, tuple):
            return {"status": reply[0], "reason": reply[1]}, {}, {}
        if reply.has_error():
            return {"status": "failed", "reason": reply.error.reason}, {}, {}
        records = reply.content.config_records["words"], reply.content.metric_records["numbers"]
        return (
            {"status": "failed", "reason": ""} | dict(records[0]),
            dict(records[1]),
            unpack(reply),
        )
    except Exception as error:  # it comes from elsewhere, and must not end the run
        return {"status": "failed", "reason": f"reply of another kind: {error}"}, {}, {}


def find_misfit(state: State, wanted: State) -> str:
    """Tell why a state from a hospital cannot be used; empty if it can."""
    found, expected = ({k: (v.shape, v.dtype) for k, v in s.items()} for s in (state, wanted))
    if found != expected:
        return "its state does not fit what was sent"
    return "its state is not finite" if non_finite(state) else ""


def read_update(name: str, reply: Message | Fault, sent: State) -> Update:
    """Turn a reply into an update; whatever does not fit what was sent costs it, not the round."""
    words, numbers, state = read_reply(reply)
    status, reason = words["status"], words["reason"]
    examples, loss = (numbers.get(key, math.nan) for key in ("examples", "train_loss"))
    if status == "ok" and (reason := find_misfit(state, sent)):
        status = "failed"
    elif status == "ok" and not (isinstance(examples, int) and examples > 0 < loss < math.inf):
        status, reason = "failed", f"examples={examples} train_loss={loss}"
    if status != "ok":
        return Update(name, 0, status=status, reason=reason)
    return Update(name, examples, state, float(loss))


class NetworkTraining(Training):
    """The simulation's `Training`, whose clients are hospitals behind a Flower grid."""

    def __init__(self, settings: Settings, grid: Grid, seconds: float) -> None:
        local = settings.batchnorm == "local"
        if settings.arm_list != ["federated"] or local or settings.cache_features:
            raise InputError(
                "over a network only arms=federated and cache_features=false, and not"
                " batchnorm=local, whose models never leave the hospitals"
            )
        self.network, self.seconds = Network(grid, settings), seconds
        super().__init__(settings, None)

    def _plan(self, films: None) -> list[Job]:
        """List the models to train; of each hospital's films only the number is known here."""
        self.network.config = self.config
        hospitals = self.network.gather(self.seconds).items()
        own = arm_settings(self.settings, "federated")
        return [
            Job("federated", s, [Client(name, range(n), own, s) for name, n in hospitals], None)
            for s in self.settings.seed_list
        ]

    def _fingerprint(self) -> str:
        """Return nothing: the films stayed where they are."""
        return ""

    def _adopt(self, job: Job) -> Progress | None:
        """Share no model with another run, whose hospitals may be others."""
        return None

    def _replicas(self, job: Job) -> Network:
        self.network.models = super()._replicas(job).models[:1]
        self.network.trunk = trunk_hash(self.network.models[0])
        return self.network


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Train as the run's `parameters` say, such as "rounds=6 work_dir=/path"; print each round."""
    pairs = [part.partition("=") for part in shlex.split(context.run_config["parameters"])]
    settings = read_parameters({name: convert(name, value) for name, _, value in pairs})
    training = NetworkTraining(settings, grid, float(context.run_config["wait-seconds"]))
    training.train(print_round)


def print_round(row: Row, history: pd.DataFrame) -> None:
    """Print a line about a round, and one for each hospital that failed in it."""
    now = history[(history["round"] == row["round"]) & (history["seed"] == row["seed"])]
    for fault in now[now["status"] != "ok"].itertuples():
        print(f"round {row['round']}: {fault.client} {fault.status}: {fault.reason}", flush=True)
    print(f"round {row['round']}: train loss {row['train_loss']:.4f}, validation loss "
          f"{row['val_loss']:.4f}, AUROC {row['val_auroc']:.3f}, {row['seconds']:.0f} s, "
          f"state {row['state_sha256']}", flush=True)  # fmt: skip
