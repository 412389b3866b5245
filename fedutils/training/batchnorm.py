"""BatchNorm of the aggregated model, measured: the policy `batchnorm="precise"`.

Means of running statistics are not those of the mean model, and remember the weights of steps ago.
So every client shows the new model some of its training films, and the server pools what BatchNorm
saw: PreciseBN (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, arXiv:2105.07576).
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from ..base.errors import SumFailed, in_a_line
from ..base.fixed import Pool
from ..base.rng import generator
from ..base.state import State, cast_like, count_bytes, find_fault, to_cpu
from ..client import Client
from ..fedavg import FedAvg
from ..model import ChestResNet, calibrate_batchnorm
from ..rounds import UNMEASURED, Executor, FederationError, Job, Progress, Row

MEASURED_FILMS = 256  # of a client, at most, in each round
RUNNING_MEAN, RUNNING_VAR = "running_mean", "running_var"


def measure_batchnorm(client: Client, model: ChestResNet, state: State, round: int) -> State:
    """Return what BatchNorm of the tracked layers sees on a client's films under a global state.

    Of each layer the mean as `running_mean`, and as `running_var` the mean square about that of the
    state, which all clients have: sums that need no second question. Float64 on the CPU; `model` is
    overwritten.
    """
    model.load(state)
    rng = generator(client.seed, "batchnorm", round, client.name)
    positions = rng.permutation(len(client.films))[:MEASURED_FILMS]
    parts = np.array_split(positions, math.ceil(len(positions) / client.settings.batch_size))
    device = model.fc.weight.device
    calibrate_batchnorm(model, (client.films.batch(part, device)[0] for part in parts), "tracked")
    seen = to_cpu(model.tracked_state())
    seen = {k: v.double() for k, v in seen.items() if k.endswith((RUNNING_MEAN, RUNNING_VAR))}
    return about_center(seen, state)


def about_center(seen: State, center: State, sign: int = 1) -> State:
    """Turn variances into mean squares about the means of a state; with sign -1 back again."""
    moved = dict(seen)
    for mean in (name for name in seen if name.endswith(RUNNING_MEAN)):
        var = mean.removesuffix(RUNNING_MEAN) + RUNNING_VAR
        moved[var] = seen[var] + sign * (seen[mean] - center[mean].double()).square()
    return moved


def pool_batchnorm(
    pool: Pool, seen: dict[str, State], like: State, another: Callable[[], Pool]
) -> State:
    """Return the statistics of all clients' films together, in the dtypes of a state.

    By the law of total variance, of what each client measured under the state `like`, which is in
    the `pool`: with the mean it is exact. A rule that bears liars takes what it has `seen` of each
    about the center that it finds, so that one moves it no more than weights.
    """
    found, *_ = pool.result(like)
    center = like
    if pool.sums.robust:
        center = found
        again = another()
        for client, state in seen.items():
            again.add(client, about_center(about_center(state, like, -1), center))
        found, *_ = again.result(like)
    exact = about_center(found, center, -1)
    rounded = {k: v.clamp(min=0) if k.endswith(RUNNING_VAR) else v for k, v in exact.items()}
    return cast_like(rounded, like)


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

    Clients whose update counted take part. Where too few can measure, the averages stay. Raises
    FederationError below a `min_clients` of several, so that the round is repeated.
    """
    counted = {row["client"]: row for row in rows if row["status"] == "ok"}
    clients = [client for client in job.clients if client.name in counted]
    another = functools.partial(executor.pool, job, strategy)
    pool, seen, travels = another(), {}, job.arm == "federated"
    for client, (measured, fault) in zip(
        clients, executor.measure(clients, now.state, now.round), strict=True
    ):
        row = counted[client.name]
        row["bytes_up"] += count_bytes(measured) * travels
        if fault:
            row |= {"status": UNMEASURED, "reason": f"BatchNorm not measured: {fault}"}
        else:
            pool.add(client.name, measured)
            seen[client.name] = measured
    wanted = min(strategy.settings.min_clients, len(job.clients))
    if pool.sums.count < wanted > 1:
        raise FederationError(job, list(counted.values()), "too few measured BatchNorm")
    if pool.sums.count >= strategy.settings.least_clients:
        try:
            pooled = pool_batchnorm(pool, seen, now.state, another)
        except SumFailed as error:
            for row in counted.values():
                row |= {"status": UNMEASURED, "reason": f"BatchNorm not measured: {error}"}
            return
        now.state = now.state | pooled
        for row in counted.values():  # the rest of the state goes down once, at the next round
            row["bytes_down"] += count_bytes(pooled) * travels
