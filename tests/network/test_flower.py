"""Over Flower's messages the run is the simulation's, bit for bit, and no film leaves a hospital."""

import ast
import dataclasses
import functools
import io
import json
import math
import pickle
import secrets
import shutil
import struct
import time
import tracemalloc
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import ROUNDING, tiny_films, tiny_homes, tiny_settings

pytest.importorskip("flwr", reason="the extra `flower` is not installed: make flower installs it")

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from scipy import stats
from torchvision.models import resnet34

from fedutils import rounds, run
from fedutils.base.device import precision
from fedutils.base.errors import InputError
from fedutils.base.fixed import FILM
from fedutils.base.state import state_hash, to_cpu
from fedutils.batch.absent import LeaveOut
from fedutils.batch.run import run as batch_run
from fedutils.client import Client
from fedutils.evidence.calibration import calibrate
from fedutils.evidence.cuts import operating_points
from fedutils.evidence.metrics import REPEATS, evaluate_parts
from fedutils.evidence.predict import predict_films, write_predictions
from fedutils.evidence.summary import verify_run
from fedutils.evidence.tables import best_rounds, read_table, training_cost
from fedutils.films.phantom.cases import FINDINGS
from fedutils.films.survey import HIDDEN
from fedutils.model import build_resnet34
from fedutils.network import demands, hospital, messages, server
from fedutils.network.clientapp import client_app
from fedutils.network.commands import make_key
from fedutils.network.demands import REFUSED
from fedutils.network.hospital import Hospital
from fedutils.network.masked import MaskedNetwork
from fedutils.network.messages import (
    Member,
    pack,
    read_introduction,
    read_sums,
    read_update,
    unpack,
)
from fedutils.network.server import NetworkTraining
from fedutils.network.survey import ask_hospitals
from fedutils.plots.training import learning_curves
from fedutils.privacy.keys import new_secret, public_of
from fedutils.privacy.ledger import Ledger
from fedutils.privacy.masks import MaskedSum, Masker, MaskFault
from fedutils.rounds import FederationError
from fedutils.settings import FIELDS
from fedutils.training import halfway, replicas, training
from fedutils.training.replicas import start_model
from fedutils.training.training import Training

SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.05}
SECRET = "Mueller-Luedenscheidt"
Start = namedtuple("Start", ["weights", "tracked", "batchnorm", "precision"])


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """In earnest each message is a process of its own; here all share one task and one model."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 2, 3
    built = functools.cache(
        lambda settings, *of: (m := start_model(settings, *of), to_cpu(m.state_dict()))
    )

    def start(settings, *of):
        about = "weights", "tracked", "batchnorm", "precision"
        model, fresh = built(Start(*(getattr(settings, name) for name in about)), *of)
        model.load(fresh)
        model._forward_pre_hooks.clear()  # of the run before
        return model.train()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "start_model", start)
        patch.setattr(hospital, "start_model", start)
        for room in (hospital, messages):
            patch.setattr(room, "trunk_hash", lambda model: "trunk")
        # Else no private run had the bits of another.
        patch.setattr(demands, "noise_is_secret", lambda settings: True)
        yield


def over_the_wire(message):
    """Serialise a message to its objects and back, as Flower does; return it and the bytes."""
    message.metadata.__dict__["_message_id"] = message.object_id
    parts = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
    return inflate_object_from_contents(message.object_id, dict(parts)), b"".join(parts.values())


class Grid:
    """A SuperLink in memory: hospitals answer at once, in the reverse order of asking."""

    def __init__(self, homes):
        self.nodes = {number: name for number, name in enumerate(homes, 11)}
        self.homes, self.replies, self.wire, self.dead = homes, {}, [], set()

    def config(self, name):
        return {"name": name, "work_dir": str(self.homes[name])}

    def get_node_ids(self):
        return [node for node, name in self.nodes.items() if name not in self.dead]

    def push_messages(self, messages):
        ids = []
        for message in reversed(messages):
            name = self.nodes[message.metadata.dst_node_id]
            message.metadata.__dict__["_src_node_id"] = 1
            arrived, content = over_the_wire(message)
            arrived.metadata.__dict__["_message_id"] = message.object_id
            context = Context(1, message.metadata.dst_node_id, self.config(name), RecordDict(), {})
            reply, answer = over_the_wire(client_app(arrived, context))
            self.replies[message.object_id] = reply
            self.wire += [("down", message, content), (name, reply, answer)]
            ids.insert(0, message.object_id)
        return ids

    def pull_messages(self, ids):
        return [self.replies.pop(key) for key in ids if key in self.replies]


class Replies(Grid):
    """Of one kind of message, client-2 gives another reply than it would."""

    def __init__(self, homes, kind, words):
        super().__init__(homes)
        self.kind, self.words = kind, words

    def pull_messages(self, ids):
        replies = super().pull_messages(ids)
        for number, reply in enumerate(replies):
            about = reply.metadata
            if about.message_type == self.kind and self.nodes[about.src_node_id] == "client-2":
                replies[number] = reply_with({}, self.words)
        return replies


def over_flower(work, grid, **changes):
    return NetworkTraining(tiny_settings(work / "server", **changes), grid, 1).train()


def hashes(history):
    return history[history["client"] == ""]["state_sha256"].tolist()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One run simulated and over Flower: films, the two histories, and the grid that saw it all."""
    work = tmp_path_factory.mktemp("both")
    films = tiny_films(work)
    simulated = Training(tiny_settings(work), films).train()
    grid = Grid(tiny_homes(work / SECRET, films))
    return films, simulated, over_flower(work, grid), grid


def test_every_round_has_the_bits_of_the_simulation(both):
    _, simulated, history, _ = both
    assert hashes(history) == hashes(simulated) and len(hashes(history)) == 2
    same = ["client", "round", "train_loss", "examples", "bytes_up", "bytes_down", "status"]
    assert history[same].equals(simulated[same])


def test_the_validation_is_that_of_all_hospitals_films(both):
    _, simulated, history, _ = both
    last, expected = history.iloc[-1], simulated.iloc[-1]
    assert last["val_loss"] == pytest.approx(expected["val_loss"], rel=ROUNDING)
    assert last["val_auroc"] == expected["val_auroc"]


def test_nothing_but_tensors_counts_and_losses_leaves_a_hospital(both):
    _films, *_, grid = both
    model = build_resnet34("none", "layer1,fc", "average", outputs=14)
    shapes = {name: (tuple(v.shape), v.dtype) for name, v in model.tracked_state().items()}
    double = torch.float64
    measured = {k: (s, double) for k, (s, _) in shapes.items() if k.endswith(("_mean", "_var"))}
    numbers = {"weight", "known", "examples", "train_loss", "loss", "labels", "pairs", "ordered"}
    replies = [(name, reply) for name, reply, _ in grid.wire if name != "down"]
    assert len(replies) == 3 * (
        1 + 2 * 3
    )  # a query, then train, measure and validate in two rounds
    for name, reply in replies:
        assert set(reply.content) == {"words", "numbers", "state"}
        words = dict(reply.content["words"])
        assert words.pop("findings", "\n".join(FINDINGS)) == "\n".join(FINDINGS)
        words.pop("introduction", "")  # a public key
        assert words.pop("name", name) == name and words == {"status": "ok", "reason": ""}
        assert set(reply.content["numbers"]) <= numbers
        for value in reply.content["numbers"].values():
            assert isinstance(value, int | float) or len(value) == len(FINDINGS)
        state = unpack(reply)
        assert {k: (tuple(v.shape), v.dtype) for k, v in state.items()} in ({}, shapes, measured)


def test_the_state_goes_down_once_a_round_and_the_update_up_once(both):
    """With what is measured of BatchNorm, and what each message says beside."""
    *_, history, grid = both
    whole = history["bytes_down"].iloc[0] + history["bytes_up"].iloc[0]
    for name in grid.homes:
        own = [content for home, reply, content in grid.wire if home == name]
        node = next(number for number, home in grid.nodes.items() if home == name)
        own += [c for home, m, c in grid.wire if home == "down" and m.metadata.dst_node_id == node]
        state = history["bytes_down"].iloc[0]  # once more, to judge the last one
        assert sum(map(len, own)) < 1.1 * (2 * whole + state) + 7 * 20_000


def test_a_hospital_with_a_new_disk_is_sent_the_whole_state(tmp_path):
    films = tiny_films(tmp_path)
    expected = hashes(Training(tiny_settings(tmp_path), films).train())
    homes, lost = tiny_homes(tmp_path / SECRET, films), []

    class NewDisk(Grid):
        def push_messages(self, messages):
            for path in homes["client-2"].glob("runs/run/sent/*"):
                path.unlink()
                lost.append(path)
            return super().push_messages(messages)

    history = over_flower(tmp_path, NewDisk(homes))
    assert hashes(history) == expected and set(history["status"]) == {"ok"} and len(lost) > 3


def test_no_film_no_patient_and_no_path_stands_in_any_message(both):
    films, *_, grid = both
    everything = b"".join(content for *_, content in grid.wire)
    assert len(everything) > 1e6 and SECRET.encode() not in everything
    for name, film in zip(films.index["image_index"], films.store, strict=True):
        assert name.encode() not in everything
        assert film[5].tobytes() not in everything  # a line of its pixels


@pytest.mark.parametrize("changes", [
    {"batchnorm": "frozen", "aggregation": "median", "strategy": "fedavgm"},
    {"batchnorm": "average", "client_fraction": 0.6},
    {"batchnorm": "frozen", "local_steps": 3},
], ids=["frozen-median", "fraction", "steps"])  # fmt: skip
def test_other_settings_too_have_the_bits_of_the_simulation(tmp_path, changes):
    films = tiny_films(tmp_path)
    expected = hashes(Training(tiny_settings(tmp_path, **changes), films).train())
    assert (
        hashes(over_flower(tmp_path, Grid(tiny_homes(tmp_path / SECRET, films)), **changes))
        == expected
    )


