"""Small runs of every kind, for `same_bits.py`: what they train, evaluate and decode, as text.

They do with the package of the current folder, be it of an older revision, what the notebooks do.
So they use names that every layout of the package has: those of the root, and a few that `find`
looks for where they were and where they are.
"""

import argparse
import copy
import functools
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torchvision.models import resnet34

import fedutils
from fedutils.films.phantom.cases import FINDINGS

Result = dict[str, str]  # what a run gave: hashes and the content of files, by name
SHA = "state_sha256 of "  # begins the name of a hash
INDEX = [
    "image_index", "row", "source", "patient_id", "follow_up", "age", "sex", "view", "scanner",
    "split",
]  # fmt: skip
HISTORY = [
    "arm", "seed", "round", "client", "train_loss", "val_loss", "val_auroc", "examples", "bytes_up",
    "bytes_down", "status", "reason", "epsilon",
]  # fmt: skip
TINY = {
    "profile": "demo", "image_size": 32, "num_clients": 3, "tracked": "layer1,fc", "batch_size": 8,
    "rounds": 2, "lr": 0.001, "threads": 1, "device": "cpu", "name": "run",
}  # fmt: skip
SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.05}
PRIVATE = {"dp": "patient", "batchnorm": "frozen", "clip": 1.0}
HEAD = {"tracked": "layer4,fc", "augment": False}
CHANGES: dict[str, dict[str, Any]] = {
    "fedavg": {},  # with batchnorm=precise
    "fedavgm": {"strategy": "fedavgm"},
    "fedadam": {"strategy": "fedadam"},
    "fedprox": {"strategy": "fedprox", "mu": 0.1},
    "scaffold": {"strategy": "scaffold"} | SGD,
    "average": {"batchnorm": "average"},
    "frozen": {"batchnorm": "frozen"},
    "local-batchnorm": {"batchnorm": "local"},
    "median": {"aggregation": "median", "num_clients": 5},
    "trimmed": {"aggregation": "trimmed", "num_clients": 5},
    "private": PRIVATE | {"noise_multiplier": 1.0},
    "private-epsilon": PRIVATE
    | {"target_epsilon": 20.0, "batch_size": 64},  # all, quick to account
    "cached": HEAD | {"cache_features": True},
    "not-cached": HEAD,
    "fraction": {"client_fraction": 0.6},
    "two-replicas": {"device": "cpu,cpu"},
}
NEEDS = {"private": "opacus", "private-epsilon": "opacus", "flower": "flwr"}


