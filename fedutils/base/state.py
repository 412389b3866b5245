"""A model's state: tensors by name, hashed, copied and cast."""

import hashlib
import math

import torch
from torch import Tensor

State = dict[str, Tensor]  # names as in the model's state_dict


def state_hash(state: State) -> str:
    """Return the SHA-256 of a state: names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def to_cpu(state: State) -> State:
    """Copy a state to the CPU, contiguous."""
    plain = torch.contiguous_format  # at once: a copy of channels last, then another, takes twice
    return {k: v.detach().to("cpu", copy=True, memory_format=plain) for k, v in state.items()}


def cast_like(values: State, like: State) -> State:
    """Cast float64 values to the dtypes of a state; integers are rounded."""
    whole = {name for name, value in like.items() if not value.is_floating_point()}
    rounded = {name: value.round() if name in whole else value for name, value in values.items()}
    return {name: value.to(like[name].dtype) for name, value in rounded.items()}


def non_finite(state: State) -> list[str]:
    """Name the tensors that hold NaN or infinity."""
    # A sum is quicker than a look at each value; it may also overflow, so that decides.
    suspects = [name for name, value in state.items() if not math.isfinite(value.sum())]
    return [name for name in suspects if not state[name].isfinite().all()]


def count_bytes(state: State) -> int:
    """Return the size of a state's tensors, in bytes."""
    return sum(value.numel() * value.element_size() for value in state.values())


def is_beside(name: str) -> bool:
    """Tell what a strategy or a privacy mechanism keeps beside a model: by a slash."""
    return "/" in name