def test_a_killed_server_goes_on_from_the_last_finished_round(tmp_path):
    """With SCAFFOLD, whose variates the hospitals keep: that of the lost round must not count."""
    films, changes = tiny_films(tmp_path), {"strategy": "scaffold"} | SGD
    expected = hashes(Training(tiny_settings(tmp_path, **changes), films).train())
    homes = tiny_homes(tmp_path / SECRET, films)
    over_flower(tmp_path, Grid(homes), rounds=1, **changes)

    class Killed(Grid):
        def pull_messages(self, ids):
            replies = super().pull_messages(ids)
            if any(reply.metadata.message_type == "train" for reply in replies):
                raise KeyboardInterrupt  # the hospitals have trained round 2 and kept theirs
            return replies

    with pytest.raises(KeyboardInterrupt):
        over_flower(tmp_path, Killed(homes), **changes)
    assert hashes(over_flower(tmp_path, Grid(homes), **changes)) == expected


@pytest.mark.parametrize("changes", [{"strategy": "scaffold"} | SGD, {"secure_aggregation": True}])
def test_a_hospital_that_is_killed_in_a_round_is_asked_again_and_goes_on(
    tmp_path, monkeypatch, capsys, changes
):
    """Not from the start: each of its batches is trained on once, and the bits are the same."""
    changes = changes | {"local_epochs": 3, "min_clients": 2, "batchnorm": "frozen"}
    monkeypatch.setattr(halfway, "EVERY", 0.0)
    monkeypatch.setattr(server, "POLL", 0.01)
    films, noted, note = tiny_films(tmp_path), [], halfway.Halfway.note
    plain = changes | {"secure_aggregation": False}
    expected = hashes(Training(tiny_settings(tmp_path, **plain), films).train())

    def killed(self, batches, *about):
        note(self, batches, *about)
        if "client-2" in self.folder.parts:
            noted.append(batches)
            if noted == [1, 2, 3]:
                raise KeyboardInterrupt

    monkeypatch.setattr(halfway.Halfway, "note", killed)

    class Kills(Grid):
        """A ClientApp that is killed takes its SuperNode along, which starts again after a while."""

        looks = 0

        def push_messages(self, messages):
            ids = []
            for message in messages:
                try:
                    ids += super().push_messages([message])
                except KeyboardInterrupt:
                    error = Message(Error(5, "Node Unavailable"), reply_to=message)
                    self.replies[message.object_id] = error
                    self.dead.add("client-2")
                    ids.append(message.object_id)
            return ids

        def get_node_ids(self):
            self.looks += bool(self.dead)
            if self.looks == 5:
                self.dead.clear()
            return super().get_node_ids()

    homes = tiny_homes(tmp_path / SECRET, films)
    history = over_flower(tmp_path, Kills(homes), **changes)
    assert hashes(history) == expected and set(history["status"]) == {"ok"}
    assert noted == [1, 2, 3, 4, 5, 6] * 2
    said = capsys.readouterr().out
    assert "client-2 is asked again: Node Unavailable" in said and "goes on after 3 batch" in said
    assert not [home for home in homes.values() if (home / "runs/run/halfway").exists()]


def test_a_hospital_that_is_lost_and_does_not_come_back_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "POLL", 0.01)
    monkeypatch.setattr(server, "RETURNS", 0.1)

    class Lost(Grid):
        def pull_messages(self, ids):
            replies = super().pull_messages(ids)
            for number, reply in enumerate(replies):
                about = reply.metadata
                if about.message_type == "train" and self.nodes[about.src_node_id] == "client-2":
                    ask = Message(RecordDict({}), 11, "train")
                    replies[number] = Message(Error(5, "Node Unavailable"), reply_to=ask)
                    self.dead.add("client-2")
            return replies

    history = over_flower(tmp_path, Lost(tiny_homes(tmp_path, tiny_films(tmp_path))), rounds=1)
    assert history["status"].tolist() == ["ok", "failed", "ok", "ok"]
    assert history["reason"][1] == "Node Unavailable"


def test_the_late_update_of_an_old_round_is_never_taken_for_the_new_one(
    tmp_path, monkeypatch, capsys
):
    """Nor what the hospital kept beside it: with SCAFFOLD's variates, the simulation's bits."""
    films, changes, fit = tiny_films(tmp_path), {"strategy": "scaffold"} | SGD, Client.fit
    changes |= {"batchnorm": "frozen", "rounds": 3, "client_seconds": 600.0}

    def slow(self, *about):
        update, kept = fit(self, *about)
        seconds = 999.0 if self.name == "client-2" and about[3] == 1 else 0.0
        return dataclasses.replace(update, seconds=seconds), kept

    with monkeypatch.context() as patch:
        patch.setattr(Client, "fit", slow)
        simulated = Training(tiny_settings(tmp_path, **changes), films).train()

    class Late(Grid):
        """Client-2's first update is there when the second is asked for, and stays to be pulled."""

        held, clock = "", 0.0

        def push_messages(self, messages):
            ids = super().push_messages(messages)
            for key, message in zip(ids, messages, strict=True):
                about = message.metadata
                if about.message_type == "train" and self.nodes[about.dst_node_id] == "client-2":
                    self.held = self.held or key
            return ids

        def pull_messages(self, ids):
            self.clock += 601.0 * (self.held in ids)
            return super().pull_messages([key for key in ids if key != self.held])

    grid, clock = Late(tiny_homes(tmp_path / SECRET, films)), time.monotonic
    monkeypatch.setattr(server.time, "monotonic", lambda: clock() + grid.clock)
    history = over_flower(tmp_path, grid, **changes)
    assert history[history["client"] == "client-2"]["status"].tolist() == ["late", "ok", "ok"]
    assert hashes(history) == hashes(simulated) and grid.held in grid.replies
    assert "round 1: client-2 late: no reply in 600 s\n" in capsys.readouterr().out


def test_who_leaves_joins_or_comes_new_is_a_line_in_the_history(tmp_path, monkeypatch, capsys):
    """Shares stay those of the hospitals of the start: the bits are those of two that failed."""
    films = tiny_films(tmp_path, films=80, clients=4)
    grid = Grid(tiny_homes(tmp_path / SECRET, films))
    grid.dead.add("client-4")  # it registers when the run has begun
    about, fit = {"rounds": 4, "batchnorm": "frozen"}, Client.fit
    network = NetworkTraining(tiny_settings(tmp_path / "server", **about), grid, 1)
    gone = {1: {"client-1"}, 2: {"client-1"}}

    def on_round(row, history):
        grid.dead = gone.get(row["round"], set())

    history = network.train(on_round)
    rows = history[history["status"].isin(["joined", "left", "left out"])]
    assert rows[["round", "client", "status"]].to_numpy().tolist() == [
        [2, "client-1", "left"], [2, "client-4", "left out"], [4, "client-1", "joined"],
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "round 2: client-1 left: not connected\n" in said
    assert "round 2: client-4 left out: new: wait for the next run\n" in said
    assert "round 4: client-1 joined: connected again\n" in said

    def away(self, *args):
        return 1 / 0 if self.name == "client-1" and args[3] in (2, 3) else fit(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "fit", away)
        three = films.where(films.index["client"] != "client-4")
        simulated = Training(tiny_settings(tmp_path, **about), three).train()
    assert hashes(history) == hashes(simulated)
    more = over_flower(tmp_path, grid, **about | {"rounds": 5})  # another process: nothing is new
    assert set(more[more["round"] == 5]["status"]) == {"ok"}
    stored = run.read_history(tmp_path / "server/runs/run")
    assert len(best_rounds(stored)) == 1 and len(learning_curves(stored).axes) == 2
    cost = training_cost(stored, tiny_settings(tmp_path), clients=3)
    assert cost["films_seen"].diff().iloc[1:].tolist() == [24, 24, 36, 36]


def test_an_error_in_a_hospital_names_it_and_its_text_stays_there(tmp_path, capfd):
    films = tiny_films(tmp_path)
    homes = tiny_homes(tmp_path / SECRET, films)

    class Breaks(Grid):
        def push_messages(self, messages):
            if messages and messages[0].metadata.message_type == "train":
                (homes["client-2"] / "prepared/images.npy").unlink()
            return super().push_messages(messages)

    grid = Breaks(homes)
    history = over_flower(tmp_path, grid, rounds=1)
    assert history["status"].tolist() == ["ok", "failed", "ok", "ok"]
    assert history["reason"][1] == "FileNotFoundError; see the hospital's log"
    assert SECRET in capfd.readouterr().err
    assert SECRET.encode() not in b"".join(content for *_, content in grid.wire)


def test_a_hospital_that_vanishes_is_named_and_takes_part_again(tmp_path):
    films = tiny_films(tmp_path)
    grid = Grid(tiny_homes(tmp_path / SECRET, films))
    over_flower(tmp_path, grid, rounds=1)
    grid.dead.add("client-1")
    with pytest.raises(FederationError, match=r"client-1 failed \(not connected\)"):
        over_flower(tmp_path, grid, rounds=2, min_clients=3)
    history = over_flower(tmp_path, grid, rounds=2)
    assert history[history["round"] == 2]["status"].tolist() == ["left", "failed", *["ok"] * 3]
    grid.dead.clear()
    grid.nodes = {number + 100: name for number, name in grid.nodes.items()}  # all start again
    history = over_flower(tmp_path, grid, rounds=3)
    assert history[history["round"] == 3]["status"].tolist() == ["joined", *["ok"] * 4]


def test_a_run_does_not_begin_without_its_hospitals(tmp_path, capfd):
    """One is missing, one was prepared at another size; its own log says so."""
    homes = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))
    (homes["client-3"] / "prepared/report.json").write_text('{"seed": 0, "image_size": 64}')
    grid = Grid(homes)
    grid.dead.add("client-2")
    with pytest.raises(InputError, match=r"num_clients=3: in 1 s these connected: client-1$"):
        over_flower(tmp_path, grid)
    assert "image_size=64" in capfd.readouterr().err


