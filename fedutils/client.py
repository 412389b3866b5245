"""Client: local training on its own films; only an Update leaves, never a film."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .base.device import precision
from .base.errors import InputError
from .base.parameters import Parameters, parameter
from .base.rng import generator
from .base.state import LOSS, State, is_beside, to_cpu
from .dataset import AT_ONCE, ChestXrayDataset, draw_motion
from .fedavg import FedAvg
from .model import ChestResNet
from .strategies import STRATEGIES


@dataclass(frozen=True)
class ClientParameters(Parameters):
    """How a client trains on its own films."""

    local_epochs: int = parameter(1, "passes over films", bounds=(1, 1000), only="local_steps=0")
    local_steps: int = parameter(
        0, "steps a round of each client, few films or many, which stay its weight in the mean; the"
        " centralised arm takes those of all clients; 0: local_epochs", bounds=(0, 1_000_000),
    )  # fmt: skip
    batch_size: int = parameter(0, "films a step", bounds=(1, 4096), profiles=(32, 64))
    optimizer: str = parameter("adamw", "of the clients", allowed=("adamw", "sgd"))
    lr: float = parameter(0.0, "learning rate; 0: 4e-4, or 1e-3 with weights", bounds=(0, math.inf))
    momentum: float = parameter(0.9, "of sgd", bounds=(0.0, 1.0), only="optimizer=sgd")
    weight_decay: float = parameter(1e-4, "of the local optimiser", bounds=(0.0, math.inf))
    augment: bool = parameter(True, "turn and shift training films a little, anew in each epoch")

    def passes(self, films: float) -> float:
        """Return how often a client goes through so many films in a round."""
        batches = max(1, math.ceil(films / self.batch_size))
        return self.local_steps / batches if self.local_steps else self.local_epochs


@dataclass(frozen=True)
class Update:
    """What a client sends back: `state` holds CPU tensors by name, `examples` is its weight."""

    client: str
    examples: float
    state: State = field(default_factory=dict)
    train_loss: float = math.nan
    seconds: float = 0.0
    status: str = "ok"
    reason: str = ""
    epsilon: float = math.nan

    @property
    def loss(self) -> State:
        """The training loss as what is averaged beside the state; nothing where it is withheld."""
        given = math.isfinite(self.train_loss)
        return {LOSS: torch.tensor(self.train_loss, dtype=torch.float64)} if given else {}


class Client:
    """A hospital: its name, its training films, and the settings that all clients share.

    A privacy mechanism is a class derived from this one, which the settings' `dp` names.
    `strategy` is a class derived from FedAvg; by default that of the settings.
    """

    mechanism = "off"  # the value of `dp` that asks for this class
    withholds_loss = False  # whether the training loss stays in the hospital
    spent: tuple[str, ...] = ()  # what is kept even if the update is not used

    def __init__(
        self,
        name: str,
        films: ChestXrayDataset,
        settings: Parameters,
        seed: int,
        strategy: type[FedAvg] | None = None,
    ) -> None:
        if settings.dp != self.mechanism:
            raise InputError(f"dp={settings.dp}: {type(self).__name__} means {self.mechanism}")
        self.name, self.films, self.settings, self.seed = name, films, settings, seed
        self.strategy = (strategy or STRATEGIES[settings.strategy])(settings)
        self.weight = films.weight  # what its update counts in the mean
        self.halfway: Any = None  # over a network, what keeps its progress inside a round

    def fit(self, model: ChestResNet, sent: State, kept: State, round: int) -> tuple[Update, State]:
        """Train `model` in place from what the server sent; return the update and what is kept.

        `sent` is the global state (and what the strategy sends beside it), `kept` what this client
        kept last time: local BatchNorm, the strategy's own. Optimiser and GradScaler start afresh
        each round. Raises ValueError if the client has no films.
        """
        began = time.perf_counter()
        if not len(self.films):
            raise ValueError("no training films")
        if not self.weight:
            why = "none of its labels known"
            return Update(self.name, 0, status="unlabelled", reason=why), kept
        model.load({k: v for k, v in (sent | kept).items() if not is_beside(k)})
        trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
        correct = self.strategy.begin(trained, sent, kept)
        loss, steps = self._train(model, correct, round)
        local, final = model.local_names(), to_cpu(model.tracked_state())
        beside, keep = self.strategy.end(sent, kept, final, steps)
        for name in itertools.filterfalse(is_beside, (*beside, *keep)):
            raise ValueError(f"the strategy's end() gave {name!r}, a name without a slash")
        update = {k: v for k, v in final.items() if k not in local} | beside
        keep = {k: v for k, v in final.items() if k in local} | keep
        return Update(self.name, self.weight, update, loss, time.perf_counter() - began), keep

    @property
    def known(self) -> list[float]:
        """What its update counts in the rows of each finding: the films with a known label."""
        return self.films.known

    @classmethod
    def check(cls, settings: Parameters) -> None:
        """Raise InputError for settings that this mechanism cannot work with."""

    def keep_ledger(self, work: Path, model: str, always: bool = False) -> None:
        """Let what this client releases of a model be written down; here nothing is measured."""

    def account(self, kept: State) -> dict[str, Any]:
        """Return what this client's patients have been exposed to, by `kept`; here not measured."""
        return {}

    def over_budget(self, kept: State) -> str:
        """Say why another round is not possible; empty where it is."""
        return ""

    def planned(self) -> dict[str, Any]:
        """Return what the ledger will hold after all rounds; here nothing is measured."""
        return {}

    def over_total(self, planned: Mapping[str, Any]) -> str:
        """Say by how much what is planned would exceed `total_epsilon`; empty where it does not."""
        return ""

    @staticmethod
    def returns(model: ChestResNet, sent: State) -> set[str]:
        """Name the tensors of an update, given what was sent: all of them."""
        return set(sent)

    def _train(
        self, model: ChestResNet, correct: Callable[[], None], round: int
    ) -> tuple[float, int]:
        """Train for a round; return the mean loss over all films seen, and the steps taken."""
        model.train()
        device = next(model.parameters()).device
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(trained, self.settings)
        half = precision(device, self.settings.precision) is torch.float16
        scaler = torch.amp.GradScaler(device.type, enabled=half)
        rng = generator(self.seed, "augment", round, self.name) if self.settings.augment else None
        total, steps, done = torch.zeros((), device=device), 0, 0
        if self.halfway:
            done, steps, total[()] = self.halfway.resume(model, optimizer, scaler)
        known, seen = (~np.isnan(self.films.labels)).mean(axis=1), 0.0
        for number, positions in enumerate(self._batches(round), 1):
            motion = draw_motion(rng, len(positions)) if rng else None
            seen += known[positions].sum()
            if number <= done:
                continue
            films, labels = self.films.batch(positions, device)
            loss = masked_loss(model(films, motion), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            correct()
            scaler.step(optimizer)
            scale = scaler.get_scale()
            scaler.update()
            total += loss.detach() * (~labels.isnan()).float().mean(dim=1).sum()
            steps += scaler.get_scale() >= scale  # it falls where a step overflowed: none was taken
            if self.halfway:
                self.halfway.note(number, steps, total)
        if not steps:
            raise ValueError("every step overflowed in fp16: choose another precision")
        whole = self.films.weight * self.settings.local_epochs
        return (total / (seen if self.settings.local_steps else whole)).item(), steps

    def _batches(self, round: int) -> Iterator[np.ndarray]:
        """Yield the positions of each batch, all of even size: BatchNorm dislikes a rest of one."""
        rng = generator(self.seed, "shuffle", round, self.name)
        count = math.ceil(len(self.films) / self.settings.batch_size)
        left = self.settings.local_steps or self.settings.local_epochs * count
        for start in range(0, left, count):
            yield from np.array_split(rng.permutation(len(self.films)), count)[: left - start]


def masked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, mean over the known labels; both (B, k), NaN labels are unknown."""
    known = (~labels.isnan()).float()
    weight = known / known.mean().clamp(min=1e-9)  # ones where all are known: the plain loss's bits
    return F.binary_cross_entropy_with_logits(logits.float(), labels.nan_to_num(), weight)


def make_optimizer(parameters: list[Tensor], settings: ClientParameters) -> torch.optim.Optimizer:
    """Build the local optimiser that the settings name."""
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **common, fused=True)  # one pass over each tensor
    return torch.optim.SGD(parameters, momentum=settings.momentum, **common)


@torch.no_grad()
def predict(model: ChestResNet, films: ChestXrayDataset, batch_size: int = AT_ONCE) -> np.ndarray:
    """Return the logits of all films in order, float32 (N, k); the model is left in eval mode."""
    device = next(model.parameters()).device
    model.eval()
    logits = np.empty((len(films), model.fc.out_features), np.float32)
    for start in range(0, len(films), batch_size):
        batch, _ = films.batch(np.arange(start, min(start + batch_size, len(films))), device)
        logits[start : start + len(batch)] = model(batch).float().cpu().numpy()
    return logits
