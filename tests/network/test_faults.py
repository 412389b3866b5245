"""A run whose server, hospitals and messages fail again and again ends with the undisturbed bits.

The faults happen in one process, in memory: a process that is killed is an exception that nothing
catches, a full disk one that the system would give. `make flower-chaos` has real ones.
"""

import errno
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_films, tiny_homes, tiny_settings

pytest.importorskip("flwr", reason="the extra `flower` is not installed: make flower installs it")

from flower import load_about
from flwr.app import Array, Error, Message, MetricRecord
from flwr.app.message import message as flwr_message
from flwr.server.utils import validator
from test_flower import DP, SGD, Grid, hashes, one_process, over_the_wire  # noqa: F401

from fedutils import run
from fedutils.base.errors import InputError
from fedutils.base.rng import generator
from fedutils.network import server
from fedutils.network.server import NetworkTraining
from fedutils.privacy import gradients
from fedutils.privacy.ledger import Ledger
from fedutils.rounds import FederationError
from fedutils.training import halfway
from fedutils.training.training import Training

NOBODY = (1 << 22) + 1  # a process that no system has
HOUR = 3600.0
LIMIT = 600.0  # client_seconds, on a clock that jumps
SERVERS = (
    "server killed before it asks", "server killed after it asked", "server killed at a reply",
    "server killed between two steps", "server killed while it writes", "server's disk full",
)  # fmt: skip
HOSPITALS = (
    "hospital killed while it trains", "hospital killed after it kept", "hospital's disk full",
    "reply lost", "reply delayed", "reply garbled", "message twice", "old message again",
    "another node id", "clock an hour fast", "clock an hour slow",
)  # fmt: skip
AT_ANY_STEP = {"reply lost", "reply delayed", "reply garbled", "another node id"}


class Fault(NamedTuple):
    kind: str
    round: int
    who: str  # "" is the server
    step: str  # of the round: a type of message


class Killed(BaseException):
    """A process is gone: nothing below may catch it."""


def draw_faults(seed, count, rounds, names, steps):
    """Each kind, and more up to a count, in rounds, at hospitals and steps that the seed gives."""
    rng, faults, kinds = generator(seed, "faults"), [], (*SERVERS, *HOSPITALS)
    for kind in (*kinds, *rng.choice(kinds, count - len(kinds)).tolist()):
        who = str(rng.choice(names)) if kind in HOSPITALS else ""
        step = str(rng.choice(steps)) if kind in AT_ANY_STEP else steps[0]
        last = rounds - (kind == "old message again")
        faults.append(Fault(kind, int(rng.integers(1, last + 1)), who, step))
    return faults


