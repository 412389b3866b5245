"""BatchNorm of the aggregated model, measured: the policy `batchnorm="precise"`.

The mean of the clients' running statistics is not the statistics of the mean of their weights, and
running statistics remember the weights of steps ago. So after each aggregation every client sends
the new model some of its training films (no labels, no gradients) and reports what BatchNorm sees;
the server pools that exactly. Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021,
arXiv:2105.07576), call it PreciseBN; pooled over clients it stands in no framework that we know.
"""

import math

import numpy as np

from ..base.errors import in_a_line
from ..base.rng import generator
from ..base.state import State, cast_like, count_bytes, non_finite, to_cpu
from ..client import Client
from ..fedavg import WeightedMean
from ..model import ChestResNet, calibrate_batchnorm
from ..rounds import UNMEASURED, Executor, Job, Progress, Row

MEASURED_FILMS = 256  # of a client, at most, in each round
RUNNING_MEAN, RUNNING_VAR = "running_mean", "running_var"


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
    measured = {
        k: v for k, v in model.tracked_state().items() if k.endswith((RUNNING_MEAN, RUNNING_VAR))
    }
    return to_cpu(measured)


class PooledBatchNorm:
    """The statistics of all clients' films together, by the law of total variance."""

    def __init__(self) -> None:
        self.moments = WeightedMean()

    def add(self, measured: State, films: int) -> None:
        """Add what one client measured, weighted by its films."""
        moments = {name: value.double() for name, value in measured.items()}
        for name in [name for name in moments if name.endswith(RUNNING_VAR)]:
            moments[name] += moments[name.removesuffix(RUNNING_VAR) + RUNNING_MEAN].square()
        self.moments.add(moments, films)

    def result(self, like: State) -> State:
        """Return the pooled statistics in the dtypes of a state; nothing if nobody measured."""
        pooled = self.moments.result() if self.moments.count else {}
        for name in [name for name in pooled if name.endswith(RUNNING_VAR)]:
            pooled[name] -= pooled[name.removesuffix(RUNNING_VAR) + RUNNING_MEAN].square()
        return cast_like(pooled, like)


def measure_safely(
    client: Client, model: ChestResNet, state: State, round: int
) -> tuple[State, str]:
    """Measure a client's BatchNorm; return it, or nothing and the reason."""
    try:
        measured = measure_batchnorm(client, model, state, round)
    except Exception as error:  # named in the history, as a fault in training is
        return {}, in_a_line(error)
    bad = non_finite(measured)
    return ({}, f"{bad[0]} is not finite") if bad else (measured, "")


def refresh_batchnorm(job: Job, now: Progress, executor: Executor, rows: list[Row]) -> None:
    """Put measured BatchNorm statistics into the new global state; note bytes and faults in `rows`.

    Clients whose update counted take part. Where none can measure, the averages stay.
    """
    counted = {row["client"]: row for row in rows if row["status"] == "ok"}
    clients = [client for client in job.clients if client.name in counted]
    pool, travels = PooledBatchNorm(), job.arm == "federated"
    for client, (measured, fault) in zip(
        clients, executor.measure(clients, now.state, now.round), strict=True
    ):
        row = counted[client.name]
        row["bytes_up"] += count_bytes(measured) * travels
        row["bytes_down"] += count_bytes(now.state) * travels
        if fault:
            row |= {"status": UNMEASURED, "reason": f"BatchNorm not measured: {fault}"}
        else:
            pool.add(measured, client.weight)
    now.state = now.state | pool.result(now.state)
