"""What every arm of the comparison trains: the same films, clients, model and hyper-parameters.

The films are a phantom's, written once and decoded once by the project's own code. BatchNorm is
frozen in every arm, since pfl exchanges no buffers: so all of them do the same arithmetic. What a
federation adds is a fixed cost a client and round; a client here trains on 192 films a round, a
hundredth of what one of five clients has of NIH's films.
"""

import functools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

import fedutils
from fedutils.base.device import count_cores
from fedutils.base.scores import judge, validation_sums
from fedutils.client import predict
from fedutils.dataset import ChestXrayDataset
from fedutils.films.phantom.write import draw_batch
from fedutils.model import ChestResNet

CLIENTS, VALIDATION = 4, 96
FILMS = {64: 768, 224: 192}  # by their size in pixels
BATCH, EPOCHS, RATE, MOMENTUM = 32, 1, 0.01, 0.9
PATIENTS = {64: 1000, 224: 600}  # of the phantom: enough for that many films at each client
THREADS = count_cores()


def settings(work: Path, **changes: Any) -> fedutils.Settings:
    """Return the settings of our arm: the trunk frozen, plain SGD, no augmentation."""
    values = {"work_dir": str(work), "profile": "demo", "name": "run", "image_size": size(work)}
    values |= {"num_clients": CLIENTS, "tracked": "layer4,fc", "batchnorm": "frozen"}
    values |= {"optimizer": "sgd", "lr": RATE, "momentum": MOMENTUM, "weight_decay": 0.0}
    values |= {
        "batch_size": BATCH,
        "local_epochs": EPOCHS,
        "device": "cpu:0",
        "threads": THREADS,
        "augment": False,
    }
    return fedutils.read_parameters(values | {"precision": "fp32"} | changes)


def size(work: Path) -> int:
    """Return the size of the films that lie there."""
    return fedutils.read_report(work / "prepared")["image_size"]


def decode(data_dir: str, work: Path, size: int) -> None:
    """Do what notebook 02 does: read the tables, split the patients, decode, write the index."""
    data = fedutils.open_data(data_dir, work)
    table = data.table.assign(split=fedutils.split_patients(data.table, 0))
    films = fedutils.decode_films(table, data.folder, work / "prepared", size)
    about = data.about() | {"seed": 0, "image_size": size}
    fedutils.write_index(table, films, data.boxes, work / "prepared", about)


def place(prepared: Path, clients: int) -> pd.DataFrame:
    """Return the index with the client of each film's patient, dealt at random."""
    index = fedutils.read_index(prepared)
    placed = fedutils.partition_patients(index, "iid", clients, 0.5, 0).set_index("patient_id")
    return index.assign(client=index["patient_id"].map(placed["client"]))


def prepare(work: Path, size: int) -> None:
    """Write and decode the phantom, once."""
    if not (work / "prepared" / "index.csv").is_file():
        decode(str(fedutils.write_phantom(work / "phantom", PATIENTS[size], size)), work, size)


def films(work: Path) -> ChestXrayDataset:
    """Return the training films, equally many a client, and VALIDATION validation films."""
    index, count = place(work / "prepared", CLIENTS), FILMS[size(work)]
    train = index[index["split"] == "train"].groupby("client").head(count // CLIENTS)
    val = index[index["split"] == "val"].head(VALIDATION)
    assert (len(train), len(val)) == (count, VALIDATION), "the phantom has too few patients"
    return ChestXrayDataset(work / "prepared", pd.concat([train, val]).sort_index())


def training_films(work: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each client's training films, uint8 (N, 1, H, W), and labels (N, 14), in memory."""
    everything = films(work)
    train = everything.where(everything.index["split"] == "train")
    parts = {name: train.where(train.index["client"] == name) for name in train.index["client"]}
    return {name: part.batch(np.arange(len(part))) for name, part in sorted(parts.items())}


def validate(work: Path) -> Callable[[ChestResNet], float]:
    """Return the function that gives a model's mean AUROC on the validation films."""
    everything = films(work)
    val = everything.where(everything.index["split"] == "val")
    return lambda model: judge([validation_sums(val.labels, predict(model, val))])[1]


def build() -> ChestResNet:
    """Return the network that every arm starts from."""
    torch.set_num_threads(THREADS)
    return random_network("frozen")


def random_network(batchnorm: str = "average") -> ChestResNet:
    """Return random weights as a run starts from them: BatchNorm has seen phantom films."""
    films = functools.partial(draw_batch, 32, 64)
    return fedutils.build_resnet34("none", "layer4,fc", batchnorm, draw_films=films, outputs=14)


def loss(model: ChestResNet, batch: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a batch of uint8 films."""
    return F.binary_cross_entropy_with_logits(model(batch), labels)


def optimizer(model: ChestResNet) -> torch.optim.Optimizer:
    """Return a fresh optimiser of what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=RATE, momentum=MOMENTUM)


def train_alone(model: ChestResNet, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Train a model on batches that lie in memory, and do nothing else: the limit of a client."""
    sgd = optimizer(model.train())
    for batch, labels in batches:
        sgd.zero_grad()
        loss(model, batch, labels).backward()
        sgd.step()


def report(**measured: Any) -> None:
    """Print what an arm measured, with its own peak memory, as the last line of its output."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(measured | {"own_megabytes": peak}), flush=True)


def arguments() -> dict[str, Any]:
    """Return the arguments that the harness gave to this arm."""
    return json.loads(sys.argv[1])


class Laps:
    """Seconds between calls of `lap`, beginning where it is made."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = time.perf_counter()

    def lap(self) -> None:
        """End a lap and begin the next."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


class Watch:
    """Adds up the seconds that are spent in functions and methods, by label."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def on(self, owner: Any, name: str, label: str) -> None:
        """Time each call of `owner.name` from now on, in every thread."""
        work = getattr(owner, name)

        @functools.wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            """Call the function and add its time."""
            began = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self.seconds[label] = self.seconds.get(label, 0.0) + took

        setattr(owner, name, timed)
