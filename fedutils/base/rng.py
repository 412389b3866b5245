"""Where every random number comes from: one function, and no global random state anywhere."""

import hashlib

import numpy as np


def generator(seed: int, purpose: str, round: int = 0, client: str = "") -> np.random.Generator:
    """Return a NumPy generator that depends on (seed, round, client, purpose) and on nothing else.

    So a resumed run draws the same numbers, and clients may run in any order or side by side.
    """
    key = f"{seed}|{round}|{client}|{purpose}".encode()
    return np.random.default_rng(np.frombuffer(hashlib.sha256(key).digest(), dtype=np.uint32))
