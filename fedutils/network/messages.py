"""What travels between server and hospitals: packed, unpacked, checked."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message
from safetensors.torch import load, save

from ..base.parameters import Parameters
from ..base.scores import BOUNDLESS
from ..base.state import LARGEST, State, count_bytes, find_misfit, find_odd, state_hash
from ..client import Update
from ..model import ChestResNet
from ..privacy.keys import LONGEST, is_key

# The sums of a validation: whether there is one for each finding.
SUMS = {"loss": False, "labels": False, "pairs": True, "ordered": True}
MOST = BOUNDLESS  # of a sum: thousands of them do not overflow
SEPARATOR = "\n"  # between the findings in an introduction
# What a hospital may say of its work; all else is that it failed.
STATUSES = ("ok", "failed", "late", "lost", "non-finite", "out of range", "stopped", "unlabelled")
LINE = 300  # characters of a reason
LOST = "lost"  # the status of a hospital that has not got what a message builds on
SAID = "member/said"  # in what the server keeps of a hospital
ACCOUNT = {"patients", "sampling_rate", "noise_multiplier", "steps", "delta", "clip", "epsilon",
           "total_epsilon"}  # fmt: skip
INTRODUCTION, OFFER = ("key", "node", "knows", "signature"), ("key", "digest", "signature")
Answer = tuple[dict[str, str], dict[str, Any], State]  # words, numbers, tensors
Fault = tuple[str, str]  # status and reason, as the history has them


def pack(state: State) -> ArrayRecord:
    """Pack a state as one array of bytes: Flower takes two requests for each array it sends."""
    data = save(state)
    return ArrayRecord({"state": Array("uint8", (len(data),), "safetensors", data)})


def unpack(message: Message) -> State:
    """Return the state in a message, with the bits and dtypes that were packed."""
    return load(message.content.array_records["state"]["state"].data)


class Parcel:
    """A state on its way to hospitals, which each get what they lack of it."""

    def __init__(self, state: State) -> None:
        self.state, self.hash = state, state_hash(state)
        self.packed: dict[str, ArrayRecord] = {}

    def holds(self, state: State) -> bool:
        """Tell whether this is a parcel of just these tensors, which are never written to."""
        ours = self.state
        return ours.keys() == state.keys() and all(v is ours[k] for k, v in state.items())

    def since(self, base: "Parcel | None") -> tuple[dict[str, str], ArrayRecord]:
        """Return what changed since a hospital was sent `base`, and what names both.

        All of it, with the name "" in place of the base's, where that would be no less than half;
        nothing of nothing.
        """
        if not self.state:
            return {}, pack({})
        lacks, name = self.state, ""
        if base and base.state.keys() <= self.state.keys():
            old = base.state
            new = {k: v for k, v in self.state.items() if k not in old or not v.equal(old[k])}
            if 2 * count_bytes(new) < count_bytes(self.state):
                lacks, name = new, base.hash
        if name not in self.packed:
            self.packed[name] = pack(lacks)
        return {"base": name, "hash": self.hash}, self.packed[name]


def has_lost_state(reply: Message | Fault | None) -> bool:
    """Tell whether a hospital no longer has what the message builds on: its disk is new."""
    if not isinstance(reply, Message) or reply.has_error():
        return False
    return reply.content.config_records.get("words", {}).get("status") == LOST


def read_reply(reply: Message | Fault) -> Answer:
    """Take a reply apart; where there is none, or none that can be read, it is a status."""
    words = {"status": "failed", "reason": ""}
    try:
        if isinstance(reply, tuple):
            return dict(zip(words, reply, strict=True)), {}, {}
        if reply.has_error():
            return words | {"reason": short_line(reply.error.reason)}, {}, {}
        words |= dict(reply.content.config_records["words"])
        words["reason"] = short_line(words["reason"])
        if words["status"] not in STATUSES:
            words["status"] = "failed"
        numbers = reply.content.metric_records.get("numbers", {})
        return words, dict(numbers), unpack(reply) if reply.content.array_records else {}
    except Exception as error:  # it comes from elsewhere, and must not end the run
        reason = short_line(f"reply of another kind: {error}")
        return {"status": "failed", "reason": reason}, {}, {}


def short_line(text: object) -> str:
    """Return what somebody else says as a short line, and never as one of the server's own."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:LINE])


def read_update(
    name: str, reply: Message | Fault, wanted: State, weight: float | None, withheld: bool = False
) -> tuple[Update, State]:
    """Turn a reply into an update and what the server is to keep of it.

    What does not fit the shapes of `wanted`, lacks a loss that is not `withheld`, or claims another
    `weight` than the hospital came with, has failed. Without a `weight` it is masked.
    """
    words, numbers, state = read_reply(reply)
    status, reason = words["status"], words["reason"]
    examples, loss = (numbers.get(key, math.nan) for key in ("examples", "train_loss"))
    said, fault = read_said(words.get("said", ""))
    told = withheld or (is_number(loss) and 0 < loss <= LARGEST)
    honest = weight is None or (examples == weight > 0 and told)
    fit = find_odd if weight is None else find_misfit
    if status == "ok" and (reason := fit(state, wanted)[1] or fault):
        status = "failed"
    elif status == "ok" and not honest:
        reason = f"examples={examples} (it came with {weight:g}) train_loss={loss}"
        status = "failed"
    if status != "ok":
        return Update(name, 0, status=status, reason=reason), {}
    spent = said.get("account", {}).get("epsilon", math.nan)
    kept = {SAID: torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)}
    loss = math.nan if withheld or weight is None else float(loss)
    update = Update(name, examples, state, loss, epsilon=spent)
    return update, kept if said else {}


