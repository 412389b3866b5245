"""A hospital's part in masked sums, without its films: torch would take seconds of each message."""

import contextlib
import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from flwr.app import ConfigRecord, Context, Message, RecordDict

from ..base.errors import InputError, in_a_line
from ..base.files import sha256, write_private
from ..privacy.keys import read_keys
from ..privacy.masks import Masker, MaskFault

MASKS = "privacy/masks.json"  # in the work folder: of all runs
MASKS_COUNT = "masks.count"  # there, too: how many numbers that file remembers
Content = dict[str, Any]  # records of a message by name


class Site:
    """One message at a SuperNode: the `order`, and what the `node` is configured to be.

    That is its `name`, the `work_dir` in which notebook 02 prepared the films, and maybe its
    `keys`, a `device`, `weights`, its own copy of the file that the server starts from, and what it
    insists on: `min_clients`, `secure_aggregation`, `dp` and `total_epsilon`.
    """

    def __init__(self, order: ConfigRecord, node: dict[str, Any]) -> None:
        self.order, self.node, self.name = order, node, str(node["name"])
        self.config: dict[str, Any] = json.loads(order["config"])
        self.run_key = run_key(order["run"], self.config)
        self.memory = Path(node["work_dir"]) / MASKS
        self.counted = Path(node["work_dir"]) / MASKS_COUNT

    def masker(self) -> Masker:
        """Return this hospital's half of masks, with its own key and those it was given.

        Raises InputError where it insists on masks and has no keys, by which alone it knows that
        the others are hospitals; and where the memory of masks is not the latest.
        """
        memory = json.loads(self.memory.read_text()) if self.memory.is_file() else {}
        known = len(memory.get("revealed", ()))
        if self.counted.is_file() and known < int(self.counted.read_text()):
            raise InputError(
                f"{self.memory} is lost, or an older copy: without it numbers could be unmasked for"
                " two lists of hospitals. Bring the latest back; if there is none, delete"
                f" {self.counted}, take part in none of the runs so far, and let new ones have"
                " other seeds (-p seeds=)"
            )
        least = max(int(self.config["min_clients"]), int(self.node.get("min_clients", 1)))
        own, others = read_keys(self.node.get("keys", ""), self.name)
        if self.node.get("secure_aggregation") == "True" and not (
            own and others.keys() - {self.name}
        ):
            raise InputError("a hospital that insists on masks needs --keys with all *.key.pub")
        return Masker(self.name, self.run_key, least, memory, own, others)

    @contextlib.contextmanager
    def masking(self) -> Iterator[Masker]:
        """Lend this hospital's half of masks; then write down what it must not forget.

        Nobody else may read that, and no other process write it meanwhile.
        """
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.memory.with_suffix(".lock")):
            masker = self.masker()
            yield masker
            write_private(self.memory, json.dumps(masker.memory))
            write_private(self.counted, str(len(masker.memory["revealed"])))

    @property
    def masks(self) -> dict[str, Any]:
        """What the order says about a masked sum."""
        return json.loads(self.order["masks"])

    @property
    def asked(self) -> dict[str, Any]:
        """What is to go into a sum, as far as the order says."""
        return {key: self.order.get(key, "") for key in ("seed", "round", "hash")}

    def sum_asked_for(self, kind: str) -> str:
        """Return what a sum is about, by all that this hospital is asked.

        It tells one attempt from another, and is signed: all must be asked for the same.
        """
        masks = self.masks
        about = [masks[key] for key in ("whole", "members", "nonce")]
        return name_sum(kind, [self.run_key, self.asked, self.order.get("plan", ""), *about])


def name_sum(kind: str, about: object) -> str:
    """Return a short name for a kind of sum and all that it is about."""
    return f"{kind} {sha256(json.dumps([kind, about], sort_keys=True).encode())[:32]}"


def run_key(run: str, config: dict[str, Any]) -> str:
    """Return what tells a run from all others; limits are no part of what is trained."""
    known = json.dumps(config | {"total_epsilon": 0, "min_clients": 0})
    return f"{run} {sha256(known.encode())[:16]}"


def answer(
    message: Message,
    context: Context,
    work: Callable[[ConfigRecord, dict[str, Any]], tuple[dict[str, str], Content]],
) -> Message:
    """Do what a message asks, and reply with words and more, or with the kind of an error.

    An error's text stays in this hospital: it may hold paths, or names of films and so of patients.
    Masks' own errors name hospitals and sums alone.
    """
    words, content = {"status": "ok", "reason": ""}, {}
    try:
        node = dict(context.node_config) | {"node": str(context.node_id)}
        more, content = work(message.content.config_records["order"], node)
        words |= more
    except MaskFault as error:
        words = {"status": "failed", "reason": in_a_line(error)}
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}; see the hospital's log"
        words = {"status": "failed", "reason": reason}
    return Message(RecordDict(content | {"words": ConfigRecord(words)}), reply_to=message)
