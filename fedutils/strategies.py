"""FedAvgM, FedAdam, FedProx, SCAFFOLD: both halves of each."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base.errors import InputError
from .base.parameters import Parameters, parameter
from .base.state import State, cast_like
from .fedavg import FedAvg

VARIATE = "variate/"  # prefix of SCAFFOLD's control variates, which travel beside the weights


class FedAvgM(FedAvg):
    """Hsu, Qi and Brown, 2019 (arXiv:1909.06335): momentum, v = beta v + (w - mean).

    It is the step of torch.optim.SGD with that difference as gradient, without dampening.
    """

    def step(self, state: State, mean: State, server: State, share: float) -> tuple[State, State]:
        """Step by `server_lr` along the momentum; buffers are averaged."""
        new, velocity = dict(mean), {}
        for name in self.parameters & mean.keys():
            drift = state[name].double() - mean[name]
            velocity[name] = self.settings.server_momentum * server.get(name, 0) + drift
            # Written as a change of the mean, so that momentum 0 and rate 1 is FedAvg to the bit.
            new[name] = mean[name] + (drift - self.settings.server_lr * velocity[name])
        return cast_like(new, state), velocity


class FedAdam(FedAvg):
    """Reddi et al., ICLR 2021: Adam on the server, with betas 0.9 and 0.99 and tau 0.001.

    Unlike torch.optim.Adam it corrects no bias, as in the paper's algorithm 2.
    """

    server_lr = 0.01

    def step(self, state: State, mean: State, server: State, share: float) -> tuple[State, State]:
        """Step by `server_lr` along the adapted mean update; buffers are averaged."""
        new, moments = dict(mean), {}
        for name in self.parameters & mean.keys():
            update = mean[name] - state[name].double()
            first = 0.9 * server.get(f"first/{name}", 0) + 0.1 * update
            second = 0.99 * server.get(f"second/{name}", 0) + 0.01 * update.square()
            step = self.settings.server_lr * first / (second.sqrt() + 1e-3)
            new[name] = state[name].double() + step
            moments |= {f"first/{name}": first, f"second/{name}": second}
        return cast_like(new, state), moments


class FedProx(FedAvg):
    """Li et al., MLSys 2020: each client is pulled to the weights that it began the round with."""

    def begin(self, trained: Mapping[str, Tensor], sent: State, kept: State) -> Callable[[], None]:
        """Add `mu` times the way that has been gone to each gradient."""
        start = {name: value.detach().clone() for name, value in trained.items()}

        def correct() -> None:
            """Add the gradient of mu / 2 |w - start|²."""
            for name, value in trained.items():
                value.grad.add_(value.detach() - start[name], alpha=self.settings.mu)

        return correct


class Scaffold(FedAvg):
    """Karimireddy et al., ICML 2020: control variates against client drift (option II).

    The paper weighs clients alike; here films weigh both means: the same for equal clients.
    """

    bears_noise = False

    @classmethod
    def check(cls, settings: Parameters) -> None:
        """Raise InputError unless clients take plain steps of SGD, from which variates are told."""
        if settings.optimizer != "sgd" or settings.momentum or settings.weight_decay:
            raise InputError("strategy=scaffold wants optimizer=sgd momentum=0 weight_decay=0")

    def download(self, state: State, server: State) -> State:
        """Send the server's variate along; before the first round it is zero."""
        names = self.parameters & state.keys()
        return state | {VARIATE + k: torch.zeros_like(state[k]) for k in sorted(names)} | server

    def step(self, state: State, mean: State, server: State, share: float) -> tuple[State, State]:
        """Step by `server_lr` towards the mean; move the variate by the share that took part."""
        new, before = {name: mean[name] for name in state}, self.download(state, server)
        for name in self.parameters & new.keys():
            new[name] = mean[name] + (1 - self.settings.server_lr) * (state[name] - mean[name])
        moved = {k: before[k] + share * v for k, v in mean.items() if k.startswith(VARIATE)}
        return cast_like(new, state), cast_like(moved, before)

    def begin(self, trained: Mapping[str, Tensor], sent: State, kept: State) -> Callable[[], None]:
        """Add the difference of the server's and the client's variate to each gradient."""
        names = [name for name in trained if VARIATE + name in sent]
        drift = {k: sent[VARIATE + k] - kept.get(VARIATE + k, 0) for k in names}
        drift = {name: value.to(trained[name].device) for name, value in drift.items()}

        def correct() -> None:
            """Add c - c_i."""
            for name, value in drift.items():
                trained[name].grad.add_(value)

        return correct

    def end(self, sent: State, kept: State, final: State, steps: int) -> tuple[State, State]:
        """Send the change of the client's variate, c_i - c + (x - y_i) / (K lr); keep the new."""
        new = {}
        for key in (key for key in sent if key.startswith(VARIATE)):
            moved = sent[key.removeprefix(VARIATE)] - final[key.removeprefix(VARIATE)]
            new[key] = moved / (steps * self.settings.lr) + kept.get(key, 0) - sent[key]
        return {key: value - kept.get(key, 0) for key, value in new.items()}, new


STRATEGIES: dict[str, type[FedAvg]] = {
    "fedavg": FedAvg, "fedavgm": FedAvgM, "fedadam": FedAdam, "fedprox": FedProx,
    "scaffold": Scaffold,
}  # fmt: skip


@dataclass(frozen=True)
class StrategyParameters(Parameters):
    """What the server makes of the mean, and how clients are kept together."""

    strategy: str = parameter("fedavg", "of federated averaging", allowed=tuple(STRATEGIES))
    mu: float = parameter(
        0.01, "pull to the global model", bounds=(0.0, math.inf), only="strategy=fedprox"
    )
    server_lr: float = parameter(
        0.0, "step of the server; 0: 0.01 for fedadam, else 1; fedavg and fedprox take the mean",
        bounds=(0.0, math.inf),  # for all: a strategy of one's own may heed it
    )  # fmt: skip
    server_momentum: float = parameter(
        0.9, "of the server's step", bounds=(0.0, 1.0), only="strategy=fedavgm"
    )

    def check(self) -> None:
        """Raise InputError for settings that the strategy cannot work with."""
        STRATEGIES[self.strategy].check(self)
