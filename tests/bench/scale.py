"""One round with many clients or few on the same films: seconds and peak memory."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import workload
from tiny import tiny_films, tiny_settings
from torch import Tensor, nn

import fedutils
from fedutils.base.state import to_cpu
from fedutils.base.threads import Shared
from fedutils.client import Client
from fedutils.dataset import normalise
from fedutils.model import ChestResNet
from fedutils.rounds import Job, Progress, run_round
from fedutils.training.replicas import Replicas


class Small(nn.Sequential):
    """A small convolutional network with what the federation asks of a model."""

    load, tracked_state = ChestResNet.load, ChestResNet.tracked_state

    def forward(self, films: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Turn uint8 films into logits."""
        return super().forward(normalise(films, rng))

    def is_tracked(self, name: str) -> bool:
        """Everything is trained and sent."""
        return True

    def local_names(self) -> set[str]:
        """Nothing stays at home."""
        return set()


def small() -> Small:
    """Build the small network."""
    first = nn.Conv2d(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU()
    second = nn.Conv2d(32, 64, 3, 2), nn.BatchNorm2d(64), nn.ReLU()
    return Small(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 14))


def main(work: str, clients: int, films: int, batch_size: int, network: str) -> None:
    """Train one round of all clients, after one of two of them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = small() if network == "small" else workload.random_network()
    # Not "precise": the small network has no `fc`, and a second pass over the films is no cost of scale.
    settings = tiny_settings(Path(work), batch_size=batch_size, batchnorm="average")
    everything = tiny_films(Path(work), films=films)
    size = films // clients
    parts = [everything.where(everything.index.index // size == i) for i in range(clients)]
    hospitals = [Client(f"client-{i:04d}", part, settings, 0) for i, part in enumerate(parts)]
    now, replicas = Progress(to_cpu(model.tracked_state())), Replicas(Shared([model]), "average")
    strategy = fedutils.FedAvg(settings, set())
    run_round(Job("federated", 0, hospitals[:2], everything), now, replicas, strategy)  # warms up
    began = time.perf_counter()
    *rows, _ = run_round(Job("federated", 0, hospitals, everything), now, replicas, strategy)
    took = time.perf_counter() - began
    assert all(row["status"] == "ok" and row["examples"] == size for row in rows)
    workload.report(seconds=took)


if __name__ == "__main__":
    main(**workload.arguments())