class Faulty(Grid):
    """A network in which faults are due, each at its first opportunity in its round."""

    def __init__(self, homes, place, faults):
        super().__init__(homes)
        self.place, self.left, self.happened = place, list(faults), []
        self.round, self.now_at, self.clock = 0, "", 0.0
        self.offsets, self.looks = dict.fromkeys(homes, 0.0), 0
        self.stuck, self.late, self.old = set(), {}, []
        self.asked, self.released = Counter(), Counter()  # of updates, by hospital

    def due(self, kind, who="", step="train", round=None):
        fault = Fault(kind, round or self.round, who, step)
        if fault not in self.left:
            return False
        self.left.remove(fault)
        self.happened.append(fault)
        print(f"round {fault.round}: {kind} {who} {'' if step == 'train' else step}", flush=True)
        return True

    def get_node_ids(self):
        self.looks += bool(self.dead)
        if self.looks > 3:
            self.looks = 0
            self.dead.clear()
        return super().get_node_ids()

    def push_messages(self, messages):
        messages = list(messages)
        kind = messages[0].metadata.message_type if messages else ""
        if messages and "round" in (order := messages[0].content.config_records["order"]):
            self.enter(order["round"])
        if kind == "train" and self.due("server killed before it asks"):
            raise Killed
        if kind == "evaluate" and self.due("server killed between two steps"):
            raise Killed
        ids = [self.deliver(message) for message in messages]
        if kind == "train" and self.due("server killed after it asked"):
            raise Killed
        return ids

    def enter(self, round):
        """What was late in the round before is there now, and an old message comes once more."""
        if round == self.round:
            return
        self.round = round
        self.replies |= self.late
        self.late = {}

    def deliver(self, message):
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        who = self.nodes.get(node)
        if who is None or self.due("another node id", who, kind):
            if who:
                self.nodes[max(self.nodes) + 1] = self.nodes.pop(node)
            return self.unavailable(message)
        for name, seconds in (("fast", HOUR), ("slow", -HOUR)):
            if self.due(f"clock an hour {name}", who, kind):
                self.offsets[who] = seconds
        try:
            (key,) = self.hand_over(message)
        except Killed:
            self.dead.add(who)
            return self.unavailable(message)
        reply = self.replies[key]
        if self.due("message twice", who, kind):
            self.hand_over(message)
            self.replies[key] = reply  # SuperLink has one already
        if kind == "train":
            self.again(who, message)
        self.disturb(who, kind, key)
        return key

    def hand_over(self, message):
        who = self.nodes[message.metadata.dst_node_id]
        self.now_at, train = who, message.metadata.message_type == "train"
        self.asked[who] += train
        try:
            ids = super().push_messages([message])
        finally:
            self.now_at = ""
        reply = self.replies[ids[0]]
        faults = validator.validate_message(checkable(reply), True)
        assert not faults, faults  # by which SuperLink would refuse it
        self.released[who] += train and reply.content["words"]["status"] == "ok"
        return ids

    def again(self, who, message):
        """An old message comes once more, when a newer one has been answered."""
        round = message.content.config_records["order"]["round"]
        for old, name, copy in self.old:
            if name == who and old < round:
                self.old.remove((old, name, copy))
                self.nodes.setdefault(copy.metadata.dst_node_id, who)
                self.hand_over(copy)
                break
        if self.due("old message again", who):
            self.old.append((round, who, over_the_wire(message)[0]))

    def disturb(self, who, kind, key):
        if self.due("reply lost", who, kind):
            self.stuck.add(key)
            del self.replies[key]
        elif self.due("reply delayed", who, kind):
            self.stuck.add(key)
            self.late[key] = self.replies.pop(key)
        elif self.due("reply garbled", who, kind):
            content = self.replies[key].content
            packed = content["state"]["state"] if content.array_records else Array(np.zeros(3))
            packed.data = packed.data[: len(packed.data) // 2]
            content["numbers"] = MetricRecord({"loss": 1, "examples": -1})

    def unavailable(self, message):
        key = f"{message.object_id} {len(self.wire)} {len(self.replies)}"
        ask = Message(message.content, message.metadata.dst_node_id, message.metadata.message_type)
        self.replies[key] = Message(Error(5, "Node Unavailable"), reply_to=ask)
        return key

    def pull_messages(self, ids):
        if waits := self.stuck & set(ids):
            self.clock += LIMIT + 1
            self.stuck -= waits
            return []
        replies = super().pull_messages(ids)
        for reply in replies:
            if reply.metadata.message_type == "train" and self.due("server killed at a reply"):
                raise Killed
        return replies

    def replace(self, path, target):
        """Give a file its name, as the system does unless a fault is due."""
        target = Path(target)
        who = next((name for name, home in self.homes.items() if home in target.parents), "")
        if who and self.now_at != who:
            return REPLACE(path, target)
        if who and self.due("hospital's disk full", who):
            raise OSError(errno.ENOSPC, "No space left on device")
        if not who and self.place in target.parents:
            written = target.stem.split("-")[1] if target.name.startswith("round-") else ""
            if written and self.due("server's disk full", round=int(written)):
                raise OSError(errno.ENOSPC, "No space left on device")
            if written and self.due("server killed while it writes", round=int(written)):
                half = path.with_name(f".{target.name}.{NOBODY}.tmp")
                half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                raise Killed
        done = REPLACE(path, target)
        remembered = target.parent.name == "kept" or target.name == "masks.json"
        if remembered and self.due("hospital killed after it kept", who):
            raise Killed
        return done

    def offset(self):
        """How far the clock is off that whoever works now looks at."""
        return self.offsets.get(self.now_at, 0.0)

    def replace_of(self):
        """Return what stands for Path.replace."""
        return lambda path, target: self.replace(path, target)

    def trains(self):
        """A moment in a hospital's training."""
        if self.now_at and self.due("hospital killed while it trains", self.now_at):
            raise Killed


REPLACE = Path.replace


def checkable(reply):
    """A reply as SuperLink checks it."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return reply


def patch(monkeypatch, grid):
    """Let the faults of a grid happen to files, clocks and training."""
    clock, wall, now = server.time.monotonic, server.time.time, flwr_message.now
    note, draw = halfway.Halfway.note, gradients.draw_films
    monkeypatch.setattr(server, "POLL", 0.0)
    monkeypatch.setattr(halfway, "EVERY", 0.0)
    monkeypatch.setattr(server.time, "monotonic", lambda: clock() + grid.clock)
    monkeypatch.setattr(server.time, "time", lambda: wall() + grid.offset())
    monkeypatch.setattr(flwr_message, "now", lambda: now() + timedelta(seconds=grid.offset()))
    monkeypatch.setattr(Path, "replace", grid.replace_of())

    def noting(self, *about):
        note(self, *about)
        grid.trains()

    def drawing(*about):
        grid.trains()
        return draw(*about)

    monkeypatch.setattr(halfway.Halfway, "note", noting)
    monkeypatch.setattr(gradients, "draw_films", drawing)


def survive(settings, grid):
    """Start the server again whenever it stops, as a user would; return the history."""
    for _ in range(1, 2 * len(grid.left) + 2):
        try:
            return NetworkTraining(settings, grid, 1).train()
        except (Killed, FederationError, InputError) as error:
            print(f"the server ended: {type(error).__name__} {error}", flush=True)
    raise AssertionError(f"still not done; to come: {grid.left}")


RUNS = {
    "scaffold": {"strategy": "scaffold", "local_epochs": 2} | SGD,
    "masked": {"secure_aggregation": True, "batchnorm": "frozen"},
    "private": {"secure_aggregation": True} | DP,
}


def both_ways(tmp_path, monkeypatch, name, rounds, faults):
    """A run in the simulation, and through faults: settings and history of both, and the grid."""
    changes = {"rounds": rounds, "min_clients": 3, "client_seconds": LIMIT, "tracked": "fc"}
    changes |= RUNS[name]
    films = tiny_films(tmp_path, films=30)
    alone = tiny_settings(tmp_path, **changes | {"secure_aggregation": False})
    expected = Training(alone, films).train()
    place = tmp_path / "server"
    grid = Faulty(tiny_homes(tmp_path / "homes", films), place, faults)
    settings = tiny_settings(place, **changes)
    with monkeypatch.context() as patched:
        patch(patched, grid)
        return alone, expected, settings, survive(settings, grid), grid


SLOW = pytest.param("masked", 5, 20, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "rounds", "count"), [("scaffold", 10, 22), ("private", 3, 17), SLOW]
)
def test_faults_of_every_kind_change_no_bit(tmp_path, monkeypatch, name, rounds, count):
    """Nor do they lose a step that a hospital's ledger should know, or leave half a file."""
    if name == "private":
        pytest.importorskip("opacus", reason="differential privacy needs Opacus")
    steps = ["train", *(["train.measure"] if name == "scaffold" else []), "evaluate"]
    faults = draw_faults(count, count, rounds, ["client-1", "client-2", "client-3"], steps)
    alone, expected, settings, history, grid = both_ways(
        tmp_path, monkeypatch, name, rounds, faults
    )
    homes = grid.homes
    assert Counter(grid.happened) == Counter(faults)
    assert {fault.kind for fault in grid.happened} == {*SERVERS, *HOSPITALS}
    assert hashes(history) == hashes(expected)
    good = history[history["status"] == "ok"]
    assert good.groupby("round")["client"].apply(sorted).tolist() == [["", *homes]] * rounds
    stored = run.read_history(settings.run)
    assert (
        stored[["round", "client", "state_sha256"]]
        .fillna("")
        .astype(str)
        .equals(history[["round", "client", "state_sha256"]].fillna("").astype(str))
    )
    kept = [load_about(one.run / "models/federated-s0.safetensors") for one in (alone, settings)]
    assert kept[0] == kept[1]
    left = [
        path.name for path in tmp_path.rglob("*") if path.suffix == ".tmp" or path.name == "halfway"
    ]
    assert not left
    if name == "private":
        paid(homes, grid, pd.read_csv(alone.run / "privacy.csv")["steps"].iloc[0] // rounds)


@pytest.mark.parametrize("fault", [
    Fault("server killed while it writes", 2, "", "train"),
    Fault("old message again", 1, "client-2", "train"),
])  # fmt: skip
def test_what_a_hospital_keeps_is_there_for_a_server_that_goes_back(tmp_path, monkeypatch, fault):
    """Killed while it writes a round, it has the next one trained: the variate before both counts."""
    _, expected, _, history, grid = both_ways(tmp_path, monkeypatch, "scaffold", 4, [fault])
    assert grid.happened == [fault] and hashes(history) == hashes(expected)


def paid(homes, grid, steps):
    """Each hospital's ledger has the steps of all that left it, and of no more than was tried."""
    for who, home in homes.items():
        (entry,) = Ledger(home).read().values()
        assert steps * grid.released[who] <= entry.steps <= steps * grid.asked[who], who
        assert grid.released[who] >= 3


def test_a_node_that_started_again_is_taken_once_its_former_self_is_found_gone(
    tmp_path, monkeypatch, capsys
):
    """A killed SuperNode is there for a minute to SuperLink; its new one comes before that is over."""
    films, changes = (
        tiny_films(tmp_path, films=30),
        {"min_clients": 3, "tracked": "fc", "rounds": 1},
    )
    expected = Training(tiny_settings(tmp_path, **changes), films).train()
    monkeypatch.setattr(server, "POLL", 0.0)

    class Restarted(Grid):
        """Client-2 is killed while it trains, and has two nodes for some looks."""

        looks = 0

        def get_node_ids(self):
            self.looks += 14 in self.nodes
            if self.looks == 4:
                self.nodes.pop(12, None)
            return super().get_node_ids()

        def push_messages(self, messages):
            ids = super().push_messages(messages)
            for key, message in zip(ids, messages, strict=True):
                about = message.metadata
                if about.message_type == "train" and about.dst_node_id == 12:
                    self.nodes[14] = "client-2"
                    del self.replies[key]
                    self.lost = key, message
            return ids

        def pull_messages(self, ids):
            if self.looks and 12 not in self.nodes and self.lost[0] in ids:
                return [Message(Error(5, "Node Unavailable"), reply_to=self.lost[1])]
            if self.lost[0] in ids:
                self.get_node_ids()
            return super().pull_messages(ids)

        lost = "", None

    grid = Restarted(tiny_homes(tmp_path / "homes", films))
    network = NetworkTraining(tiny_settings(tmp_path / "server", **changes), grid, 1)
    discover = network.network.discover
    poll = server.time.sleep
    monkeypatch.setattr(server.time, "sleep", lambda seconds: (discover(), poll(seconds)))
    assert hashes(network.train()) == hashes(expected)
    said = capsys.readouterr().out
    assert "SuperNode 14: calls itself client-2, as SuperNode 12 does" in said
    assert "client-2 is asked again: Node Unavailable" in said
