"""The server of a federation over Flower: the ServerApp."""

import dataclasses
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from ..base.device import PRECISIONS
from ..base.errors import InputError
from ..base.files import write_atomic
from ..base.fixed import Pool
from ..base.scores import judge
from ..base.state import State, find_misfit, find_odd
from ..client import Update
from ..evidence.tables import NETWORK
from ..fedavg import FedAvg
from ..model import ChestResNet
from ..privacy.keys import is_introduced, read_keys
from ..rounds import Job, Progress
from ..settings import Settings, convert_texts, read_parameters
from ..training.arms import arm_settings, check_rule, client_class
from ..training.batchnorm import RUNNING_MEAN, RUNNING_VAR
from ..training.training import Training
from . import messages
from .demands import check_network
from .messages import Fault, Member, Parcel, pack
from .roster import check_validated, note_changes, print_round
from .site import run_key

POLL = 0.5  # seconds between two looks for a reply
RETURNS = 120.0  # seconds for one that was lost while it answered to be back, and go on
server_app = ServerApp()


class Network:
    """The executor of a run over a network: the hospitals behind a Flower grid.

    `counts` of all that ever connected, `nodes` of those that are; all must have `model`'s trunk.
    """

    def __init__(self, grid: Grid, settings: Settings, keys: str = "") -> None:
        self.grid, self.settings = grid, settings
        _, self.keys = read_keys(keys, "")  # of the hospitals, by name
        if keys and not self.keys:
            raise InputError(f"--keys {keys}: it has no NAME.key.pub, by which to know a hospital")
        self.introduced: dict[str, dict[str, str]] = {}
        self.config: dict[str, Any] = {}
        self.model: ChestResNet | None = None
        self.trunk = ""
        self.nodes: dict[str, int] = {}
        self.counts: dict[str, dict[str, Any]] = {}  # in the mean
        self.bases: dict[str, Parcel] = {}  # what each was sent whole
        self.last = Parcel({})
        self.findings: list[str] = []  # those of the first hospital, and so of all
        self.asked: dict[int, str] = {}  # SuperNodes ever seen, and their open query
        self.twins: dict[int, str] = {}  # those that called themselves as another one did

    def pool(self, job: Job, strategy: FedAvg) -> Pool:
        """Return what puts together what `fit` or `measure` will yield next."""
        return Pool(strategy.aggregator(), job.clients)

    def fit(
        self, clients: list[Member], sent: State, kept: dict[str, State], round: int
    ) -> Iterator[tuple[Update, State]]:
        """Let the hospitals train; yield updates in the order given, and the round to be kept."""
        began, about = time.perf_counter(), {"seed": clients[0].seed, "round": round}
        after = {c.name: int(kept.get(c.name, {}).get("round", 0)) for c in clients}
        orders = {name: about | {"kept": before} for name, before in after.items()}
        orders = self.prepare("fit", orders, sent)
        kind, hidden = client_class(self.settings), self.settings.secure_aggregation
        weights = {c.name: None if hidden else c.weight for c in clients}
        wanted = {name: sent[name] for name in kind.returns(self.model, sent)}
        wanted = self.expect(wanted, clients[0], kind.withholds_loss)
        for name, reply in self.ask("train", orders, sent):
            update, said = messages.read_update(
                name, reply, wanted, weights[name], kind.withholds_loss
            )
            took = time.perf_counter() - began
            keep = {"round": torch.tensor(round)} | said if update.status == "ok" else {}
            yield dataclasses.replace(update, seconds=took), keep

    def measure(
        self, clients: list[Member], state: State, round: int
    ) -> Iterator[tuple[State, str]]:
        """Let the hospitals measure BatchNorm; yield that, or why not, in the order given."""
        orders = {c.name: {"seed": c.seed, "round": round} for c in clients}
        orders = self.prepare("measure", orders, state)
        wanted = {
            k: v.double() for k, v in state.items() if k.endswith((RUNNING_MEAN, RUNNING_VAR))
        }
        wanted = self.expect(wanted, clients[0], True)
        hidden = self.settings.secure_aggregation
        for _, reply in self.ask("train.measure", orders, state):
            words, _, measured = messages.read_reply(reply)
            fit = find_odd if hidden else find_misfit
            fault = words["reason"] if words["status"] != "ok" else fit(measured, wanted)[1]
            yield ({}, fault) if fault else (measured, "")

    def validate(self, job: Job, now: Progress) -> tuple[float, float]:
        """Return loss and mean AUROC on the validation films of the hospitals that answer."""
        about, sums, faults = {"seed": job.seed, "round": now.round}, [], {}
        for name, reply in self.ask("evaluate", {c.name: about for c in job.clients}, now.state):
            found, fault = messages.read_sums(reply, len(self.findings))
            if fault:
                print(f"round {now.round}: not validated at {name}: {fault}", flush=True)
                faults[name] = fault
            else:
                sums.append(found)
        check_validated(job, now, len(sums), faults)
        return judge(sums)

    def prepare(
        self, kind: str, orders: dict[str, dict[str, Any]], sent: State
    ) -> dict[str, dict[str, Any]]:
        """Return the orders for what will be added up; hospitals need nothing more."""
        return orders

    def expect(self, state: State, member: Member, withheld: bool) -> State:
        """Return what a hospital is to send of a state: all of it."""
        return state

    def ask(
        self, kind: str, orders: dict[str, dict[str, int]], state: State
    ) -> Iterator[tuple[str, Message | Fault]]:
        """Send each hospital its order; yield the replies in that order, one at a time."""
        self.discover()
        parcel, there = self.parcel(state), [name for name in orders if name in self.nodes]
        ids = dict(zip(there, self.push(kind, there, orders, parcel), strict=True))
        limit = self.settings.client_seconds
        end = time.monotonic() + (limit or math.inf)
        for name in orders:
            reply = self.wait(ids[name], end) if name in ids else ("failed", "not connected")
            lost = isinstance(reply, Message) and reply.has_error()
            back = min(end, time.monotonic() + RETURNS)
            if lost and self.look_until(lambda name=name: name in self.nodes, back):
                print(f"{name} is asked again: {reply.error.reason}", flush=True)
                reply = self.wait(self.push(kind, [name], orders, parcel)[0], end)
            if messages.has_lost_state(reply):
                self.bases.pop(name, None)
                reply = self.wait(self.push(kind, [name], orders, parcel)[0], end)
            yield name, reply or ("late", f"no reply in {limit:g} s")

    def parcel(self, state: State) -> Parcel:
        """Return a parcel of a state: the last one where it is of these very tensors."""
        if not self.last.holds(state):
            self.last = Parcel(state)
        return self.last

    def push(
        self, kind: str, names: list[str], orders: dict[str, dict[str, int]], parcel: Parcel
    ) -> list[str]:
        """Ask hospitals, each of which gets what it lacks of a state; return the messages' ids."""
        asked = []
        for name in names:
            about, record = parcel.since(self.bases.get(name))
            if about and not about["base"]:
                self.bases[name] = parcel
            asked.append(self.message(kind, self.nodes[name], orders[name] | about, record))
        return list(self.grid.push_messages(asked))

    def wait(self, message_id: str, end: float) -> Message | None:
        """Return the reply to a message; None if there is none at the end."""
        while True:
            if replies := list(self.grid.pull_messages([message_id])):
                return replies[0]
            if time.monotonic() > end:
                return None
            time.sleep(POLL)

    def message(self, kind: str, node: int, about: dict[str, Any], state: ArrayRecord) -> Message:
        """Write a message: the order with the run's parameters, and the state."""
        order = about | {"config": json.dumps(self.config), "trunk": self.trunk}
        content = {"order": ConfigRecord(order | {"run": self.settings.name}), "state": state}
        return Message(RecordDict(content), node, kind, group_id=str(about.get("round", 0)))

    def discover(self) -> None:
        """Ask new SuperNodes who they are, forget those that have gone, and never wait."""
        online = set(self.grid.get_node_ids())
        self.nodes = {name: node for name, node in self.nodes.items() if node in online}
        back = {node for node, name in self.twins.items() if name not in self.nodes}
        self.asked = {node: query for node, query in self.asked.items() if node in online - back}
        new = sorted(online - self.asked.keys())
        queries = [self.message("query", node, {}, pack({})) for node in new]
        self.asked |= dict(zip(new, self.grid.push_messages(queries), strict=True))
        for node in [node for node in self.asked if node in online and self.asked[node]]:
            reply = self.wait(self.asked[node], 0)
            if reply is None:
                continue
            self.asked[node] = ""
            name, counts, fault = messages.read_introduction(reply)
            if name in self.nodes:
                self.twins[node] = name  # one that started again, until the other is found gone
                fault = f"calls itself {name}, as SuperNode {self.nodes[name]} does: left out"
            findings = counts.get("findings", self.findings)
            self.findings = self.findings or findings
            if not fault and findings != self.findings:
                theirs, ours = ", ".join(findings), ", ".join(self.findings)
                fault = f"{name} is left out: its findings are {theirs}, not the run's {ours}"
            introduction = counts.pop("introduction", {})
            if not fault and introduction["node"] != str(node):
                fault = f"{name} is introduced by another node: left out"
            if not fault and self.keys and not self.has_key(name, node, introduction):
                fault = f"calls itself {name}, and has not its key: left out"
            if not fault:
                self.nodes[name], self.counts[name] = node, counts
                self.introduced[name] = introduction
            print(f"SuperNode {node}: {fault or name}", flush=True)

    def look_until(self, enough: Callable[[], bool], end: float) -> bool:
        """Look for hospitals until there are enough or the time is up; tell whether there are."""
        self.discover()
        while not enough() and time.monotonic() < end:
            time.sleep(POLL)
            self.discover()
        return enough()

    def has_key(self, name: str, node: int, introduction: dict[str, str]) -> bool:
        """Tell whether a SuperNode speaks for a hospital, whose key the server was given."""
        run = run_key(self.settings.name, self.config)
        return is_introduced(self.keys.get(name), run, name, str(node), introduction)

    def gather(self, seconds: float) -> dict[str, dict[str, Any]]:
        """Wait until all hospitals are connected; return what each counts in the mean.

        A run that goes on does without those that are missing; a new one raises InputError.
        """
        path, end = self.settings.run / "hospitals.json", time.monotonic() + seconds
        known = json.loads(path.read_text()) if path.is_file() else {}
        for counts in known.values():
            self.findings = counts["findings"]
        wanted = len(known) or self.settings.num_clients
        there = self.look_until(
            lambda: len(self.nodes.keys() & (known or self.nodes)) >= wanted, end
        )
        if not there and not known:
            names = ", ".join(sorted(self.nodes)) or "none"
            raise InputError(f"num_clients={wanted}: in {seconds:g} s these connected: {names}")
        counts = known or {name: self.counts[name] for name in sorted(self.nodes)}
        write_atomic(path, json.dumps(counts).encode())
        return counts