def test_another_trunk_than_the_servers_is_refused(tmp_path):
    home = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))["client-1"]
    config = dataclasses.asdict(tiny_settings(tmp_path)) | {"threads": 1}
    order = {"config": json.dumps(config), "run": "run", "trunk": "another"}
    with pytest.raises(InputError, match="not the trunk of the server"):
        Hospital(order, {"work_dir": str(home), "name": "client-1"}).model()


def test_a_hospitals_own_copy_of_the_weights_stands_for_the_servers_file(tmp_path):
    torch.save(resnet34().state_dict(), tmp_path / "copy.pth")
    home = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))["client-1"]
    config = dataclasses.asdict(tiny_settings(tmp_path)) | {"threads": 1}
    order = {"config": json.dumps(config | {"weights": "/the/servers.pth"}), "run": "run"}
    order["trunk"] = "trunk"
    node = {"work_dir": str(home), "name": "client-1"}
    with pytest.raises(InputError, match="no such file"):
        Hospital(order, node).model()
    node["weights"] = str(tmp_path / "copy.pth")
    Hospital(order, node).model()
    order["config"] = json.dumps(config | {"weights": "imagenet"})  # which it need not download
    Hospital(order, node).model()
    order["trunk"] = "another file's"
    with pytest.raises(InputError, match="not the trunk of the server"):
        Hospital(order, node).model()
    order["config"] = json.dumps(config)  # from scratch: then a copy means nothing
    assert Hospital(order, node).settings.weights == "none"


@pytest.mark.parametrize(("dtype", "name"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_all_hospitals_compute_in_the_precision_that_the_run_records(tmp_path, dtype, name):
    """Whatever `auto` would mean on a hospital's own device."""
    home = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))["client-1"]
    settings = tiny_settings(tmp_path)
    config = dataclasses.asdict(settings) | {"threads": 1, "dtype": f"torch.{dtype}"}
    assert config["precision"] == "auto"
    sent = json.dumps(server.sent_config(config, settings))
    order = {"config": sent, "run": "run", "trunk": "trunk"}
    here = Hospital(order, {"work_dir": str(home), "name": "client-1"}).settings
    assert here.precision == name
    assert str(precision(torch.device("cuda"), here.precision)) == f"torch.{dtype}"


SPOILT = {
    "shape": {"w": torch.zeros(2)},
    "dtype": {"w": torch.zeros(3).double()},
    "missing": {},
    "one more": {"w": torch.zeros(3), "film": torch.zeros(3)},
    "infinite": {"w": torch.tensor([0, 0, torch.inf])},
}


@pytest.mark.parametrize("state", SPOILT.values(), ids=SPOILT)
def test_what_does_not_fit_costs_its_update_not_the_round(state):
    good = {"w": torch.ones(3)}
    numbers = MetricRecord({"examples": 5, "train_loss": 0.5})
    ask = Message(RecordDict({}), 11, "train")
    for tensors, status in ((good, {"ok"}), (state, {"failed", "non-finite"})):
        words = ConfigRecord({"status": "ok", "reason": ""})
        content = {"words": words, "numbers": numbers, "state": pack(tensors)}
        update, _ = read_update("a", Message(RecordDict(content), reply_to=ask), good, 5)
        assert update.status in status
    assert read_update("a", Message(RecordDict({}), reply_to=ask), good, 5)[0].status == "failed"


def archive(zeros):
    """The bytes of a compressed archive that unfolds to so many zeros."""
    np.savez_compressed(file := io.BytesIO(), state=np.zeros(zeros, np.uint8))
    return file.getvalue()


def claim(shape):
    """The header of an array of bytes that claims a shape, and none of its bytes."""
    about = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file := io.BytesIO(), about)
    return file.getvalue()


HEADER = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
BOMBS = {
    "a compressed archive": archive(1 << 28),
    "an array said to be of 100 TB": claim((100 << 40,)),
    "an array said to be of 4 GB": claim((4 << 30,)),
    "a tensor said to be of 4 TB": struct.pack("<Q", len(HEADER)) + HEADER.encode(),
    "a header said to be of 1 GB": struct.pack("<Q", 1 << 30) + b"{",
    "nothing": b"",
    "a pickle": pickle.dumps(np.zeros(3)),
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_a_bomb_costs_its_hospital_not_the_server(content):
    """Nor the server's memory."""
    reply = reply_with({"examples": 5, "train_loss": 0.5})
    reply.content["state"] = ArrayRecord({"state": Array("uint8", (3,), "safetensors", content)})
    tracemalloc.start()
    update, kept = read_update("a", reply, {"w": torch.zeros(3)}, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert update.status == "failed" and "reply of another kind" in update.reason and not kept
    assert peak < 1 << 24


def test_an_oversized_state_costs_its_hospital_not_the_server():
    reply = reply_with({"examples": 5, "train_loss": 0.5}, state={"w": torch.zeros(1 << 24)})
    update, _ = read_update("a", reply, {"w": torch.zeros(3)}, 5)
    assert update.status == "failed" and "does not fit what was sent: w" in update.reason


MASKED = {"secure_aggregation": True, "min_clients": 2}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A masked run over Flower, and the same one plain in the simulation."""
    work = tmp_path_factory.mktemp("masked")
    films = tiny_films(work)
    simulated = Training(tiny_settings(work, min_clients=2), films).train()
    grid = Grid(tiny_homes(work / SECRET, films))
    return films, simulated, over_flower(work, grid, **MASKED), grid


def test_a_masked_run_over_flower_has_the_bits_of_the_plain_simulation(masked):
    _, simulated, history, _ = masked
    assert hashes(history) == hashes(simulated) and len(hashes(history)) == 2
    for column in ("val_loss", "val_auroc", "train_loss", "examples"):
        plain, hidden = (t[t["client"] == ""][column].tolist() for t in (simulated, history))
        assert plain == hidden, column


def test_nothing_but_masked_integers_and_keys_leaves_a_hospital_that_masks(masked):
    """No weight, no loss, no count; of equal kinds of message no two have a number in common."""
    *_, grid = masked
    seen = set()
    for _, reply, _ in [one for one in grid.wire if one[0] != "down"]:
        words, kind = dict(reply.content["words"]), reply.metadata.message_type
        assert words.pop("status") == "ok" and words.pop("reason") == ""
        of_films = kind not in ("query.offer", "query.agree", "query.reveal")
        assert set(reply.content) == ({"words", "numbers", "state"} if of_films else {"words"})
        state = unpack(reply) if of_films else {}
        if kind == "query":
            assert set(words) == {"name", "findings", "introduction"}
            assert dict(reply.content["numbers"]) == {"weight": 1, "known": [1] * 14}
        else:
            assert set(words) == (set() if of_films else {"said"})
            assert not of_films or not dict(reply.content["numbers"])
        for value in state.values():
            assert value.dtype == torch.int64
        numbers = set(torch.cat([v.flatten() for v in state.values()]).tolist()) if state else set()
        assert not numbers & seen
        seen |= numbers
    assert len(seen) > 1e5
    counts = np.bincount(np.array(list(seen)).view(np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-6


@pytest.mark.parametrize("lost", ["train", "query.agree", "query.reveal"])
def test_a_hospital_that_is_lost_after_its_keys_or_its_update(tmp_path, lost):
    """The bits of a plain run of those whose updates came."""
    films = tiny_films(tmp_path)

    homes, changes = tiny_homes(tmp_path / SECRET, films), {"rounds": 1, "batchnorm": "frozen"}
    grid = Replies(homes, lost, {"status": "failed", "reason": "lost"})
    history = over_flower(tmp_path, grid, **MASKED, **changes)
    if lost == "train":
        training = Training(tiny_settings(tmp_path, min_clients=2, **changes), films)
        for client in training.jobs[0].clients:
            if client.name == "client-2":
                client.fit = lambda *about: 1 / 0
        expected = training.train()
        assert history["status"].tolist() == ["ok", "failed", "ok", "ok"]
    else:
        expected = Training(tiny_settings(tmp_path, min_clients=2, **changes), films).train()
        assert set(history["status"]) == {"ok"}
    assert hashes(history) == hashes(expected)


@pytest.fixture
def signed(tmp_path):
    """Films, homes, and a folder with the keys of all hospitals and of a stranger."""
    films = tiny_films(tmp_path)
    homes = tiny_homes(tmp_path / SECRET, films)
    for name in (*homes, "stranger"):
        make_key(tmp_path / "keys", name)
    return homes, tmp_path / "keys"


class KeyGrid(Grid):
    """Hospitals with keys; `speaks` says whose key a node has, by the name that it gives."""

    def __init__(self, homes, keys, speaks=()):
        super().__init__(homes)
        self.keys, self.speaks = keys, dict(speaks)

    def config(self, name):
        folder = self.keys
        if name in self.speaks:  # it calls its own key by another's name
            folder = self.keys.with_name(f"keys of {name}")
            shutil.copytree(self.keys, folder, dirs_exist_ok=True)
            shutil.copy(self.keys / f"{self.speaks[name]}.key", folder / f"{name}.key")
        return super().config(name) | {"keys": str(folder)}


def run_with_keys(work, grid, keys, **changes):
    return NetworkTraining(tiny_settings(work, **changes), grid, 1, str(keys)).train()


def test_a_name_is_bound_to_its_key(tmp_path, signed, capsys):
    """Another node that calls itself by a registered name is left out, and named."""
    homes, keys = signed
    history = run_with_keys(tmp_path / "server", KeyGrid(homes, keys), keys, rounds=1)
    assert set(history["status"]) == {"ok"}
    grid = KeyGrid(homes, keys, {"client-2": "stranger"})
    with pytest.raises(InputError, match="these connected: client-1, client-3"):
        run_with_keys(tmp_path / "other", grid, keys, rounds=1)
    assert "calls itself client-2, and has not its key: left out" in capsys.readouterr().out


def test_masks_are_signed_and_a_server_that_swaps_a_key_is_found(tmp_path, signed, capfd):
    homes, keys = signed
    history = run_with_keys(tmp_path / "server", KeyGrid(homes, keys), keys, rounds=1, **MASKED)
    assert set(history["status"]) == {"ok"}

    class Swaps(KeyGrid):
        """A server in the middle: it puts a key of its own in place of client-3's."""

        def push_messages(self, messages):
            for message in messages:
                order = message.content.config_records["order"]
                if "introduced" in order:
                    introduced = json.loads(order["introduced"])
                    mine = Masker("client-3", "run", 2, {})
                    introduced["client-3"] |= {"key": mine.introduce()["key"]}
                    order["introduced"] = json.dumps(introduced)
            return super().push_messages(messages)

    with pytest.raises(InputError, match="not counted under masks: client-1, client-2, client-3"):
        run_with_keys(tmp_path / "other", Swaps(homes, keys), keys, rounds=1, **MASKED)
    said = capfd.readouterr().out
    assert "no offer of client-1: MaskFault: the mask key of client-3 is not signed" in said


def asked_otherwise(order, name):
    """What an active server might tell one hospital and no other."""
    masks = json.loads(order["masks"])
    changes = {
        "whole": {"masks": json.dumps(masks | {"whole": [10**15, 1]})},
        "round": {"round": order.get("round", 0) + 1},
        "members": {"masks": json.dumps(masks | {"members": masks["members"][:2]})},
        "config": {"config": json.dumps(json.loads(order["config"]) | {"lr": 0.5})},
    }
    return changes[name]


@pytest.mark.parametrize("lie", ["whole", "round", "members", "config"])
def test_hospitals_that_are_asked_for_different_things_send_nothing(tmp_path, signed, lie, capfd):
    """For what a sum is about is signed with each offer."""
    homes, keys = signed

    class Lies(KeyGrid):
        def push_messages(self, messages):
            for message in messages:
                order = message.content.config_records["order"]
                masked = message.metadata.message_type in ("query.offer", "train")
                if masked and "masks" in order and message.metadata.dst_node_id == 11:
                    for key, value in asked_otherwise(order, lie).items():
                        order[key] = value
            return super().push_messages(messages)

    changes = {"rounds": 1, "batchnorm": "frozen"}
    with pytest.raises((FederationError, MaskFault, InputError)):
        run_with_keys(
            tmp_path / "s", Lies(homes, keys), keys, **MASKED | {"min_clients": 3}, **changes
        )


def test_a_sum_of_fewer_than_two_is_refused_whatever_the_server_says(tmp_path):
    home = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))["client-1"]
    config = dataclasses.asdict(tiny_settings(tmp_path, **MASKED)) | {"threads": 1}
    node = {"work_dir": str(home), "name": "client-1"}
    order = {"config": json.dumps(config | {"min_clients": 1}), "run": "run", "trunk": ""}
    with pytest.raises(InputError, match="min_clients=2 or more"):
        Hospital(order, node)
    order["config"] = json.dumps(config)
    assert Hospital(order, node | {"min_clients": "3"}).masker().least == 3


