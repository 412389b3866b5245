"""What travels between server and hospitals: packed, unpacked, checked."""

import json
import math
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message
from safetensors.torch import load, save

from ..base.parameters import Parameters
from ..base.state import State, find_fault, state_hash
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
    words = {"status": "failed", "reason": ""}
    try:
        if isinstance(reply, tuple):
            return dict(zip(words, reply, strict=True)), {}, {}
        if reply.has_error():
            return words | {"reason": reply.error.reason}, {}, {}
        words |= dict(reply.content.config_records["words"])
        return words, dict(reply.content.metric_records["numbers"]), unpack(reply)
    except Exception as error:  # it comes from elsewhere, and must not end the run
        return {"status": "failed", "reason": f"reply of another kind: {error}"}, {}, {}


def find_misfit(state: State, wanted: State) -> str:
    """Tell why a state from a hospital cannot be used; empty if it can."""
    found, expected = ({k: (v.shape, v.dtype) for k, v in s.items()} for s in (state, wanted))
    if found != expected:
        return "its state does not fit what was sent"
    return find_fault(state)[1]


def read_update(
    name: str, reply: Message | Fault, wanted: State, withheld: bool = False
) -> tuple[Update, State]:
    """Turn a reply into an update and what the server is to keep of it.

    What does not fit the shapes of `wanted`, or lacks a loss that is not `withheld`, has failed.
    """
    words, numbers, state = read_reply(reply)
    status, reason = words["status"], words["reason"]
    examples, loss = (numbers.get(key, math.nan) for key in ("examples", "train_loss"))
    said, fault = read_said(words.get("said", ""))
    if status == "ok" and (reason := find_misfit(state, wanted) or fault):
        status = "failed"
    elif status == "ok" and not (
        isinstance(examples, int | float) and examples > 0 and (withheld or 0 < loss < math.inf)
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

    def __init__(self, name: str, weight: float, settings: Parameters, seed: int) -> None:
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
