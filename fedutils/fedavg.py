"""The server: an exact mean of the clients' updates, and each strategy's step on it."""

import math

import torch

from .client import VARIATE
from .settings import Settings
from .weights import State, add_in_place

CHUNK = 1 << 20  # coordinates that are sorted at a time


class WeightedMean:
    """The mean of states in float64, weighted by films; add clients in the order of names."""

    def __init__(self) -> None:
        self.sums: State = {}
        self.weight, self.count = 0.0, 0

    def add(self, state: State, weight: float) -> None:
        """Add a client's state with its weight."""
        for name, value in state.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros(value.shape, dtype=torch.float64)
            add_in_place(self.sums[name], value, weight)
        self.weight, self.count = self.weight + weight, self.count + 1

    def result(self) -> State:
        """Turn the sums into the mean, in float64, and return it: the end of this aggregator."""
        return {name: total.div_(self.weight) for name, total in self.sums.items()}


class TrimmedMean(WeightedMean):
    """The coordinate-wise mean without the `trim` lowest and highest share; at 0.5 the median.

    Yin et al., ICML 2018. Clients count alike, or a bad one could claim many films.
    """

    def __init__(self, trim: float) -> None:
        super().__init__()
        self.trim, self.states = trim, []

    def add(self, state: State, weight: float) -> None:
        """Keep a client's state; the weight only counts the films that took part."""
        self.states.append(state)
        self.weight, self.count = self.weight + weight, self.count + 1

    def result(self) -> State:
        """Return the trimmed mean in float64."""
        cut, mean = min(math.floor(self.trim * self.count), (self.count - 1) // 2), {}
        for name, first in self.states[0].items():
            parts = zip(*(state[name].flatten().split(CHUNK) for state in self.states), strict=True)
            ordered = (torch.stack(part).double().sort(dim=0).values for part in parts)
            means = [values[cut : self.count - cut].mean(dim=0) for values in ordered]
            mean[name] = torch.cat(means).reshape(first.shape)
        return mean


class FedAvg:
    """McMahan et al., AISTATS 2017: the next global state is the weighted mean of the clients'.

    Own strategies derive from it: `step` turns the mean, in float64, into the next global state.
    `server` is what one keeps between rounds. All but `parameters` are buffers: always averaged.
    """

    def __init__(self, settings: Settings, parameters: set[str]) -> None:
        self.settings, self.parameters = settings, parameters

    def aggregator(self) -> WeightedMean:
        """Return a fresh aggregator for one round."""
        if self.settings.aggregation == "mean":
            return WeightedMean()
        return TrimmedMean(0.5 if self.settings.aggregation == "median" else self.settings.trim)

    def download(self, state: State, server: State) -> State:
        """Return what is sent to the clients."""
        return state

    def step(self, state: State, mean: State, server: State, share: float) -> tuple[State, State]:
        """Return the next global state and server state; `share` of all films took part."""
        return cast_like(mean, state), server


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


class Scaffold(FedAvg):
    """Karimireddy et al., ICML 2020: control variates against client drift (option II).

    The paper weighs clients alike; here films weigh both means: the same for equal clients.
    """

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


# FedProx (Li et al., MLSys 2020) changes only the client's step.
STRATEGIES = {"fedavg": FedAvg, "fedavgm": FedAvgM, "fedadam": FedAdam}
STRATEGIES |= {"fedprox": FedAvg, "scaffold": Scaffold}


def cast_like(values: State, like: State) -> State:
    """Cast float64 values to the dtypes of a state; integers are rounded."""
    whole = {name for name, value in like.items() if not value.is_floating_point()}
    rounded = {name: value.round() if name in whole else value for name, value in values.items()}
    return {name: value.to(like[name].dtype) for name, value in rounded.items()}