@pytest.mark.parametrize("name", ["../../../escaped", "h1", "A" * 64])
def test_a_state_is_named_by_its_hash_and_by_nothing_else(tmp_path, name):
    home = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))["client-1"]
    config = dataclasses.asdict(tiny_settings(tmp_path)) | {"threads": 1}
    order = {"config": json.dumps(config), "run": "run", "trunk": "", "base": "", "hash": name}
    here = Hospital(order, {"work_dir": str(home), "name": "client-1"})
    with pytest.raises(InputError, match="named by its hash"):
        here.receive({"w": torch.zeros(1)})
    here.order["hash"] = "0" * 64
    with pytest.raises(InputError, match="not the one that the message names"):
        here.receive({"w": torch.zeros(1)})
    here.order |= {"hash": state_hash({"w": torch.zeros(1)}), "base": ""}
    assert here.receive({"w": torch.zeros(1)})["w"].item() == 0
    here.order |= {"base": here.order["hash"], "hash": "1" * 64}
    assert here.receive({"w": torch.ones(1)}) is None, "what is here is not what the server means"


@pytest.mark.parametrize(("kind", "said"), [
    ("query.offer", "{}"), ("query.offer", "5"), ("query.offer", "[" * 200_000),
    ("query.offer", json.dumps({"what": "", "offer": {}, "shares": {}})),
    ("query.agree", "{}"), ("query.agree", '{"signature": 5}'), ("query.reveal", '{"client-1": 5}'),
    ("query.reveal", '{"client-1": "zz", "client-2": "", "client-3": "00"}'), ("train", "5"),
    ("query", "5"),
])  # fmt: skip
def test_a_malformed_reply_costs_its_hospital_not_the_server(tmp_path, kind, said):
    homes, changes = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path)), {"batchnorm": "frozen"}

    grid = Replies(homes, kind, {"said": said, "introduction": said, "name": "client-2"})
    try:
        history = over_flower(tmp_path, grid, rounds=1, **MASKED, **changes)
        assert len(history) == 4
    except InputError as error:  # it never connects, or cannot be counted: nothing begins
        assert kind in ("query", "query.offer") and "client-2" in str(error) + "client-2"


def test_a_hospital_that_returns_under_its_own_node_takes_part_again(tmp_path):
    grid = Grid(tiny_homes(tmp_path / SECRET, tiny_films(tmp_path)))
    network = NetworkTraining(tiny_settings(tmp_path / "server", rounds=3), grid, 1)
    there = iter([{"client-1"}, set(), set()])

    def on_round(row, history):
        grid.dead.clear()
        grid.dead |= next(there)

    history = network.train(on_round)
    found = history[history["client"] == "client-1"]["status"].tolist()
    assert found == ["ok", "left", "failed", "joined", "ok"]


def test_a_hospital_that_insists_on_masks_sends_nothing_bare(tmp_path, signed, capfd):
    homes, keys = signed

    class Insists(KeyGrid):
        def config(self, name):
            return super().config(name) | {"secure_aggregation": "True", "min_clients": "3"}

    with pytest.raises(InputError, match="these connected: none"):
        over_flower(tmp_path, Insists(homes, keys))
    assert "the server asks for bare updates" in capfd.readouterr().err
    for folder in (tmp_path / "empty", tmp_path / "own alone"):  # whose key is whose, unknown
        folder.mkdir()
        for name in homes if "own" in folder.name else ():
            shutil.copy(keys / f"{name}.key", folder)
        with pytest.raises(InputError, match="these connected: none"):
            over_flower(folder, Insists(homes, folder), rounds=1, **MASKED)
        assert "a hospital that insists on masks needs --keys" in capfd.readouterr().err
    history = over_flower(tmp_path / "masked", Insists(homes, keys), rounds=1, **MASKED)
    assert set(history["status"]) == {"ok"}  # three take part, and each wants three


def test_local_models_and_other_arms_are_refused(tmp_path):
    for changes in ({"batchnorm": "local"}, {"arms": "federated,local"}):
        with pytest.raises(InputError, match="over a network only"):
            over_flower(tmp_path, Grid({}), **changes)


# Differential privacy over the network.

DP = {"dp": "patient", "batchnorm": "frozen", "noise_multiplier": 1.0, "delta": 1e-3}


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """A private run, simulated and over Flower: films, histories, the grid, and the folder."""
    pytest.importorskip("opacus", reason="differential privacy needs Opacus")
    work = tmp_path_factory.mktemp("private")
    films = tiny_films(work)
    simulated = Training(tiny_settings(work, **DP), films).train()
    grid = Grid(tiny_homes(work / SECRET, films))
    return films, simulated, over_flower(work, grid, **DP), grid, work


@pytest.mark.parametrize("changes", [{}, DP], ids=["open", "private"])
def test_hospitals_that_look_for_different_findings_have_the_bits_of_the_simulation(
    tmp_path, changes
):
    if changes:
        pytest.importorskip("opacus", reason="differential privacy needs Opacus")
    films = tiny_films(tmp_path)
    for name, finding in (("client-1", FINDINGS[3]), ("client-2", FINDINGS[0])):
        films.index.loc[films.index["client"] == name, finding] = np.nan
    films.labels = films.index[list(FINDINGS)].to_numpy(np.float32)
    expected = hashes(Training(tiny_settings(tmp_path, **changes), films).train())
    grid = Grid(tiny_homes(tmp_path / SECRET, films))
    assert hashes(over_flower(tmp_path, grid, **changes)) == expected


def test_a_private_run_is_the_simulations_with_the_same_noise(private):
    films, simulated, history, _, work = private
    assert hashes(history) == hashes(simulated) and len(set(hashes(history))) == 2
    other = tiny_settings(work, **DP | {"noise_multiplier": 2.0}, name="other")
    assert hashes(Training(other, films).train()) != hashes(simulated), "no noise was drawn"
    plain = tiny_settings(work, batchnorm="frozen", name="plain")
    assert hashes(Training(plain, films).train()) != hashes(simulated)


def test_its_budget_stands_by_hospital_and_round_as_in_the_simulation(private):
    _, simulated, history, _, work = private
    same = ["client", "round", "examples", "epsilon", "status"]
    assert history[same].equals(simulated[same])
    assert (history["epsilon"] > 0).all() and history["train_loss"].isna().all()
    assert (history[history["client"] != ""]["examples"] == 1).all()
    tables = [pd.read_csv(folder / "runs/run/privacy.csv") for folder in (work, work / "server")]
    pd.testing.assert_frame_equal(*tables, check_like=True)


def test_each_hospital_has_written_down_what_it_released(private):
    *_, work = private
    budget = pd.read_csv(work / "runs/run/privacy.csv").set_index("hospital")
    for name in budget.index:
        (release,) = Ledger(work / SECRET / name).read().values()
        assert release.steps == budget["steps"][name]
        assert budget["total_epsilon"][name] == budget["epsilon"][name]


