"""A model's state: tensors by name, hashed, copied and cast."""

import hashlib
import math

import torch
from torch import Tensor

State = dict[str, Tensor]  # names as in the model's state_dict
LOSS = "loss/train"  # beside a state, the training loss
LARGEST = 2.0**20  # beyond the weights and statistics of any film; what `fixed` can add up


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


def find_fault(state: State) -> tuple[str, str]:
    """Say what in a state no honest hospital can send, as status and reason; empty without."""
    for name, value in state.items():
        low, high = (end.item() for end in value.aminmax())  # NaN goes through
        if not (math.isfinite(low) and math.isfinite(high)):
            return "non-finite", f"{name} is not finite"
        if value.is_floating_point() and max(-low, high) > LARGEST:
            return "out of range", f"{name} holds {max(low, high, key=abs):.3g}"
        if name.endswith("running_var") and low < 0:
            return "out of range", f"{name}, a variance, holds {low:.3g}"
    return "", ""


def find_misfit(state: State, wanted: State) -> tuple[str, str]:
    """Say why a client's state cannot be used, as status and reason; empty if it can."""
    status, reason = find_odd(state, wanted)
    return (status, reason) if status else find_fault(state)


def find_odd(state: State, wanted: State) -> tuple[str, str]:
    """Say which tensors are not named, shaped and typed as wanted, as status and reason."""
    found, expected = ({k: (v.shape, v.dtype) for k, v in s.items()} for s in (state, wanted))
    odd = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    what = f"its state does not fit what was sent: {', '.join(odd[:3])}"
    return ("failed", what) if odd else ("", "")


def count_bytes(state: State) -> int:
    """Return the size of a state's tensors, in bytes."""
    return sum(value.numel() * value.element_size() for value in state.values())


def is_head(name: str) -> bool:
    """Tell what has a row for each finding: the head, and what a strategy sends beside it."""
    return name.rpartition("/")[2].startswith("fc.")


def is_beside(name: str) -> bool:
    """Tell what a strategy or a privacy mechanism keeps beside a model: by a slash."""
    return "/" in name
