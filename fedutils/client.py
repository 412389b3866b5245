"""One hospital: local training on its own films. Only an Update leaves it, never a film."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .device import precision
from .images import ChestXrayDataset
from .model import ChestResNet
from .rng import generator
from .settings import Settings
from .weights import State, to_cpu

VARIATE = "variate/"  # prefix of SCAFFOLD's control variates, which travel beside the weights


@dataclass(frozen=True)
class Update:
    """What a client sends back: `state` holds CPU tensors by name, `examples` is its weight."""

    client: str
    examples: int
    state: State = field(default_factory=dict)
    train_loss: float = math.nan
    seconds: float = 0.0
    status: str = "ok"
    reason: str = ""
    epsilon: float = math.nan


class Client:
    """A hospital: its name, its training films, and the settings that all clients share."""

    def __init__(self, name: str, films: ChestXrayDataset, settings: Settings, seed: int) -> None:
        self.name, self.films, self.settings, self.seed = name, films, settings, seed
        self.weight = len(films)  # what its update counts in the mean

    def fit(self, model: ChestResNet, sent: State, kept: State, round: int) -> tuple[Update, State]:
        """Train `model` in place from what the server sent; return the update and what is kept.

        `sent` is the global state (with SCAFFOLD's server variate beside it), `kept` what this
        client kept last time: local BatchNorm, its own variate. Optimiser and GradScaler start
        afresh each round. Raises ValueError if the client has no films.
        """
        began = time.perf_counter()
        if not len(self.films):
            raise ValueError("no training films")
        model.load({k: v for k, v in (sent | kept).items() if not k.startswith(VARIATE)})
        start = self._start(model)
        loss, steps = self._train(model, start, self._correction(model, sent, kept), round)
        local, final = model.local_names(), to_cpu(model.tracked_state())
        variate = self._new_variate(to_cpu(start), final, sent, kept, steps)
        update = {k: v for k, v in final.items() if k not in local}
        update |= {k: v - kept.get(k, 0) for k, v in variate.items()}
        keep = {k: v for k, v in final.items() if k in local} | variate
        took = time.perf_counter() - began
        return Update(self.name, self.weight, update, loss, took), keep

    def _start(self, model: ChestResNet) -> State:
        """Copy the parameters before training, for the strategies that look back at them."""
        looks_back = self.settings.strategy in ("fedprox", "scaffold")
        named = model.named_parameters() if looks_back else ()
        return {name: p.detach().clone() for name, p in named if p.requires_grad}

    def _train(self, model: ChestResNet, start: State, c: State, round: int) -> tuple[float, int]:
        """Run the local epochs; return the mean loss over all films seen, and the steps taken."""
        model.train()
        device = next(model.parameters()).device
        trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
        optimizer = make_optimizer(list(trained.values()), self.settings)
        half = precision(device, self.settings.precision) is torch.float16
        scaler = torch.amp.GradScaler(device.type, enabled=half)
        augment = generator(self.seed, "augment", round, self.name)
        rng = augment if self.settings.augment else None
        total, seen, steps = torch.zeros((), device=device), 0, 0
        for positions in self._batches(round):
            films, labels = self.films.batch(positions, device)
            loss = masked_loss(model(films, rng), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            self._correct(trained, start, c)
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach() * len(positions)
            seen, steps = seen + len(positions), steps + 1
        return (total / seen).item(), steps

    def _batches(self, round: int) -> Iterator[np.ndarray]:
        """Yield the positions of each batch, all of even size: BatchNorm dislikes a rest of one."""
        rng = generator(self.seed, "shuffle", round, self.name)
        count = math.ceil(len(self.films) / self.settings.batch_size)
        for _ in range(self.settings.local_epochs):
            yield from np.array_split(rng.permutation(len(self.films)), count)

    def _correct(self, trained: State, start: State, correction: State) -> None:
        """Add to the gradients FedProx's pull to the start, or SCAFFOLD's c - c_i."""
        for name, parameter in trained.items():
            if self.settings.strategy == "fedprox":
                parameter.grad.add_(parameter.detach() - start[name], alpha=self.settings.mu)
            elif name in correction:
                parameter.grad.add_(correction[name])

    def _correction(self, model: ChestResNet, sent: State, kept: State) -> State:
        """Return SCAFFOLD's c - c_i on the model's device; empty for other strategies."""
        device, names = next(model.parameters()).device, [k for k in sent if k.startswith(VARIATE)]
        return {k.removeprefix(VARIATE): (sent[k] - kept.get(k, 0)).to(device) for k in names}

    def _new_variate(
        self, start: State, final: State, sent: State, kept: State, steps: int
    ) -> State:
        """Return SCAFFOLD's c_i - c + (x - y_i) / (K lr), option II; empty for other strategies."""
        new = {}
        for key in (key for key in sent if key.startswith(VARIATE)):
            moved = start[key.removeprefix(VARIATE)] - final[key.removeprefix(VARIATE)]
            new[key] = moved / (steps * self.settings.lr) + kept.get(key, 0) - sent[key]
        return new


def masked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, mean over the known labels; both (B, 14), NaN labels are unknown."""
    known = (~labels.isnan()).float()
    weight = known / known.mean().clamp(min=1e-9)  # ones where all are known: the plain loss's bits
    return F.binary_cross_entropy_with_logits(logits.float(), labels.nan_to_num(), weight)


def make_optimizer(parameters: list[Tensor], settings: Settings) -> torch.optim.Optimizer:
    """Build the local optimiser that the settings name."""
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **common, fused=True)  # one pass over each tensor
    return torch.optim.SGD(parameters, momentum=settings.momentum, **common)


@torch.no_grad()
def predict(model: ChestResNet, films: ChestXrayDataset, batch_size: int = 128) -> np.ndarray:
    """Return the logits of all films in order, float32 (N, 14); the model is left in eval mode."""
    device = next(model.parameters()).device
    model.eval()
    logits = np.empty((len(films), model.fc.out_features), np.float32)
    for start in range(0, len(films), batch_size):
        batch, _ = films.batch(np.arange(start, min(start + batch_size, len(films))), device)
        logits[start : start + len(batch)] = model(batch).float().cpu().numpy()
    return logits