def test_nothing_but_noised_parameters_and_counts_leaves_a_private_hospital(private):
    """And the sums on validation patients, whom no run protects."""
    *_, history, grid, _ = private
    model = build_resnet34("none", "layer1,fc", "frozen", outputs=14)
    shapes = {k: v.shape for k, v in model.named_parameters() if k.startswith(("layer1", "fc"))}
    shapes = {name: shape for name, shape in shapes.items() if ".bn" not in name}
    budget = {"hospital", "patients", "sampling_rate", "noise_multiplier", "steps", "delta",
              "clip", "epsilon", "total_epsilon"}  # fmt: skip
    updates = 0
    for name, reply, _ in [one for one in grid.wire if one[0] != "down"]:
        words, numbers, state = (
            dict(reply.content["words"]),
            reply.content["numbers"],
            unpack(reply),
        )
        assert words.pop("findings", "\n".join(FINDINGS)) == "\n".join(FINDINGS)
        words.pop("introduction", "")  # a public key
        assert words.pop("name", name) == name and words.pop("status") == "ok"
        if reply.metadata.message_type == "train":
            assert {k: v.shape for k, v in state.items()} == shapes
            assert dict(numbers) == {"examples": 1}
            said = json.loads(words["said"])
            assert set(said) == {"account", "stop"} and set(said["account"]) == budget
            updates += 1
        elif reply.metadata.message_type == "evaluate":
            assert not state and set(numbers) == {"loss", "labels", "pairs", "ordered"}
        else:
            assert not state and words == {"reason": ""}
            assert dict(numbers) == {"weight": 1, "known": [1] * 14}  # what it looks for is public
    assert updates == (history["client"] != "").sum() == 6


def test_noise_is_drawn_in_the_hospital_before_anything_leaves(tmp_path):
    """With one film that a gradient could come from, what moves the weights is the noise."""
    films = tiny_films(tmp_path)
    once = films.index.groupby("client").cumcount() == 0
    films.index.loc[~once, list(FINDINGS)] = float("nan")  # then nearly every gradient is zero
    homes = tiny_homes(tmp_path / SECRET, films)
    grid = Grid(homes)
    sgd = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 1.0}
    over_flower(tmp_path, grid, rounds=1, tracked="fc", **DP | sgd)
    sent = next(unpack(m) for n, m, _ in grid.wire if m.metadata.message_type == "train")
    replies = [r for n, r, _ in grid.wire if n != "down" and r.metadata.message_type == "train"]
    for reply in replies:
        moved = (unpack(reply)["fc.weight"] - sent["fc.weight"]).flatten()
        assert moved.std() > 1e-3 and abs(moved.mean()) < moved.std() / 10


def test_a_round_that_a_killed_server_lost_is_spent(tmp_path):
    films = tiny_films(tmp_path)
    homes = tiny_homes(tmp_path / SECRET, films)
    steps = over_flower(tmp_path, Grid(homes), rounds=1, **DP)["epsilon"].iloc[0]

    class Killed(Grid):
        def pull_messages(self, ids):
            replies = super().pull_messages(ids)
            if any(reply.metadata.message_type == "train" for reply in replies):
                raise KeyboardInterrupt  # the updates of round 2 were released and are lost
            return replies

    with pytest.raises(KeyboardInterrupt):
        over_flower(tmp_path, Killed(homes), **DP)
    history = over_flower(tmp_path, Grid(homes), **DP)
    assert hashes(history) == hashes(Training(tiny_settings(tmp_path, **DP), films).train())
    budget = pd.read_csv(tmp_path / "server/runs/run/privacy.csv").set_index("hospital")
    alone = pd.read_csv(tmp_path / "runs/run/privacy.csv").set_index("hospital")
    assert (budget["steps"] == 1.5 * alone["steps"]).all() and steps < budget["epsilon"].min()


def test_a_hospital_whose_budget_is_spent_says_so_and_trains_no_more(tmp_path):
    films = tiny_films(tmp_path)
    changes = DP | {"target_epsilon": 12.0, "rounds": 50}
    homes = tiny_homes(tmp_path / SECRET, films)
    history = over_flower(tmp_path, Grid(homes), **changes)
    expected = Training(tiny_settings(tmp_path, **changes), films).train()
    assert hashes(history) == hashes(expected) and 1 <= history["round"].max() < 50
    assert history["reason"].iloc[-1] == expected["reason"].iloc[-1]
    assert "beyond target_epsilon=12" in history["reason"].iloc[-1]
    afresh = tmp_path / "afresh"  # a server that has forgotten what was spent
    with pytest.raises(FederationError, match=r"stopped \(stopped: the next round would take"):
        over_flower(afresh, Grid(homes), **changes)
    another = changes | {"seeds": "1", "total_epsilon": 12.5}
    reason = over_flower(tmp_path / "another", Grid(homes), **another)["reason"].iloc[-1]
    assert "beyond total_epsilon=12.5" in reason
    assert SECRET not in reason, "where its ledger lies has left a hospital"


# Every parameter is heed or refused.

SERVER = {"work_dir", "name", "profile", "num_clients", "rounds", "client_fraction", "min_clients",
          "max_hours", "device"}  # fmt: skip
PREPARED = {"seed", "image_size"}  # a hospital compares them with what its notebook 02 fixed


def values_of(field):
    """The allowed values of a parameter, other than its default."""
    about, (low, high) = field.metadata, field.metadata["bounds"]
    found = [*about["allowed"], *about["parts"]] or {
        bool: [True, False], int: [max(3, 0 if low == -float("inf") else low + 1)],
        float: [min(0.3, high)], str: ["3"],
    }[type(field.default)]  # fmt: skip
    return [value for value in found if value != field.default]


@pytest.mark.parametrize("name", REFUSED)
def test_what_means_nothing_over_a_network_is_refused_by_name(tmp_path, name):
    settings = tiny_settings(tmp_path)
    for value in values_of(FIELDS[name]):
        with pytest.raises(InputError, match=f"over a network only {name}="):
            NetworkTraining(dataclasses.replace(settings, **{name: value}), Grid({}), 1)


def test_every_other_parameter_reaches_the_hospitals_or_is_the_servers(tmp_path, monkeypatch):
    monkeypatch.setattr(demands, "ROOMS", ())  # one value at a time, whatever goes with it
    settings = tiny_settings(tmp_path / "server", min_clients=2)  # which masks want
    home = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))["client-1"]
    node = {"work_dir": str(home), "name": "client-1"}
    own = {"data_dir", "least_count"}  # the second is what a hospital insists on
    travels = set(FIELDS) - set(REFUSED) - SERVER - PREPARED - own
    assert {"dp", "secure", "clip", "strategy", "mu", "augment", "precision"} <= travels
    for name in sorted(travels):
        for value in values_of(FIELDS[name]):
            changed = dataclasses.replace(settings, **{name: value})
            config = changed.identity() | {"threads": changed.threads or 1}
            config["dtype"] = str(precision(torch.device("cpu"), changed.precision))
            config = server.sent_config(config, changed)
            order = {"config": json.dumps(config), "run": "run", "trunk": ""}
            assert getattr(Hospital(order, node).settings, name) == value, name
    for name in PREPARED:
        config = settings.identity() | {name: 77, "threads": 1}
        with pytest.raises(InputError, match=f"{name}="):
            Hospital({"config": json.dumps(config), "run": "run", "trunk": ""}, node)
    for name in SERVER - {"profile"}:
        rooms = "".join(Path(room.__file__).read_text() for room in (server, training, rounds, run))
        assert f".{name}" in rooms or f"self.{name}" in rooms, name


def reply_with(numbers, words=None, state=None):
    """A hospital's reply, whatever it holds."""
    ask = Message(RecordDict({}), 11, "train")
    content = {"words": ConfigRecord({"status": "ok", "reason": ""} | (words or {}))}
    content |= {"numbers": MetricRecord(numbers), "state": pack(state or {})}
    return Message(RecordDict(content), reply_to=ask)


@pytest.mark.parametrize("examples", [math.inf, 1e308, 6, 4.99, -5, math.nan])
def test_a_hospital_that_claims_another_weight_than_it_came_with_is_left_out(examples):
    state = {"w": torch.ones(3)}
    reply = reply_with({"examples": examples, "train_loss": 0.5}, state=state)
    update, _ = read_update("a", reply, state, 5)
    assert update.status == "failed" and "it came with 5" in update.reason
    honest = reply_with({"examples": 5, "train_loss": 0.5}, state=state)
    assert read_update("a", honest, state, 5)[0].status == "ok"
    nothing = reply_with({"examples": 0, "train_loss": 0.5}, state=state)
    assert read_update("a", nothing, state, 0)[0].status == "failed"
    silent = reply_with({"examples": 5, "train_loss": 0.0}, state=state)
    assert read_update("a", silent, state, 5)[0].status == "failed"


SUMS = {"loss": 2 << 24, "labels": 28, "pairs": [4] * 14, "ordered": [6] * 14}


@pytest.mark.parametrize("wrong", [
    {"ordered": [6] * 13}, {"pairs": [4] * 13}, {"labels": [1, 2]}, {"loss": [1, 2]},
    {"ordered": [9] * 14}, {"ordered": [math.inf] * 14}, {"labels": -42}, {"loss": math.nan},
    {"pairs": [-1] * 14, "ordered": [-2] * 14}, {"loss": 2.0}, {"loss": 1 << 62},
])  # fmt: skip
def test_sums_that_no_films_could_give_are_that_hospitals_fault(wrong):
    assert (
        read_sums(reply_with(SUMS), 14)[1] == ""
        and read_sums(reply_with(SUMS), 14)[0]["labels"] == 28
    )
    found, fault = read_sums(reply_with(SUMS | wrong), 14)
    assert found == {} and fault
    assert read_sums(reply_with({"loss": 1}), 14)[1]


