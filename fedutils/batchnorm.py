"""BatchNorm of the aggregated model, measured: the policy `batchnorm="precise"`.

The mean of the clients' running statistics is not the statistics of the mean of their weights, and
running statistics remember the weights of steps ago. So after each aggregation every client sends
the new model some of its training films (no labels, no gradients) and reports what BatchNorm sees;
the server pools that exactly. Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021,
arXiv:2105.07576), call it PreciseBN; pooled over clients it stands in no framework that we know.
"""

import math

import numpy as np

from .client import Client
from .fedavg import WeightedMean, cast_like
from .model import ChestResNet, calibrate_batchnorm
from .rng import generator
from .weights import State, to_cpu

MEASURED_FILMS = 256  # of a client, at most, in each round
MEAN, VARIANCE = "running_mean", "running_var"


def measure_batchnorm(client: Client, model: ChestResNet, state: State, round: int) -> State:
    """Return what BatchNorm of the tracked layers sees on a client's films under a global state.

    `running_mean` and `running_var` of each layer, float32 on the CPU; `model` is overwritten.
    """
    model.load(state)
    rng = generator(client.seed, "batchnorm", round, client.name)
    positions = rng.permutation(len(client.films))[:MEASURED_FILMS]
    parts = np.array_split(positions, math.ceil(len(positions) / client.settings.batch_size))
    device = model.fc.weight.device
    calibrate_batchnorm(model, (client.films.batch(part, device)[0] for part in parts), "tracked")
    measured = {k: v for k, v in model.tracked_state().items() if k.endswith((MEAN, VARIANCE))}
    return to_cpu(measured)


class PooledBatchNorm:
    """The statistics of all clients' films together, by the law of total variance."""

    def __init__(self) -> None:
        self.moments = WeightedMean()

    def add(self, measured: State, films: int) -> None:
        """Add what one client measured, weighted by its films."""
        moments = {name: value.double() for name, value in measured.items()}
        for name in [name for name in moments if name.endswith(VARIANCE)]:
            moments[name] += moments[name.removesuffix(VARIANCE) + MEAN].square()
        self.moments.add(moments, films)

    def result(self, like: State) -> State:
        """Return the pooled statistics in the dtypes of a state; nothing if nobody measured."""
        pooled = self.moments.result() if self.moments.count else {}
        for name in [name for name in pooled if name.endswith(VARIANCE)]:
            pooled[name] -= pooled[name.removesuffix(VARIANCE) + MEAN].square()
        return cast_like(pooled, like)
