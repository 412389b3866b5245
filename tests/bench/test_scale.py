"""A thousand clients cost what five cost: the same films, the same time, the same memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# One round of a small convolutional network; prints seconds a round and the peak memory in MB.
CHILD = """
import json, resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from torch import nn
from tiny import tiny_films, tiny_settings
from fedutils.checkpoint import Progress
from fedutils.client import Client
from fedutils.fedavg import FedAvg
from fedutils.federation import Job, Replicas, run_round
from fedutils.images import normalise
from fedutils.model import ChestResNet, to_cpu

class Small(nn.Sequential):
    is_tracked = lambda self, name: True
    load, tracked_state = ChestResNet.load, ChestResNet.tracked_state
    local_names = lambda self: set()
    forward = lambda self, films, rng=None: super().forward(normalise(films, rng))

torch.manual_seed(0)
torch.set_num_threads(1)
work, count = Path(sys.argv[2]), int(sys.argv[3])
model = Small(nn.Conv2d(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2),
              nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 14))
settings = tiny_settings(work, batch_size=32)
films = tiny_films(work, films=64_000)
size = len(films) // count
parts = [films.where((films.index.index // size) == i) for i in range(count)]
clients = [Client(f"client-{i:04d}", part, settings, 0) for i, part in enumerate(parts)]
job, now = Job("federated", 0, clients, films), Progress(to_cpu(model.tracked_state()))
replicas, strategy = Replicas([model], 1), FedAvg(settings, set())
run_round(Job("federated", 0, clients[:2], films), now, replicas, strategy)
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
rows = run_round(job, now, replicas, strategy)
assert all(row["status"] == "ok" and row["examples"] == size for row in rows)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": time.perf_counter() - began, "megabytes": peak / 1024}))
"""


def measure(work, count):
    command = [sys.executable, "-c", CHILD, str(TESTS), str(work), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_thousand_clients_cost_what_five_cost(tmp_path, capsys):
    pairs = [(measure(tmp_path, 1000), measure(tmp_path, 5)) for _ in range(3)]
    time, memory = (
        sorted(many[key] / few[key] for many, few in pairs)[1] for key in ("seconds", "megabytes")
    )
    with capsys.disabled():
        print(f"\n1,000 clients against 5, same films: time {time:.3f}, memory {memory:.3f}")
    assert time <= 1.15 and memory <= 1.10