def test_a_lying_hospital_neither_ends_the_validation_nor_moves_it(tmp_path, capfd):
    network = server.Network(Grid({}), tiny_settings(tmp_path))
    network.findings = list(FINDINGS)
    replies = {"a": reply_with(SUMS | {"ordered": [400] * 14}), "b": reply_with(SUMS)}
    network.ask = lambda kind, orders, state: replies.items()
    settings = tiny_settings(tmp_path)
    members = [Member(name, counts(1), settings, 0) for name in "ab"]
    job = rounds.Job("federated", 0, members, None)
    loss, area = network.validate(job, rounds.Progress({}))
    assert area == 0.75 and loss == pytest.approx(2 / 28)
    assert "not validated at a: its sums are none of any films" in capfd.readouterr().out


KEY = public_of(new_secret())


def introduced(node):
    return json.dumps({"key": KEY, "node": str(node), "knows": "", "signature": ""})


def counts(weight):
    return {"weight": weight, "known": [weight] * 14}


NAMES = "\n".join(FINDINGS)


@pytest.mark.parametrize(
    "numbers",
    [{}, {"weight": math.nan}, {"weight": -5}, {"weight": [1]}, {"known": 5}, {"known": [5] * 13},
     {"known": [5] * 13 + [-1]}, {"known": [5.0] * 13 + [math.nan]}],
)  # fmt: skip
def test_an_introduction_that_is_none_is_named_and_its_node_takes_no_part(numbers):
    said = {"key": KEY, "node": "11", "knows": "01", "signature": ""}
    name = {"name": "north", "findings": NAMES, "introduction": json.dumps(said | {"x": 1})}
    about = counts(5) | {"findings": list(FINDINGS), "introduction": said}
    assert read_introduction(reply_with(counts(5), name)) == ("north", about, "")
    numbers = counts(5) | numbers if numbers else {}
    assert read_introduction(reply_with(numbers, name))[2].startswith("no introduction")
    assert read_introduction(reply_with(counts(5)))[2].startswith("no introduction")


def test_a_second_node_of_the_same_name_does_not_replace_the_first(tmp_path, capfd):
    network = server.Network(Grid({}), tiny_settings(tmp_path))
    network.grid.nodes = {11: "a", 12: "a"}
    network.asked = {11: "first", 12: "second"}
    network.wait = lambda asked, end: reply_with(
        counts({"first": 5, "second": 99}[asked]),
        {"name": "a", "findings": NAMES, "introduction": introduced(11)},
    )
    network.discover()
    assert network.nodes == {"a": 11} and network.counts["a"]["weight"] == 5
    assert "SuperNode 12: calls itself a, as SuperNode 11 does" in capfd.readouterr().out


def test_a_hospital_with_other_findings_is_left_out_by_name(tmp_path, capfd):
    network = server.Network(Grid({}), tiny_settings(tmp_path))
    network.grid.nodes = {11: "a", 12: "b"}
    network.asked = {11: "A\nB", 12: "B\nA"}
    network.wait = lambda asked, end: reply_with(
        {"weight": 5, "known": [5, 5]},
        {
            "name": network.grid.nodes[11 if asked == "A\nB" else 12],
            "findings": asked,
            "introduction": introduced(11 if asked == "A\nB" else 12),
        },
    )
    network.discover()
    assert network.nodes == {"a": 11} and network.findings == ["A", "B"]
    assert "b is left out: its findings are B, A, not the run's A, B" in capfd.readouterr().out


@pytest.fixture(scope="module", params=[{}, MASKED], ids=["plain", "masked"])
def tested(request, tmp_path_factory):
    """A run over Flower, tested; the same one simulated and evaluated with all films in one place."""
    work = tmp_path_factory.mktemp("tested")
    films = tiny_films(work, films=300)
    settings = tiny_settings(work, lr=0.003)
    Training(settings, films).train()
    seen = {part: predict_films(settings, films, part) for part in ("val", "test")}
    parts = {
        part: write_predictions(table, work / f"{part}.csv.gz") for part, table in seen.items()
    }
    index = films.index.set_index("image_index").loc[parts["test"]["image_index"].unique()]
    _, metrics, _, _ = evaluate_parts(
        parts["test"], index, {"all": {"all": np.full(len(index), True)}}, settings.seed, REPEATS
    )
    errors = calibrate(parts["test"], films.index, settings.seed).query("hospital == ''")
    points = operating_points(parts["val"], parts["test"], films.index)
    here = {"metrics": metrics, "calibration": errors, "operating_points": points}
    grid = Grid(tiny_homes(work / SECRET, films))
    changes = {"lr": 0.003} | request.param
    training = NetworkTraining(tiny_settings(work / "server", **changes), grid, 1)
    training.train()
    trained = len(grid.wire)
    training.test()
    return training, here, grid, trained


@pytest.mark.parametrize("table", ["metrics", "calibration", "operating_points"])
def test_a_test_over_flower_has_the_tables_of_the_films_in_one_place(tested, table):
    """Values and the ends of intervals within a thousandth."""
    training, here, *_ = tested
    there = read_table(training.run / f"evaluation/{table}.csv")
    one = here[table].reset_index(drop=True)
    assert list(one.columns) == list(there.columns) and len(one) == len(there)
    for name in one.select_dtypes("number"):
        if name != "seed":
            np.testing.assert_allclose(there[name], one[name], atol=1e-3, err_msg=name)
    assert one["value" if table == "metrics" else "finding"].notna().sum() > 14


def test_nothing_but_masked_sums_leaves_a_hospital_in_a_test(tested):
    """Whether or not the updates were masked."""
    *_, grid, trained = tested
    kinds = set()
    for _, reply, _ in [one for one in grid.wire[trained:] if one[0] != "down"]:
        words, kind = dict(reply.content["words"]), reply.metadata.message_type
        kinds.add(kind)
        if kind.startswith("evaluate."):
            assert words == {"status": "ok", "reason": ""}
            assert not dict(reply.content["numbers"])
            numbers = torch.cat([value.flatten() for value in unpack(reply).values()])
            assert numbers.dtype == torch.int64
            counts = np.bincount(numbers.numpy().view(np.uint8), minlength=256)
            assert stats.chisquare(counts).pvalue > 1e-6
    assert {"evaluate.grid", "evaluate.draws", "query.offer", "query.reveal"} <= kinds


def test_a_model_is_tested_once(tested):
    training, _, grid, _ = tested
    sent = len(grid.wire)
    training.test()
    assert len(grid.wire) == sent


def test_a_test_is_of_all_hospitals_or_of_none(tmp_path):
    """While one is away nothing is unmasked; once it is back, the same command tests."""
    films = tiny_films(tmp_path)
    homes = tiny_homes(tmp_path / SECRET, films)
    grid = Replies(homes, "evaluate.grid", {"status": "failed", "reason": "lost"})
    training = NetworkTraining(tiny_settings(tmp_path / "server", rounds=1), grid, 1)
    training.train()
    with pytest.raises(InputError, match="not tested without client-2: the same command tests"):
        training.test()
    kinds = [reply.metadata.message_type for name, reply, _ in grid.wire if name != "down"]
    assert not {"query.agree", "query.reveal"} & {*kinds[kinds.index("evaluate.grid") :]}
    assert not (training.run / "evaluation").is_dir()
    again = NetworkTraining(tiny_settings(tmp_path / "server", rounds=1), Grid(homes), 1)
    again.test()
    assert (training.run / "evaluation/metrics.csv").is_file()


def test_a_hospital_that_lies_in_a_test_is_noticed(tmp_path, monkeypatch):
    homes = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))
    training = NetworkTraining(tiny_settings(tmp_path / "server", rounds=1), Grid(homes), 1)
    training.train()
    count = hospital.draw_sums

    def lie(*about):
        sums = count(*about)
        sums["counts"][0, 0, 0, 0] += 1
        return sums

    monkeypatch.setattr(hospital, "draw_sums", lie)
    with pytest.raises(MaskFault, match="none of any films: somebody lies"):
        training.test()


def test_one_hospital_alone_is_not_tested(tmp_path, capsys):
    films = tiny_films(tmp_path, clients=1)
    grid = Grid(tiny_homes(tmp_path / SECRET, films))
    settings = tiny_settings(tmp_path / "server", rounds=1, num_clients=1)
    training = NetworkTraining(settings, grid, 1)
    training.train()
    training.test()
    assert "not tested: a sum of one hospital is bare" in capsys.readouterr().out


@pytest.mark.parametrize("tested", [{}], indirect=True, ids=["plain"])
def test_notebook_04_shows_what_the_hospitals_counted_and_says_what_is_not_there(tested):
    """Its tables and figures of all films; no film, no single hospital."""
    training, *_ = tested
    values = {"work_dir": training.settings.work_dir, "name": "run"}
    batch_run(values, only="04")
    folder = training.run / "evaluation"
    page = Path(training.settings.work_dir, "notebooks/run/04_evaluate.html").read_text()
    assert page.count("Not here: it needs the films, which never left") > 10
    assert "federated reaches a mean AUROC of" in page and (folder / "auroc.png").is_file()
    for absent in ("roc", "hospitals", "subgroups", "gallery"):
        assert not (folder / f"{absent}.png").is_file()
    assert "3 clients, partition network" in (training.run / "MODEL_CARD.md").read_text()
    assert verify_run(training.settings) == []


def test_a_statement_that_needs_what_is_absent_goes_and_all_that_is_made_of_it():
    cut = LeaveOut({"films"}, {"result"})
    cells = "index = films.index; title = 'x'", "a, b = f(index)", "result = g(a)", "print(result)"
    left = [ast.unparse(cut.visit(ast.parse(cell))).split("\n") for cell in cells]
    assert [line for cell in left for line in cell if "Not here" not in line] == [
        "title = 'x'", "print(result)",
    ]  # fmt: skip
    assert ["Not here" in cell[0] for cell in left] == [True, True, True, False]