def find(name: str, *places: str) -> Any:
    """Return what has this name in the first of these modules that is there and has it."""
    for place in places:
        try:
            return getattr(import_module(place), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise ImportError(f"{name} is in none of {', '.join(places)}")


def draw_films() -> np.ndarray:
    """Return the films that a random trunk is calibrated on."""
    return find("draw_batch", "fedutils.films.phantom.write", "fedutils.phantom")(32, 64)


def build_once() -> None:
    """Build equal models once and copy them, in every module: it takes as long as the training."""
    used = fedutils.Training, fedutils.predict_films, fedutils.pointing_game  # loads their modules
    assert used
    built, drawn = functools.cache(fedutils.build_resnet34), functools.cache(draw_films)
    for name, module in list(sys.modules.items()):
        if name.startswith("fedutils") and hasattr(module, "build_resnet34"):
            module.build_resnet34 = lambda *how, **more: copy.deepcopy(
                built(*how, **more | ({"draw_films": drawn} if "draw_films" in more else {}))
            )


def write_prepared(prepared: Path, pixels: np.ndarray, index: pd.DataFrame) -> None:
    """Write what notebook 02 leaves for these films, their rows numbered anew."""
    prepared.mkdir(parents=True, exist_ok=True)
    np.save(prepared / "images.npy", pixels)
    index.assign(row=np.arange(len(index))).to_csv(prepared / "index.csv", index=False)
    about = {"seed": 0, "image_size": pixels.shape[1], "fingerprint": "tiny", "labels_by": ""}
    about["declared"] = {"": FINDINGS}  # of revisions that ask for it
    (prepared / "report.json").write_text(json.dumps(about))


def begin(work: Path, **changes: Any) -> tuple[fedutils.Settings, fedutils.ChestXrayDataset]:
    """Return settings and random films, on which each finding brightens its own stripe."""
    rng, patient = np.random.default_rng(0), np.arange(100)
    labels = rng.random((100, len(FINDINGS))) < 0.4
    pixels = rng.integers(0, 100, (100, 32, 32), dtype=np.uint8)
    for finding in range(len(FINDINGS)):
        pixels[labels[:, finding], 2 * finding : 2 * finding + 2] += 120
    about = dict(zip(FINDINGS, labels.T.astype(int), strict=True)) | {
        "image_index": [f"{p:08d}_000.png" for p in patient],
        "row": patient,
        "source": "",
        "patient_id": patient.astype(str),
        "follow_up": 0,
        "age": 17 + patient % 49,  # test patients of 40 and of 60 are among them
        "sex": np.array(["F", "M"])[patient // 5 % 2],
        "view": np.array(["PA", "AP"])[patient // 10 % 2],
        "scanner": "0.143",
        "split": np.array(["train", "train", "val", "test", "test"])[patient % 5],
    }
    write_prepared(work / "prepared", pixels, pd.DataFrame(about)[INDEX + [*FINDINGS]])
    settings = fedutils.read_parameters(TINY | {"work_dir": str(work)} | changes)
    index = fedutils.read_index(work / "prepared")
    index["client"] = [f"client-{1 + p // 5 % settings.num_clients}" for p in patient]
    return settings, fedutils.ChestXrayDataset(work / "prepared", index)


def outcome(
    settings: fedutils.Settings, films: fedutils.ChestXrayDataset, history: pd.DataFrame
) -> Result:
    """Evaluate a run as notebook 04 does; return all that is compared."""
    clients = films.index[["patient_id", "client", "split"]].drop_duplicates()
    clients.to_csv(settings.run / "clients.csv", index=False)
    films, folder = fedutils.read_films(settings), settings.run / "evaluation"
    stored = getattr(fedutils, "stored_features", lambda _, films: films)
    predicted = fedutils.predict_films(settings, stored(settings, films), "test")
    read = fedutils.write_predictions(predicted, folder / "predictions.csv.gz")
    result = fedutils.evaluate_models(read, films, seed=0, repeats=50)
    fedutils.write_summary(settings, result, "tiny")
    found = {}
    for row in history[history["state_sha256"].fillna("") != ""].itertuples():
        model = " ".join(filter(None, [row.arm, f"s{row.seed}", row.client]))
        found[f"{SHA}{model}, round {row.round}"] = row.state_sha256
    found["history.csv"] = history[HISTORY].to_csv(index=False)
    with gzip.open(folder / "predictions.csv.gz") as file:
        found["predictions.csv.gz"] = file.read().decode()
    written = [folder / "metrics.csv", folder / "differences.csv", settings.run / "privacy.csv"]
    return found | {path.name: path.read_text() for path in written if path.is_file()}


def train(work: Path, **changes: Any) -> Result:
    """Train and evaluate."""
    settings, films = begin(work, **changes)
    return outcome(settings, films, fedutils.Training(settings, films).train())


@functools.cache
def simulation() -> Result:
    """Return the run that others must equal, for which it is done once."""
    with tempfile.TemporaryDirectory() as work:
        return train(Path(work))


def check_states(found: Result) -> Result:
    """Return what a run gave; raise unless its states are those of the plain simulation."""
    one, two = ({k: v for k, v in r.items() if SHA in k} for r in (found, simulation()))
    if one != two:
        raise RuntimeError("its states are not those of the undisturbed simulation")
    return found


def train_until_killed(work: Path) -> None:
    """Train, and kill this process a moment after round 2 has begun."""
    settings, films = begin(work)

    def kill_soon(*_: Any) -> None:
        """Wait until round 1 is written, and set the clock."""
        while not (settings.run / "history.csv").is_file():
            time.sleep(0.01)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()

    fedutils.Training(settings, films).train(kill_soon)


def killed(work: Path) -> Result:
    """Go on with a run that was killed in round 2."""
    command = [sys.executable, __file__, "--killed", str(work)]
    if subprocess.run(command, timeout=300).returncode != -signal.SIGKILL:
        raise RuntimeError("no kill landed")
    return check_states(train(work))


def from_file(work: Path) -> Result:
    """Start from a state dict with torchvision's names."""
    source, state = torch.Generator().manual_seed(1), resnet34().state_dict()
    for value in filter(torch.is_floating_point, state.values()):
        if value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=source)
        else:
            value.uniform_(generator=source)
    torch.save(state, work / "drawn.pth")
    return train(work, weights=str(work / "drawn.pth"))


class Grid:
    """Flower's SuperLink in memory: each hospital, a work folder, answers at once."""

    def __init__(self, homes: dict[str, Path]) -> None:
        self.nodes, self.replies = dict(enumerate(homes.items(), 11)), {}
        self.answer = find(
            "client_app",
            "fedutils.network.clientapp",
            "fedutils.network.hospital",
            "fedutils.flower",
        )

    def get_node_ids(self) -> list[int]:
        """List the hospitals."""
        return list(self.nodes)

    def push_messages(self, messages: list[Any]) -> list[str]:
        """Let the hospitals answer, in the reverse order of asking."""
        from flwr.app import Context, RecordDict

        for message in reversed(messages):
            node = message.metadata.dst_node_id
            name, home = self.nodes[node]
            message.metadata.__dict__ |= {"_src_node_id": 1, "_message_id": message.object_id}
            here = Context(1, node, {"name": name, "work_dir": str(home)}, RecordDict(), {})
            self.replies[message.object_id] = self.answer(message, here)
        return [message.object_id for message in messages]

    def pull_messages(self, ids: list[str]) -> list[Any]:
        """Hand out the replies."""
        return [self.replies.pop(key) for key in ids if key in self.replies]


def flower(work: Path) -> Result:
    """Train over Flower's messages; each hospital has its own films only."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 2, 3
    (settings, films), homes = begin(work), {}
    for name, index in films.index.groupby("client"):
        homes[name], own = work / name, index.drop(columns="client")
        write_prepared(work / name / "prepared", films.store[index["row"]], own)
    network = find("NetworkTraining", "fedutils.network.server", "fedutils.flower")
    return check_states(outcome(settings, films, network(settings, Grid(homes), 1).train()))


def arms(work: Path) -> Result:
    """Train all arms with two seeds, and make the other tables of notebook 04 too."""
    more = {"arms": "federated,centralised,local", "seeds": "0,1", "num_clients": 2}
    settings, films = begin(work, **more)
    found = outcome(settings, films, fedutils.Training(settings, films).train())
    test, validation = (fedutils.predict_films(settings, films, s) for s in ("test", "val"))
    attack = getattr(fedutils, "attack_models", None) or fedutils.membership
    drawn = fedutils.attack_films(films, 0)
    attacked = [fedutils.predict_films(settings, drawn, s) for s in ("train", "val")]
    tables = {
        "operating_points.csv": fedutils.operating_points(validation, test, films.index),
        "membership.csv": attack(attacked, films, 0),
    }
    return found | {name: table.to_csv(index=False) for name, table in tables.items()}


def phantom(work: Path) -> Result:
    """Decode films of the phantom, place their patients in every way, train, and play on boxes."""
    data = fedutils.open_data(str(fedutils.write_phantom(work / "phantom", 60, 64)), work)
    table = data.table.assign(split=fedutils.split_patients(data.table, 0))
    table, prepared = fedutils.choose_films(table, 80, 0), work / "prepared"
    films = fedutils.decode_films(table, data.folder, prepared, 224)
    about = {"release": data.release, "seed": 0, "image_size": 224, "lists": list(data.lists)}
    about |= {"source": "phantom", "labels_by": "drawn"}
    report = fedutils.write_index(table, films, data.boxes, prepared, about)
    found = {"fingerprint": report["fingerprint"]}
    found["images.npy"] = hashlib.sha256((prepared / "images.npy").read_bytes()).hexdigest()
    found |= {name: (prepared / name).read_text() for name in ("index.csv", "boxes.csv")}
    index = fedutils.read_index(prepared)
    for method in ("iid", "dirichlet", "scanner"):
        clients = fedutils.partition_patients(index, method, 3, 0.5, 0)
        found[f"clients.csv, {method}"] = clients.to_csv(index=False)
    index["client"] = index["patient_id"].map(clients.set_index("patient_id")["client"])
    changes = {"work_dir": str(work), "image_size": 224, "partition": "scanner", "rounds": 1}
    settings = fedutils.read_parameters(TINY | HEAD | changes)
    films = fedutils.ChestXrayDataset(prepared, index)
    found |= outcome(settings, films, fedutils.Training(settings, films).train())
    return found | {"pointing.csv": fedutils.pointing_game(settings, films).to_csv(index=False)}


RUNS: dict[str, Callable[[Path], Result]] = {
    name: partial(train, **changes) for name, changes in CHANGES.items()
}
RUNS |= {"fedavg": lambda _: simulation(), "arms": arms, "killed": killed, "file": from_file}
RUNS |= {"flower": flower, "phantom": phantom}


def run_all(names: list[str], out: Path) -> None:
    """Do these runs with the package of the current folder; a failed one leaves its reason."""
    if Path(fedutils.__file__).resolve().parents[1] != Path.cwd().resolve():
        raise SystemExit(f"{fedutils.__file__} is not the package of {Path.cwd()}")
    torch.set_num_threads(1)
    build_once()
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            try:
                results[name] = RUNS[name](Path(work))
            except Exception as error:  # of this run; the others go on
                traceback.print_exc()
                results[name] = {"error": f"{type(error).__name__}: {error}"}
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(RUNS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--killed", type=Path, help="only train in this folder until killed")
    given = parser.parse_args()
    if given.killed:
        train_until_killed(given.killed)
    else:
        run_all(given.only.split(","), given.out)