def read_introduction(reply: Message | Fault) -> tuple[str, dict[str, Any], str]:
    """Return a hospital's name, what it counts in the mean, and a fault: why it has none.

    It counts by its `weight`, and in the row of each of its `findings` by the labels `known`.
    """
    words, numbers, _ = read_reply(reply)
    name, counts = words.get("name"), {key: numbers.get(key) for key in ("weight", "known")}
    if words["status"] != "ok":
        return "", {}, words["reason"] or "it has failed"
    counts["findings"] = str(words.get("findings", "")).split(SEPARATOR)
    said, _ = read_json(words | {"said": words.get("introduction")})
    if not is_text(said, *INTRODUCTION) or not is_key(said["key"]):
        return "", {}, f"no introduction: {short_line(name)!r} gives no key"
    counts["introduction"] = {key: said[key] for key in INTRODUCTION}
    known = counts["known"] if isinstance(counts["known"], list) else [None]
    fits = len(known) == len(counts["findings"]) and all(map(is_number, [counts["weight"], *known]))
    fits = fits and re.fullmatch("[01]*", said["knows"]) is not None
    if not (isinstance(name, str) and name and fits and name == short_line(name)):
        return "", {}, short_line(f"no introduction: name={name!r} {counts}")
    return name, counts, ""


def sum_shapes(findings: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of validation sums, by so many findings."""
    return {key: (findings,) * each for key, each in SUMS.items()}


def read_sums(reply: Message | Fault, findings: int) -> tuple[dict[str, np.ndarray], str]:
    """Return a hospital's validation sums, or why they cannot be: what no films could give."""
    words, numbers, _ = read_reply(reply)
    if words["status"] != "ok":
        return {}, words["reason"]
    sums = {key: np.asarray(numbers.get(key)) for key in SUMS}
    return (sums, "") if could_be(sums, findings) else ({}, "its sums are none of any films")


def could_be(sums: dict[str, np.ndarray], findings: int) -> bool:
    """Tell whether some films could give these validation sums."""
    fits = all(value.dtype == np.int64 for value in sums.values())
    fits = fits and {k: value.shape for k, value in sums.items()} == sum_shapes(findings)
    fits = fits and all(((value >= 0) & (value <= MOST)).all() for value in sums.values())
    return bool(fits and (sums["ordered"] <= 2 * sums["pairs"]).all())


def read_json(words: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return what a hospital said about a masked sum, or why it said nothing that can be read."""
    if words["status"] != "ok":
        return {}, words["reason"] or words["status"]
    try:
        said = json.loads(words["said"])
        return (said, "") if isinstance(said, dict) else ({}, "what it says is of another kind")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        return {}, f"what it says cannot be read: {type(error).__name__}"


def is_text(said: object, *keys: str, longest: int = LONGEST) -> bool:
    """Tell a dictionary that has under each of these keys a text, which is not too long."""
    return isinstance(said, dict) and all(
        isinstance(said.get(key), str) and len(said[key]) <= longest for key in keys
    )


def offer_fault(said: dict[str, Any], members: Sequence[str]) -> str:
    """Say why a hospital's offer for a masked sum is none; empty where it is one."""
    whole = is_text(said, "what") and is_text(said.get("offer"), *OFFER)
    whole = whole and is_key(said["offer"]["key"])
    whole = whole and is_text(said.get("shares"), *members, longest=4 * LONGEST)
    return "" if whole else "its offer is none"


def is_number(value: object) -> bool:
    """Tell a finite number, 0 or more, from what else a message may hold."""
    return isinstance(value, int | float) and 0 <= value < math.inf


def read_said(text: str) -> tuple[dict[str, Any], str]:
    """Read what a hospital said of its patients' budget: `account` and `stop`; or why it cannot."""
    try:
        said = json.loads(text or "{}")
        account, stop = said.get("account", {}), said.get("stop", "")
        numbers = {k: v for k, v in account.items() if k != "hospital"}
        whole = numbers.keys() == ACCOUNT and all(float(v) >= 0 for v in numbers.values())
        if not account or (whole and isinstance(stop, str)):
            return {"account": numbers, "stop": short_line(stop)} if account else {}, ""
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        pass
    return {}, "its budget cannot be read"


class Member:
    """A hospital as the server knows it: its name, what it counts, what it said of its budget."""

    def __init__(self, name: str, counts: dict[str, Any], settings: Parameters, seed: int) -> None:
        self.name, self.settings, self.seed = name, settings, seed
        self.weight, self.known = counts["weight"], counts["known"]

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
