"""Sums without order: 64-bit fixed point, in which all that clients send is added up.

A client counts its share s of all films, as S = round(2^42 s), and its number x enters a sum as the
integer round(x S). Sums of integers, modulo 2^64, are the same in any order, and under masks.

Range: |x| is at most LARGEST = 2^20, which each client checks (`state.find_fault`), and all shares
together are at most 1, so a sum stays below 2^62, far from where it would turn over.
Resolution: of k clients, who hold a share s of all films together, the mean differs from the exact
one by at most k / s * 2^-43 for the roundings of x S, as much times the largest difference between
x and the mean for those of S, and 2^-52 of the largest x for the product in float64: less than a
unit in the last place of the largest x in float32 (2^-24 of it) as long as that is above
k / s * 2^-18 and the clients hold more than k * 2^-17 of all films; about 1e-12 k / s otherwise.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .state import LARGEST, State

ONE = 1 << 42  # the share of all films
FILM = 1 << 20  # units of a count, which may be part of a film
MOST_COUNTED = 1 << 50  # such units of all films: a thousand million of them
ADDED_AT_ONCE = 1 << 17  # numbers: small copies stay in the cache


class Counted(Protocol):
    """What counts in a mean: a client, or a hospital as the server knows it."""

    name: str
    weight: float  # films, over all findings
    known: Sequence[float]  # films, of each finding; none: all alike


@dataclass(frozen=True)
class Whole:
    """All films, by sums over the clients in units of 2^-20: what their shares are of."""

    largest: int  # of each the most that it counts anywhere
    weight: int

    @classmethod
    def of(cls, clients: Iterable[Counted]) -> "Whole":
        """Add up what clients count."""
        counts = [[client.weight, max([client.weight, *client.known])] for client in clients]
        weight, largest = (sum(round(n * FILM) for n in part) for part in zip(*counts, strict=True))
        return cls(largest, weight)

    def shares(self, client: Counted) -> tuple[int, list[int]]:
        """Return what a client counts of all, and of each finding, in units of 1 / ONE."""
        share, *known = (
            round(n * FILM / max(self.largest, 1) * ONE) for n in (client.weight, *client.known)
        )
        return share, known

    def part(self, share: int) -> tuple[float, float]:
        """Return which part of all that trains a sum of shares is, and how many films."""
        part = round(share / ONE * self.largest / max(self.weight, 1), 9)
        films = round(part * self.weight / FILM, 3)
        return part, int(films) if films.is_integer() else films


class Pool:
    """What clients send, put together by a strategy's rule as it comes, in any order."""

    def __init__(self, sums: Any, clients: Sequence[Counted]) -> None:
        self.sums, self.whole = sums, Whole.of(clients)  # a strategy's aggregator, and all films
        self.clients = {client.name: client for client in clients}

    def add(self, client: str, state: State) -> None:
        """Add what a client sends."""
        self.sums.add(state, *self.whole.shares(self.clients[client]))

    def result(self, before: State) -> tuple[State, float, float]:
        """Return the mean, and of how much it is: of which part of all films, and how many."""
        return self.sums.result(before), *self.whole.part(self.sums.share)


def add_fixed(total: Tensor, value: Tensor, share: int | Tensor) -> None:
    """Add to integers (int64, contiguous) numbers of the same shape, times one share or a row's.

    Of integers, which are BatchNorm's counters, those beyond LARGEST count as that.
    """
    if not value.is_floating_point():
        value = value.clamp(-LARGEST, LARGEST)
    if torch.is_tensor(share):
        total.add_((value.double() * share).round_().long())
        return
    parts = total.view(-1).split(ADDED_AT_ONCE), value.reshape(-1).split(ADDED_AT_ONCE)
    for sums, values in zip(*parts, strict=True):
        sums.add_(values.to(torch.float64, copy=True).mul_(share).round_().long())