def read_network(values: Mapping[str, Any]) -> Settings:
    """Return the parameters of a run over a network; InputError for what it cannot heed."""
    settings = read_parameters(convert_texts(values))
    if settings.data_dir:
        raise InputError(
            f"over a network not data_dir={settings.data_dir!r} (nor NIH_DATA_DIR): the films stay"
            " in the hospitals"
        )
    check_network(settings)
    if settings.dp != "off" and not settings.secure:
        raise InputError(
            f"over a network dp={settings.dp} wants secure=true: the server knows the seed, from"
            " which it could draw the noise again and take it off"
        )
    one = {"weight": 1, "known": []}  # as far as the rule goes, any hospital
    members = [Member(str(k), one, settings, 0) for k in range(settings.num_clients)]
    check_rule(Job("federated", 0, members, None))
    return settings


def sent_config(config: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return what hospitals are told of a run: what its result depends on, and their limit.

    That is, too, in which precision all compute, whatever `auto` would mean on their devices.
    """
    (name,) = [name for name, dtype in PRECISIONS.items() if str(dtype) == config["dtype"]]
    limits = {"total_epsilon": settings.total_epsilon, "min_clients": settings.min_clients}
    return config | {"precision": name} | limits


class NetworkTraining(Training):
    """The simulation's `Training` over a Flower grid; InputError for what it cannot heed."""

    def __init__(self, settings: Settings, grid: Grid, seconds: float, keys: str = "") -> None:
        check_network(settings)
        settings = dataclasses.replace(settings, partition=NETWORK)
        if settings.secure_aggregation:
            from .masked import MaskedNetwork  # which builds on this module

            self.network = MaskedNetwork(grid, settings, keys)
        else:
            self.network = Network(grid, settings, keys)
        self.wait, self.keys = seconds, keys
        super().__init__(settings, None)

    def _plan(self, films: None) -> list[Job]:
        """List the models to train; of each hospital only its name and weight are known here."""
        self.network.config = sent_config(self.config, self.settings)
        hospitals = self.network.gather(self.wait).items()
        own, jobs = arm_settings(self.settings, "federated"), []
        for seed in self.settings.seed_list:
            members = [Member(name, counts, own, seed) for name, counts in hospitals]
            jobs.append(check_rule(Job("federated", seed, members, None)))
        return jobs

    def _one_round(self, job: Job, now: Progress, executor: Network, strategy: FedAvg) -> None:
        """Note who left since the last round, and who is back; then all as in the simulation."""
        self.network.discover()
        now.rows += note_changes(job, now, self.network.nodes)
        super()._one_round(job, now, executor, strategy)

    def _findings(self) -> list[str]:
        return self.network.findings

    def test(self) -> None:
        """Let the hospitals judge the kept models on their test films; write what they find."""
        from .judges import Judges  # which builds on this module

        judges = Judges(self.network.grid, self.settings, self.keys)
        judges.config, judges.model = self.network.config, self.models.first
        judges.trunk = messages.trunk_hash(self.models.first)
        judges.test(self.jobs, self.wait)

    def _executor(self, job: Job) -> Network:
        """Return the hospitals, which must have this server's trunk."""
        self.network.model = self.models.first
        self.network.trunk = messages.trunk_hash(self.network.model)
        return self.network


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Train as the run's `parameters` say, such as "rounds=6 work_dir=/path"; print each round.

    Then the hospitals test what came of it; or, as a `survey`, they describe their films alone.
    """
    config = context.run_config
    pairs = [part.partition("=") for part in shlex.split(config["parameters"])]
    settings = read_network({name: value for name, _, value in pairs})
    seconds, keys = float(config["wait-seconds"]), str(config["keys"])
    if config["survey"]:
        from .survey import ask_hospitals  # which builds on this module

        ask_hospitals(grid, settings, seconds, keys)
        return
    training = NetworkTraining(settings, grid, seconds, keys)
    training.train(print_round)
    training.test()
