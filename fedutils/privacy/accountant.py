"""What steps cost: epsilon and noise, by Opacus' Rényi accountant."""

import functools
import logging
import math
import warnings
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import numpy as np

from ..base.errors import InputError


def opacus(module: str) -> Any:
    """Import a part of Opacus at its first use, or say how to get it; its log is left quiet."""
    try:
        found = import_module(f"opacus.{module}")
    except ImportError as error:
        raise InputError("dp=patient needs Opacus: pip install 'opacus>=1.5'") from error
    # It reports each order that its series does not converge for; the bound holds without them.
    logging.getLogger("opacus").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # the trunk's end, as meant
    return found


@functools.lru_cache(maxsize=1024)
def _rdp(noise: float, rate: float) -> np.ndarray:
    """Return the Rényi divergence of one step, at each of the accountant's orders."""
    orders = opacus("accountants").RDPAccountant.DEFAULT_ALPHAS
    analysis = opacus("accountants.analysis.rdp")
    return analysis.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=orders)


def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Return the epsilon at `delta` of `steps` steps, by Opacus' Rényi accountant.

    Mironov, Talwar and Zhang, 2019 (arXiv:1908.10530); neighbours differ by one patient. It equals
    RDPAccountant.get_epsilon, but computes what steps have in common once.
    """
    return compose([(noise, rate, steps)], delta)


def compose(parts: Iterable[tuple[float, float, int]], delta: float) -> float:
    """Return the epsilon at `delta` of (noise, rate, steps) one after the other, as `epsilon`."""
    taken = [part for part in parts if part[2]]
    if not taken or not all(noise for noise, _, _ in taken):
        return math.inf if taken else 0.0
    orders = opacus("accountants").RDPAccountant.DEFAULT_ALPHAS
    analysis = opacus("accountants.analysis.rdp")
    rdp = sum(steps * _rdp(noise, rate) for noise, rate, steps in taken)
    return float(analysis.get_privacy_spent(orders=orders, rdp=rdp, delta=delta)[0])


@functools.lru_cache(maxsize=1024)
def calibrate_noise(target: float, delta: float, rate: float, steps: int) -> float:
    """Return the least noise multiplier with which `steps` stay within `target`, to .01 epsilon."""
    how = {"target_delta": delta, "sample_rate": rate, "steps": steps, "accountant": "rdp"}
    search = opacus("accountants.utils").get_noise_multiplier
    return search(target_epsilon=target, epsilon_tolerance=min(0.01, target / 100), **how)
