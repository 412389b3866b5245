"""Progress inside a round, kept where a client trains: a restart costs minutes, not hours."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import InputError
from ..base.files import sha256
from ..base.state import to_cpu
from ..model import ChestResNet
from ..rounds import Progress
from .checkpoint import last_identity, load_progress, save_progress

EVERY = 300.0  # seconds between two writes, each of about a second


class Halfway:
    """How far a client has come in one round: checkpoints after some of its batches.

    They hold what cannot be had again: the tracked state, that of the optimiser, the sum of losses.
    What is drawn comes from the seed, and what corrects the gradients from what was sent and kept.
    `about` is all that the round depends on; what is there of another one is dropped.
    """

    def __init__(self, folder: Path, about: object) -> None:
        self.folder, self.round = folder, sha256(json.dumps(about).encode())
        if last_identity(folder) != self.round:
            shutil.rmtree(folder, ignore_errors=True)

    def resume(self, model: ChestResNet, optimizer: Any, scaler: Any) -> tuple[int, int, float]:
        """Put all back as it was; return the batches and steps so far, and the sum of losses."""
        self.parts, self.due = (model, optimizer, scaler), time.monotonic() + EVERY
        now = load_progress(self.folder, self.round)
        if now is None:
            return 0, 0, 0.0
        model.load(now.state)
        for key, value in now.server.items():
            number, _, name = key.partition("/")
            weight = optimizer.param_groups[0]["params"][int(number)]
            # In the order of the weight's own memory, by which fused steps go.
            like = torch.empty_like(weight) if value.ndim else torch.empty((), device=weight.device)
            optimizer.state[weight][name] = like.copy_(value)
        (about,) = now.rows
        scaler.load_state_dict(about["scaler"])
        print(f"{self.folder}: goes on after {now.round} batches", flush=True)
        return now.round, about["steps"], about["total"]

    def note(self, batches: int, steps: int, total: Tensor) -> None:
        """Write how far it is, if it is time to."""
        if time.monotonic() < self.due:
            return
        model, optimizer, scaler = self.parts
        own = optimizer.state_dict()["state"].items()
        kept = {f"{n}/{k}": v for n, s in own for k, v in s.items() if torch.is_tensor(v)}
        about = {"steps": steps, "total": total.item(), "scaler": scaler.state_dict()}
        now = Progress(to_cpu(model.tracked_state()), to_cpu(kept), round=batches, rows=[about])
        try:
            save_progress(self.folder, now, self.round)
        except (OSError, InputError) as error:  # then a restart would cost more of the round
            print(f"{self.folder}: {error}", flush=True)
        self.due = time.monotonic() + EVERY
