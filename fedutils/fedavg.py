"""The exact mean; FedAvg, with its server half and its client half."""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from .base.fixed import add_fixed
from .base.parameters import Parameters, parameter
from .base.state import State, cast_like, is_head

SORTED_AT_ONCE = 1 << 20  # coordinates
RULES = ("mean", "median", "trimmed")


@dataclass(frozen=True)
class AggregationParameters(Parameters):
    """How the server puts updates together."""

    aggregation: str = parameter("mean", "of updates; the others bear liars", allowed=RULES)
    trim: float = parameter(
        0.2, "share cut off at each end", bounds=(0.01, 0.49), only="aggregation=trimmed"
    )

    @property
    def least_clients(self) -> int:
        """How many clients a round needs for one to be cut off at each end; 1 for the mean."""
        return 1 if self.aggregation == "mean" else 3


class WeightedMean:
    """The mean of states by their shares of all films, the same in any order of clients.

    A finding's row of the head counts by the films whose label of it is known: who never looked for
    a finding has nothing to say about it. Resolution and range: `base.fixed`.
    """

    robust = False  # whether a liar moves it no more than one client may

    def __init__(self) -> None:
        self.sums: State = {}
        self.shares: dict[str, int | Tensor] = {}
        self.share, self.count = 0, 0

    def add(self, state: State, share: int, known: Sequence[int] = ()) -> None:
        """Add a client's state with its share, and those of each finding (`fixed.Whole`)."""
        differ = {*known} - {share}
        for name, value in state.items():
            counts = share
            if differ and is_head(name):
                counts = torch.tensor(known).view(-1, *[1] * (value.ndim - 1))
            if name not in self.sums:
                self.sums[name] = torch.zeros(value.shape, dtype=torch.int64)
            add_fixed(self.sums[name], value, counts)
            self.shares[name] = self.shares.get(name, 0) + counts
        self.share, self.count = self.share + share, self.count + 1

    def result(self, before: State | None = None) -> State:
        """Turn the sums into the mean, in float64, and return it: the end of this aggregator.

        A row that nobody knows stays as `before`; where nothing was, it is 0.
        """
        mean = {}
        for name, shares in self.shares.items():
            mean[name] = self.sums.pop(name).double() / shares
            if torch.is_tensor(shares):
                old = (before or {}).get(name, torch.zeros(())).double()
                mean[name] = torch.where(shares > 0, mean[name], old)
        return mean


class TrimmedMean(WeightedMean):
    """The coordinate-wise mean without the `trim` lowest and highest share; at 0.5 the median.

    Yin et al., ICML 2018. Clients count alike, or a bad one could claim many films.
    """

    robust = True

    def __init__(self, trim: float) -> None:
        super().__init__()
        self.trim, self.states = trim, []

    def add(self, state: State, share: int, known: Sequence[int] = ()) -> None:
        """Keep a client's state; the share only counts the films that took part."""
        self.states.append(state)
        self.share, self.count = self.share + share, self.count + 1

    def result(self, before: State | None = None) -> State:
        """Return the trimmed mean in float64."""
        # The small number for products such as 0.29 * 100, which is a little below 29; one is cut
        # off at each end even where some do not answer.
        cut = max(1, math.floor(self.trim * self.count + 1e-9))
        cut = min(cut, (self.count - 1) // 2)
        mean: State = {}
        for name, first in self.states[0].items():
            parts = zip(
                *(state[name].flatten().split(SORTED_AT_ONCE) for state in self.states), strict=True
            )
            ordered = (torch.stack(part).double().sort(dim=0).values for part in parts)
            means = [values[cut : self.count - cut].mean(dim=0) for values in ordered]
            mean[name] = torch.cat(means).reshape(first.shape)
        return mean


class FedAvg:
    """McMahan et al., AISTATS 2017: the next global state is the weighted mean of the clients'.

    Own strategies derive from it. At the server `step` turns the mean, in float64, into the next
    global state, and `server` is what one keeps between rounds; all but `parameters` are buffers:
    always averaged. At the client `begin` may correct the gradients of each local step, and `end`
    sends and keeps more than the weights. What travels beside them has a slash in its name, and
    a client sends beside them only what `download` sent.
    """

    server_lr = 1.0  # where the settings leave it open
    bears_noise = True  # what clients send may be noised, for differential privacy

    def __init__(self, settings: Parameters, parameters: Set[str] = frozenset()) -> None:
        self.settings, self.parameters = settings, parameters

    @classmethod
    def check(cls, settings: Parameters) -> None:
        """Raise InputError for settings that this strategy cannot work with."""

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

    def begin(self, trained: Mapping[str, Tensor], sent: State, kept: State) -> Callable[[], None]:
        """Return what corrects the gradients of the `trained` parameters before each local step.

        `trained` are the live parameters as they start, `sent` is what came from the server, `kept`
        what this client kept last time.
        """
        return lambda: None

    def end(self, sent: State, kept: State, final: State, steps: int) -> tuple[State, State]:
        """Return what this client sends beside the `final` weights, and what it keeps, on the CPU.

        `steps` were taken since `begin`.
        """
        return {}, {}
