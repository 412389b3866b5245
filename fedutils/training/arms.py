"""Three arms: federated, centralised and local training are lists of clients."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

from ..base.errors import InputError
from ..base.parameters import Parameters, parameter, split_list
from ..client import Client
from ..dataset import ChestXrayDataset
from ..fedavg import AggregationParameters, FedAvg
from ..films.partition import PartitionParameters
from ..privacy.client import PrivateClient
from ..privacy.masks import MaskParameters
from ..rounds import Job, RoundParameters, sample_clients
from ..strategies import STRATEGIES, StrategyParameters

CLIENTS = {kind.mechanism: kind for kind in (Client, PrivateClient)}
# What means nothing to a client that trains alone, and to one that holds everything.
FEDERATED = (AggregationParameters, MaskParameters, RoundParameters, StrategyParameters)


@dataclass(frozen=True)
class ArmParameters(Parameters):
    """What is trained beside the federated model, and how often."""

    arms: str = parameter("federated", "what to train", parts=("federated", "centralised", "local"))
    seeds: str = parameter(
        "0", "training seeds", pattern=r"numbers such as 0,1,2: \s*\d+\s*(,\s*\d+\s*)*"
    )
    lr_centralised: float = parameter(
        0.0, "learning rate; 0: as lr", bounds=(0.0, math.inf), only="arms=centralised"
    )
    lr_local: float = parameter(
        0.0, "learning rate; 0: as lr", bounds=(0.0, math.inf), only="arms=local"
    )

    def check(self) -> None:
        """Raise InputError where a model would be trained twice, or not by these clients."""
        client_class(self).check(self)
        for name, values in (("arms", self.arm_list), ("seeds", self.seed_list)):
            if len(set(values)) < len(values):
                raise InputError(f"{name}={getattr(self, name)!r} names one twice")

    @property
    def arm_list(self) -> list[str]:
        """The arms to train, in order."""
        return split_list(self.arms)

    @property
    def seed_list(self) -> list[int]:
        """The training seeds, in order."""
        return [int(seed) for seed in split_list(self.seeds)]


def client_class(settings: Parameters) -> type[Client]:
    """Return the class of client that the settings ask for, here and over a network."""
    return CLIENTS[settings.dp]


def with_strategy(settings: Parameters, strategy: type[FedAvg]) -> Parameters:
    """Return the settings for a strategy of one's own: its `server_lr` where none was given.

    Raises InputError for what it cannot work with.
    """
    strategy.check(settings)
    left_open = settings.server_lr == STRATEGIES[settings.strategy].server_lr
    return dataclasses.replace(settings, server_lr=strategy.server_lr) if left_open else settings


def defaults(*rooms: type[Parameters]) -> dict[str, Any]:
    """Return the defaults of the parameters that some rooms declare themselves."""
    return {field.name: field.default for room in rooms for field in dataclasses.fields(room)}


def arm_settings(settings: Parameters, arm: str) -> Parameters:
    """Return the settings of one arm, with the defaults for all that means nothing to it.

    Who trains alone federates nothing, and keeps its BatchNorm to itself by any policy; the
    centralised arm knows no clients. Each arm has its learning rate.
    """
    alone = defaults(*FEDERATED) | {"server_lr": 1.0, "rounds": settings.rounds}
    alone |= {"batchnorm": "average"} if settings.batchnorm == "local" else {}
    rate = {"local": settings.lr_local, "centralised": settings.lr_centralised}.get(arm)
    alone |= {"lr": rate or settings.lr}
    alone |= defaults(PartitionParameters) if arm == "centralised" else {}
    changes = {} if arm == "federated" else alone
    return dataclasses.replace(settings, lr_centralised=0.0, lr_local=0.0, **changes)


def check_rule(job: Job) -> Job:
    """Return a job; InputError where its rule would cut off nobody, and so bear no liar."""
    share = {"mean": 1.0, "median": 0.5}.get(job.settings.aggregation, job.settings.trim)
    drawn = min(len(sample_clients(job, job.settings, 1)), sum(c.weight > 0 for c in job.clients))
    if share < 1 and drawn < max(3, math.ceil(1 / share - 1e-9)):
        what = f"trim={job.settings.trim:g}" if job.settings.aggregation == "trimmed" else "median"
        better = f"trim={math.ceil(100 / drawn) / 100:g} would" if drawn > 2 else "use mean"
        what = f"aggregation={job.settings.aggregation}: {what} of {drawn} clients"
        raise InputError(f"{what} cuts off nobody; {better}")
    known = zip(*(client.known for client in job.clients if client.weight), strict=True)
    if share < 1 and any(any(counts) and not all(counts) for counts in known):
        raise InputError(
            f"aggregation={job.settings.aggregation}: not every hospital has looked for every"
            " finding, and one that few know cannot be defended; use mean"
        )
    return job


def plan(
    settings: Parameters, films: ChestXrayDataset, strategy: type[FedAvg] | None = None
) -> list[Job]:
    """List the models to train; `strategy` is the federated arm's, if the settings name another."""
    train, val = (films.where(films.index["split"] == split) for split in ("train", "val"))
    names = sorted(films.index["client"].unique())
    parts = {name: train.where(train.index["client"] == name) for name in names}
    own = {name: val.where(val.index["client"] == name) for name in names}
    jobs, kind = [], client_class(settings)
    for seed, arm in itertools.product(settings.seed_list, settings.arm_list):
        mine = arm_settings(settings, arm)
        used = strategy if arm == "federated" else None
        if arm == "centralised":  # on as many batches as all clients together
            mine = dataclasses.replace(mine, local_steps=mine.local_steps * len(names))
            jobs.append(Job(arm, seed, [kind("all", train, mine, seed)], val))
            continue
        hospitals = [kind(name, part, mine, seed, used) for name, part in parts.items()]
        if arm == "federated":
            jobs.append(check_rule(Job(arm, seed, hospitals, val)))
        else:
            if bare := [one.name for one in hospitals if not one.weight]:
                raise InputError(f"arms=local: {', '.join(bare)} has no known label to learn from")
            jobs += [Job(arm, seed, [one], own[one.name], one.name) for one in hospitals]
    return jobs