def test_before_training_hospitals_tell_counts_and_what_differs(tmp_path, signed, capsys):
    """One was prepared at another size: that shows here, not in round 7. No stranger's word."""
    homes, keys = signed
    for name, home in homes.items():
        path = home / "prepared/report.json"
        report = json.loads(path.read_text()) | {"release": f"set of {name}"}
        report["image_size"] = 64 if name == "client-3" else 32
        path.write_text(json.dumps(report))
    grid = KeyGrid(homes, keys)
    path = ask_hospitals(grid, tiny_settings(tmp_path / "server"), 5, str(keys))
    found = json.loads(path.read_text())
    assert list(found) == ["client-1", "client-2", "client-3"]
    said = capsys.readouterr().out
    assert "image_size differs: client-1, client-2: 32; client-3: 64" in said
    assert found["client-1"]["split"] == {"train": 12, "val": HIDDEN, "test": HIDDEN}
    assert np.array(found["client-1"]["mean film"]).shape == (32, 32)
    content = b"".join(content for *_, content in grid.wire)
    assert SECRET.encode() not in content and b"00000000_000.png" not in content
    grid = KeyGrid(homes, keys, {"client-2": "stranger"})
    again = ask_hospitals(grid, tiny_settings(tmp_path / "other"), 1, str(keys))
    assert "client-2" not in json.loads(again.read_text())
    assert "calls itself client-2, and has not its key" in capsys.readouterr().out
    with pytest.raises(InputError, match="no hospital has said anything"):
        ask_hospitals(Grid({}), tiny_settings(tmp_path / "other"), 0.1)


def test_what_is_no_survey_is_left_out(tmp_path, capsys):
    homes = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))
    words = {"status": "ok", "reason": "", "said": '{"name": "client-2", "counts": {"split": 3}}'}
    grid = Replies(homes, "query.survey", words)
    for home in homes.values():
        path = home / "prepared/report.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"release": "tiny"}))
    found = json.loads(ask_hospitals(grid, tiny_settings(tmp_path / "server"), 1).read_text())
    assert list(found) == ["client-1", "client-3"]
    assert "SuperNode 12: says not who it is" in capsys.readouterr().out


# An active server, and hospitals that break the protocol.


def open_sum(grid, kind, message, members, state=None, **more):
    """What a server learns of one masked sum, whatever it asks for, by the messages alone."""
    order = {"config": json.dumps(grid.settings), "trunk": "trunk", "run": "run"} | more
    masks = {"whole": grid.whole, "members": sorted(members), "nonce": secrets.token_hex(8)}
    sent, state = {name: node for node, name in grid.nodes.items()}, state or {}

    def ask(name, kind, about, tensors):
        """One message, and what is said."""
        records = {"order": ConfigRecord(order | about), "state": pack(tensors)}
        (key,) = grid.push_messages([Message(RecordDict(records), sent[name], kind)])
        words, _, found = messages.read_reply(grid.pull_messages([key])[0])
        if words["status"] != "ok":
            raise MaskFault(words["reason"])
        return json.loads(words.get("said", words.get("introduction", "{}"))), found

    named = state_hash(state) if state else ""
    named = more.get("hash", named)
    about = {"kind": kind, "hash": named}
    introduced = {name: ask(name, "query", {}, {})[0] for name in members}
    about |= {"introduced": json.dumps(introduced), "masks": json.dumps(masks)}
    offered = {name: ask(name, "query.offer", about, {})[0] for name in members}
    one = MaskedSum(offered[members[0]]["what"], offered, len(members))
    for name in members:
        own = masks | {"offers": one.offers, "shares": one.shares_for(name)}
        about = {"masks": json.dumps(own), "hash": named, "base": ""}
        one.add(name, ask(name, message, about, state)[1])
    survivors = {"what": one.what, "survivors": json.dumps(one.survivors)}
    signed = {name: ask(name, "query.agree", survivors, {})[0]["signature"] for name in members}
    revealing = {"what": one.what, "signatures": json.dumps(signed)}
    return one.finish({name: ask(name, "query.reveal", revealing, {})[0] for name in members})


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """The grid of a server that asks as it likes, and the state that a run begins with."""
    work = tmp_path_factory.mktemp("attacked")
    films = tiny_films(work)
    homes = tiny_homes(work / SECRET, films)
    for name in homes:
        make_key(work / "keys", name)
    grid = KeyGrid(homes, work / "keys")
    settings = tiny_settings(work / "server", **MASKED | {"batchnorm": "frozen"})
    config = settings.identity() | {"threads": 1, "dtype": "torch.float32"}
    grid.settings = server.sent_config(config, settings)
    grid.whole = [round(FILM * 40)] * 2
    return grid, to_cpu(start_model(settings, 0, 14).tracked_state())


ABC, AB = ["client-1", "client-2", "client-3"], ["client-1", "client-2"]
FIRST = {"seed": 0, "round": 1, "kept": 0}
COUNTER = "layer1.0.bn1.num_batches_tracked"


@pytest.mark.parametrize(("message", "kind"), [
    ("train", "fit"), ("evaluate", "validate"), ("evaluate.span", "span"), ("query.count", "count"),
])  # fmt: skip
def test_the_same_numbers_are_unmasked_for_one_list_under_whatever_name(attacked, message, kind):
    """Another counter, a parameter that no hospital reads, another run: none makes them others."""
    grid, state = attacked
    state = {} if kind == "count" else state
    about = {"count": {}, "fit": FIRST, "validate": FIRST}.get(kind, {"seed": 0, "round": 0})
    open_sum(grid, kind, message, ABC, state, **about)
    others = [(state, {}, {})]
    if state:
        counted = state | {COUNTER: state[COUNTER] + 1}
        others += [(counted, {}, {}), (state, {"server_lr": 0.99}, {}), (state, {"lr": 2e-3}, {})]
        others += [(counted, {"server_lr": 0.98}, {}), (state, {}, {"run": "another"})]
        others += [(state | {"fc.bias": state["fc.bias"] + 1}, {}, {})]
    before = dict(grid.settings)
    for changed, config, name in others:
        grid.settings = before | config
        with pytest.raises(MaskFault, match="unmasked for client-1, client-2, client-3, and is"):
            open_sum(grid, kind, message, AB, changed, **about, **name)
    grid.settings = before
    if kind == "fit":
        open_sum(grid, kind, message, AB, state, **FIRST | {"round": 2})  # which stays open


@pytest.mark.parametrize(("message", "kind"), [
    ("train", "fit"), ("evaluate", "validate"), ("evaluate.span", "span"),
])  # fmt: skip
def test_a_state_is_whole_or_refused(attacked, message, kind, capfd):
    grid, state = attacked
    less = {name: value for name, value in state.items() if name != "fc.bias"}
    for false in (less, state | {"junk": torch.ones(1)}, state | {"fc.bias": torch.ones(3)}):
        with pytest.raises(MaskFault, match="InputError"):
            open_sum(grid, kind, message, ABC, false, seed=0, round=7, kept=0)
        assert "is not the whole of what is tracked" in capfd.readouterr().err
    with pytest.raises(MaskFault, match="InputError"):
        open_sum(grid, kind, message, ABC, {}, seed=0, round=7, kept=0, hash="a" * 64)
    assert "not the one that the message names" in capfd.readouterr().err


@pytest.mark.parametrize("whole", [[5, 6], [1.5, 1.5], [FILM << 40, FILM], [FILM * 41] * 2, [0, 0]])
def test_a_false_or_second_whole_is_refused(attacked, whole):
    grid, state = attacked
    if whole[0] == FILM * 41:
        open_sum(grid, "fit", "train", ABC, state, seed=0, round=8, kept=0)
    before, grid.whole = grid.whole, whole
    with pytest.raises(
        MaskFault, match=r"(count together|was told whole of run .* name a new run)"
    ):
        open_sum(grid, "fit", "train", ABC, state, seed=0, round=9, kept=0)
    grid.whole = before


def order_for(home, config=None, run="run", **node):
    """A hospital, asked with what a server says."""
    settings = tiny_settings(home / "server", **MASKED)
    about = settings.identity() | {"threads": 1, "dtype": "torch.float32"}
    about = server.sent_config(about, settings) | (config or {})
    order = {"config": json.dumps(about), "run": run, "trunk": ""}
    return Hospital(order, {"work_dir": str(home), "name": "client-1"} | node)


PATIENT = {"dp": "patient", "batchnorm": "frozen", "noise_multiplier": 1.0, "delta": 1e-3}
SECURE = PATIENT | {"secure": True}


@pytest.mark.parametrize(("node", "config", "said"), [
    ({"dp": "patient"}, {}, "insists on dp=patient"),
    ({"total_epsilon": "5"}, {}, "insists on dp=patient"),
    ({}, PATIENT, "secure=false"),
    ({}, {"lr": -1.0}, "lr="), ({}, {"optimizer": "evil"}, "optimizer="),
    ({}, {"batch_size": 0}, "batch_size="), ({}, {"local_epochs": "x"}, "local_epochs="),
    ({}, {"weights": "none", "seeds": "a"}, "seeds="), ({}, {"aggregation": "median"}, "median"),
])  # fmt: skip
def test_a_hospital_checks_what_it_is_asked(tmp_path, monkeypatch, node, config, said):
    pytest.importorskip("opacus", reason="differential privacy needs Opacus")
    monkeypatch.setattr(demands, "noise_is_secret", lambda settings: settings.secure)
    home = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))["client-1"]
    with pytest.raises(InputError, match=said):
        order_for(home, config, **node)
    limits = [
        order_for(home, SECURE | {"total_epsilon": asked}, total_epsilon=own).settings.total_epsilon
        for asked, own in ((0.0, "5"), (3.0, "5"), (9.0, "5"), (9.0, "0"))
    ]
    assert limits == [5, 3, 5, 9]


