"""BatchNorm of the aggregated model, measured: the policy `batchnorm="precise"`.

Means of running statistics are not those of the mean model, and remember the weights of steps ago.
So every client shows the new model some of its training films, and the server pools what BatchNorm
saw: PreciseBN (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, arXiv:2105.07576).
"""

import math
from collections.abc import Callable

import numpy as np

from ..base.errors import in_a_line
from ..base.rng import generator
from ..base.state import State, cast_like, count_bytes, find_fault, to_cpu
from ..client import Client
from ..fedavg import FedAvg, WeightedMean
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


def pool_batchnorm(
    measured: list[tuple[State, float]], like: State, aggregator: Callable[[], WeightedMean]
) -> State:
    """Return the statistics of all clients' films together, in the dtypes of a state.

    By the law of total variance, of what each client measured and what it weighs, and by the rule
    of updates: with the mean it is exact, with the others a liar moves it no more than weights.
    """
    means, variances = aggregator(), aggregator()
    for state, weight in measured:
        means.add({k: v for k, v in state.items() if k.endswith(RUNNING_MEAN)}, weight)
    center = means.result()
    for state, weight in measured:
        spread = {}
        for mean in center:
            var = mean.removesuffix(RUNNING_MEAN) + RUNNING_VAR
            spread[var] = state[var].double() + (state[mean].double() - center[mean]).square()
        variances.add(spread, weight)
    return cast_like(center | variances.result(), like)


def measure_safely(
    client: Client, model: ChestResNet, state: State, round: int
) -> tuple[State, str]:
    """Measure a client's BatchNorm; return it, or nothing and the reason."""
    try:
        measured = measure_batchnorm(client, model, state, round)
    except Exception as error:  # named in the history, as a fault in training is
        return {}, in_a_line(error)
    _, fault = find_fault(measured)
    return ({} if fault else measured), fault


def refresh_batchnorm(
    job: Job, now: Progress, executor: Executor, rows: list[Row], strategy: FedAvg
) -> None:
    """Put measured BatchNorm statistics into the new global state; note bytes and faults in `rows`.

    Clients whose update counted take part. Where too few can measure, the averages stay.
    """
    counted = {row["client"]: row for row in rows if row["status"] == "ok"}
    clients = [client for client in job.clients if client.name in counted]
    pool, travels = [], job.arm == "federated"
    for client, (measured, fault) in zip(
        clients, executor.measure(clients, now.state, now.round), strict=True
    ):
        row = counted[client.name]
        row["bytes_up"] += count_bytes(measured) * travels
        row["bytes_down"] += count_bytes(now.state) * travels
        if fault:
            row |= {"status": UNMEASURED, "reason": f"BatchNorm not measured: {fault}"}
        else:
            pool.append((measured, client.weight))
    if len(pool) >= strategy.settings.least_clients:
        now.state = now.state | pool_batchnorm(pool, now.state, strategy.aggregator)
