"""What travels between server and hospitals: packed, unpacked, checked."""

import json
import math
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message
from safetensors.torch import load, save

from ..base.parameters import Parameters
from ..base.state import State, non_finite, state_hash
from ..client import Update
from ..model import ChestResNet

SAID = "member/said"  # in what the server keeps of a hospital
Answer = tuple[dict[str, str], dict[str, Any], State]  # words, numbers, tensors
Fault = tuple[str, str]  # status and reason, as the history has them


def pack(state: State) -> ArrayRecord:
    """Pack a state as one array of bytes: Flower takes two requests for each array it sends."""
    return ArrayRecord({"state": Array(np.frombuffer(save(state), np.uint8))})


def unpack(message: Message) -> State:
    """Return the state in a message, with the bits and dtypes that were packed."""
    return load(message.content.array_records["state"]["state"].numpy().tobytes())


def read_reply(reply: Message | Fault) -> Answer:
    """Take a reply apart; where there is none, or none that can be read, it is a status."""
    try:
        if isinstance(reply, tuple):
            return {"status": reply[0], "reason": reply[1]}, {}, {}
        if reply.has_error():
            return {"status": "failed", "reason": reply.error.reason}, {}, {}
        records = reply.content.config_records["words"], reply.content.metric_records["numbers"]
        return (
            {"status": "failed", "reason": ""} | dict(records[0]),
            dict(records[1]),
            unpack(reply),
        )
    except Exception as error:  # it comes from elsewhere, and must not end the run
        return {"status": "failed", "reason": f"reply of another kind: {error}"}, {}, {}


def find_misfit(state: State, wanted: State) -> str:
    """Tell why a state from a hospital cannot be used; empty if it can."""
    found, expected = ({k: (v.shape, v.dtype) for k, v in s.items()} for s in (state, wanted))
    if found != expected:
        return "its state does not fit what was sent"
    return "its state is not finite" if non_finite(state) else ""


def read_update(
    name: str, reply: Message | Fault, wanted: State, withheld: bool = False
) -> tuple[Update, State]:
    """Turn a reply into an update and what the server is to keep of it.

    `wanted` is a state of the shapes that must come back; whatever does not fit costs the update,
    not the round. Where the loss is `withheld`, none is looked for.
    """
    words, numbers, state = read_reply(reply)
    status, reason = words["status"], words["reason"]
    examples, loss = (numbers.get(key, math.nan) for key in ("examples", "train_loss"))
    said, fault = read_said(words.get("said", ""))
    if status == "ok" and (reason := find_misfit(state, wanted) or fault):
        status = "failed"
    elif status == "ok" and not (
        isinstance(examples, int) and examples > 0 and (withheld or 0 < loss < math.inf)
    ):
        status, reason = "failed", f"examples={examples} train_loss={loss}"
    if status != "ok":
        return Update(name, 0, status=status, reason=reason), {}
    spent = said.get("account", {}).get("epsilon", math.nan)
    kept = {SAID: torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)}
    update = Update(name, examples, state, math.nan if withheld else float(loss), epsilon=spent)
    return update, kept if said else {}


def read_said(text: str) -> tuple[dict[str, Any], str]:
    """Read what a hospital said of its patients' budget: `account` and `stop`; or why it cannot."""
    try:
        said = json.loads(text or "{}")
        numbers = {k: v for k, v in said.get("account", {}).items() if k != "hospital"}
        if all(isinstance(v, int | float) for v in numbers.values()):
            return said, ""
    except (ValueError, AttributeError):
        pass
    return {}, "its budget cannot be read"


class Member:
    """A hospital as the server knows it: its name, its weight, and what it said of its budget."""

    def __init__(self, name: str, weight: int, settings: Parameters, seed: int) -> None:
        self.name, self.weight, self.settings, self.seed = name, weight, settings, seed

    def account(self, kept: State) -> dict[str, Any]:
        """Return what the hospital's patients have been exposed to, as it said last."""
        account = self._said(kept).get("account", {})
        return account | {"hospital": self.name} if account else {}

    def over_budget(self, kept: State) -> str:
        """Say why another round is not possible, as the hospital said last; empty where it is."""
        return self._said(kept).get("stop", "")

    @staticmethod
    def _said(kept: State) -> dict[str, Any]:
        return json.loads(kept[SAID].numpy().tobytes()) if SAID in kept else {}


def trunk_hash(model: ChestResNet) -> str:
    """Return the hash of what is frozen, which never travels and must be the same everywhere."""
    return state_hash({k: v for k, v in model.state_dict().items() if not model.is_tracked(k)})