@pytest.mark.parametrize("run", ["../../../escaped", "a/b", "", ".hidden", "x\ny"])
def test_a_run_that_is_no_name_writes_nothing(tmp_path, run):
    home = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))["client-1"]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="name="):
        order_for(home, run=run)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_memory_that_is_lost_or_restored_is_noticed(tmp_path):
    home = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))["client-1"]
    here = order_for(home)
    older = None
    for number in range(2):
        with here.masking() as masker:
            older = older or json.dumps(masker.memory)
            masker.memory["revealed"][str(number)] = []
    path = home / "privacy/masks.json"
    assert path.stat().st_mode & 0o077 == 0
    for text in (older, None):
        path.unlink()
        if text:
            path.write_text(text)
        with (
            pytest.raises(
                InputError, match=r"masks.json is lost, or an older copy: .* other seeds"
            ),
            here.masking(),
        ):
            pass
        path.touch()
    (home / "masks.count").unlink()
    path.unlink()
    with here.masking() as masker:
        assert not masker.memory["revealed"]


def test_two_processes_of_a_hospital_write_its_memory_in_turn(tmp_path):
    home = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))["client-1"]
    here, there = order_for(home), order_for(home)
    with ThreadPoolExecutor() as pool:
        with here.masking() as masker:
            late = pool.submit(read_memory, there)
            time.sleep(0.3)
            assert not late.done()
            masker.memory["revealed"]["a"] = ["client-1", "client-2"]
        assert late.result()["a"] == ["client-1", "client-2"]


def read_memory(here):
    """What a hospital remembers, once it may look."""
    with here.masking() as masker:
        return dict(masker.memory["revealed"])


@pytest.mark.parametrize("when", ["query.agree", "query.reveal"])
def test_a_run_goes_on_without_a_hospital_that_was_lost_with_its_server(tmp_path, signed, when):
    """Before a share was given; after it the message says with whom, or how else."""
    homes, keys = signed
    changes = {"batchnorm": "frozen"} | MASKED

    class Killed(KeyGrid):
        def pull_messages(self, ids):
            replies = super().pull_messages(ids)
            if any(reply.metadata.message_type == when for reply in replies):
                raise KeyboardInterrupt
            return replies

    with pytest.raises(KeyboardInterrupt):
        NetworkTraining(tiny_settings(tmp_path, **changes), Killed(homes, keys), 1, str(keys))
    history = run_with_keys(tmp_path / "s", KeyGrid(homes, keys), keys, rounds=1, **changes)
    with pytest.raises(KeyboardInterrupt):
        run_with_keys(tmp_path / "s", Killed(homes, keys), keys, rounds=2, **changes)
    grid = KeyGrid(homes, keys)
    grid.dead.add("client-3")
    if when == "query.reveal":
        with pytest.raises(FederationError, match=r"unmasked for client-1, client-2, client-3"):
            run_with_keys(tmp_path / "s", grid, keys, rounds=2, **changes)
        grid.dead.clear()
    history = run_with_keys(tmp_path / "s", grid, keys, rounds=2, **changes)
    last = history[history["round"] == 2]["status"].tolist()
    gone = when == "query.agree"
    assert last == ["left"] * gone + ["ok", "ok", "failed" if gone else "ok", "ok"]


class Lies(Grid):
    """Of some messages client-3 gives a reply that a function has changed."""

    def __init__(self, homes, change):
        super().__init__(homes)
        self.change = change

    def pull_messages(self, ids):
        replies = super().pull_messages(ids)
        for number, reply in enumerate(replies):
            if self.nodes[reply.metadata.src_node_id] == "client-3":
                replies[number] = self.change(reply.metadata.message_type, reply) or reply
        return replies


def test_numbers_of_who_offered_no_masks_do_not_count(tmp_path):
    homes = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))
    counted = []

    def change(kind, reply):
        if kind == "query.offer" and counted:
            return reply_with({}, {"said": "{}"})
        if kind == "query.count":
            counted.append(kind)
        if kind == "train":
            return reply_with({}, {}, seen)
        return None

    seen, expect = {}, MaskedNetwork.expect

    def look(self, *about):
        seen.update(expect(self, *about))
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedNetwork, "expect", look)
        changes = MASKED | {"batchnorm": "frozen"}
        history = over_flower(tmp_path, Lies(homes, change), rounds=1, **changes)
    assert history["status"].tolist()[:3] == ["ok", "ok", "failed"]
    assert history["reason"][2] == "it has offered no masks for this sum"


@pytest.mark.parametrize("lie", [-(2**60), 2**62])
def test_counts_that_no_hospitals_have_are_not_written_down(tmp_path, monkeypatch, lie):
    homes = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))
    hide = Hospital.hide

    def lies(self, kind, numbers):
        if kind == "count" and self.name == "client-3":
            numbers = {name: torch.tensor(lie) for name in numbers}
        return hide(self, kind, numbers)

    monkeypatch.setattr(Hospital, "hide", lies)
    with pytest.raises(MaskFault, match="no hospitals count together"):
        over_flower(tmp_path, Grid(homes), rounds=1, **MASKED)
    assert not list(tmp_path.rglob("whole.json"))


@pytest.mark.parametrize("account", [
    '{"account":{"x":1}}', '{"account":{"epsilon":1}}', '{"account":[],"stop":5}', "[]",
    '{"account":{"epsilon":1' + "0" * 400 + "}}", '{"account":{"epsilon":NaN}}',
])  # fmt: skip
@pytest.mark.parametrize("masks", [{}, MASKED])
def test_a_false_account_costs_its_hospital_not_the_run(tmp_path, account, masks):
    state = {"w": torch.ones(3)}
    reply = reply_with({"examples": 5, "train_loss": 0.5}, {"said": account}, state)
    update, kept = read_update("a", reply, state, None if masks else 5)
    assert (update.status, update.reason) == ("failed", "its budget cannot be read") and not kept


def test_what_a_hospital_says_stays_one_short_line():
    lie = "lost\nround 7: client-1 failed: stole films\x1b[31m" + "x" * 5000
    words, _, _ = messages.read_reply(reply_with({}, {"status": "ok\nround 7", "reason": lie}))
    assert words["status"] == "failed" and len(words["reason"]) == 300
    assert words["reason"].startswith("lost round 7: client-1 failed: stole films [31m")
    said = {"key": KEY, "node": "11", "knows": "", "signature": ""}
    for name in ("a\nround 7", "x" * 400, ""):
        about = {"name": name, "findings": NAMES, "introduction": json.dumps(said)}
        got, _, fault = read_introduction(reply_with(counts(5), about))
        assert got == "" and fault.startswith("no introduction") and "\n" not in fault


@pytest.mark.parametrize("said", [
    {"key": "garbage"}, {"key": "A" * 5000}, {"knows": "2"}, {"knows": "0" * 5000},
    {"signature": "0" * 5000}, {"node": 5},
])  # fmt: skip
def test_an_introduction_without_a_key_of_the_right_curve_is_none(said):
    whole = {"key": KEY, "node": "11", "knows": "01", "signature": ""}
    about = {"name": "a", "findings": NAMES, "introduction": json.dumps(whole | said)}
    assert read_introduction(reply_with(counts(5), about))[2].startswith("no introduction")


def test_what_a_hospital_puts_into_an_offer_beside_is_passed_to_nobody(tmp_path):
    homes = tiny_homes(tmp_path / SECRET, tiny_films(tmp_path))

    def change(kind, reply):
        if kind != "query.offer":
            return None
        said = json.loads(dict(reply.content["words"])["said"])
        return reply_with({}, {"said": json.dumps(said | {"offer": said["offer"] | {"x": "@@@"}})})

    grid = Lies(homes, change)
    history = over_flower(tmp_path, grid, rounds=1, batchnorm="frozen", **MASKED)
    assert set(history["status"]) == {"ok"}
    down = b"".join(content for name, _, content in grid.wire if name == "down")
    assert b"@@@" not in down


def test_a_folder_without_public_keys_is_refused(tmp_path):
    (tmp_path / "keys").mkdir()
    with pytest.raises(InputError, match=r"keys: it has no NAME.key.pub"):
        NetworkTraining(tiny_settings(tmp_path), Grid({}), 1, str(tmp_path / "keys"))


def test_a_finding_that_one_hospital_knows_is_in_no_sum_over_a_network(tmp_path):
    """Not in training, validation or test; what is trained is the masked simulation."""
    films = tiny_films(tmp_path, films=150)
    alone = films.index["client"] == "client-3"
    films.index.loc[~alone, FINDINGS[0]] = np.nan
    films.labels = films.index[list(FINDINGS)].to_numpy(np.float32)
    expected = Training(tiny_settings(tmp_path, rounds=1, **MASKED), films).train()
    sums, unmask = {}, MaskedNetwork.unmask

    def look(self):
        found = unmask(self)
        sums[self.sum.what.split()[0]] = {name: value.clone() for name, value in found.items()}
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedNetwork, "unmask", look)
        homes = tiny_homes(tmp_path / SECRET, films)
        settings = tiny_settings(tmp_path / "server", rounds=1, **MASKED)
        training = NetworkTraining(settings, Grid(homes), 1)
        history = training.train()
        training.test()
    assert hashes(history) == hashes(expected)
    assert history["val_loss"].tolist()[-1] == expected["val_loss"].tolist()[-1]
    assert not sums["fit"]["sum/fc.weight"][0].any() and sums["fit"]["sum/fc.weight"][1].any()
    assert sums["validate"]["pairs"][0] == 0 < sums["validate"]["pairs"][1]
    for kind, name, axis in (("span", "coarse", 0), ("grid", "val", 1), ("grid", "test", 1),
                             ("grid", "taught", 0), ("draws", "counts", 0)):  # fmt: skip
        found = sums[kind][name].movedim(axis, 0)
        assert not found[0].any() and found[1].any(), (kind, name)


def test_test_films_at_one_hospital_alone_are_not_counted(tmp_path):
    films = tiny_films(tmp_path, clients=2)
    index = films.index
    index.loc[(index["client"] == "client-2") & (index["split"] == "test"), "split"] = "val"
    settings = tiny_settings(tmp_path / "server", rounds=1, num_clients=2)
    training = NetworkTraining(settings, Grid(tiny_homes(tmp_path / SECRET, films)), 1)
    training.train()
    training.test()
    found = json.loads((training.run / "evaluation/pooled.json").read_text())
    assert (found["films"], found["patients"]) == (0, 0)
