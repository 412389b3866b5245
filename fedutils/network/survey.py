"""A survey before training: each hospital describes its films in counts, none of a few patients."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

from ..base.errors import InputError
from ..base.files import write_atomic
from ..films.survey import describe_films, differing, tabulate_surveys
from ..settings import FIELDS, Settings
from .messages import INTRODUCTION, is_text, pack, read_json, read_reply
from .server import POLL, Network
from .site import Content, Site, answer

RUN = "survey"  # what its messages are of: no run
WRITTEN = "survey/survey.json"  # below the server's work folder
ORDER = {"run": RUN, "config": json.dumps({"min_clients": 1}), "trunk": ""}


def tell_films(message: Message, context: Context) -> Message:
    """Describe this hospital's films, by its own `least_count`."""

    def there(order: ConfigRecord, node: dict[str, Any]) -> tuple[dict[str, str], Content]:
        """Return the counts as text, and the mean film."""
        here = Site(order, node)
        least = int(node.get("least_count", FIELDS["least_count"].default))
        counts, mean = describe_films(Path(node["work_dir"]) / "prepared", least)
        about = {"name": here.name, "least": least, "counts": counts}
        with here.masking() as masker:
            about["introduction"] = masker.introduce(node["node"])
        films = {} if mean is None else {"mean": torch.from_numpy(mean)}
        return {"said": json.dumps(about)}, {"state": pack(films)}

    return answer(message, context, there)


class Survey(Network):
    """What the hospitals behind a Flower grid say of their films, each for itself."""

    def ask_all(self, seconds: float) -> dict[str, dict[str, Any]]:
        """Ask every SuperNode that connects, until `num_clients` have told or the time is over."""
        found: dict[str, dict[str, Any]] = {}
        end, wanted = time.monotonic() + seconds, self.settings.num_clients
        while len(found) < wanted and time.monotonic() < end:
            online = set(self.grid.get_node_ids())
            new = sorted(online - self.asked.keys())
            empty = {"order": ConfigRecord(ORDER), "state": ArrayRecord()}
            queries = [Message(RecordDict(empty), node, "query.survey") for node in new]
            self.asked |= dict(zip(new, self.grid.push_messages(queries), strict=True))
            for node, query in self.asked.items():
                reply = self.wait(query, 0) if query else None
                if reply is None:
                    continue
                self.asked[node] = ""
                name, told, fault = self.read(reply, node)
                if name in found:
                    fault = f"calls itself {name}, as another one does: left out"
                if not fault:
                    found[name] = told
                print(f"SuperNode {node}: {fault or name}", flush=True)
            time.sleep(POLL)
        return dict(sorted(found.items()))

    def read(self, reply: Message, node: int) -> tuple[str, dict[str, Any], str]:
        """Return a hospital's name, its counts with its mean film, and why there are none."""
        words, _, films = read_reply(reply)
        said, fault = read_json(words)
        if fault:
            return "", {}, fault
        name, counts, introduction = (said.get(k) for k in ("name", "counts", "introduction"))
        if not (is_text(said, "name") and is_text(introduction, *INTRODUCTION)):
            return "", {}, "says not who it is"
        if self.keys and not self.has_key(name, node, introduction):
            return "", {}, f"calls itself {name}, and has not its key: left out"
        try:
            tabulate_surveys({name: counts})  # what cannot be shown has not its shape
            differing({name: counts})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return "", {}, f"{name}: its counts are none: {type(error).__name__}"
        mean = films.get("mean")
        if mean is not None and mean.dtype == torch.uint8 and mean.ndim == 2:
            counts["mean film"] = mean.tolist()
        return name, counts | {"least": said.get("least")}, ""


def ask_hospitals(grid: Grid, settings: Settings, seconds: float, keys: str = "") -> Path:
    """Ask `num_clients` hospitals for their counts, print what differs, and write survey.json.

    Raises InputError where none has answered.
    """
    network = Survey(grid, dataclasses.replace(settings, name=RUN), keys)
    network.config = json.loads(ORDER["config"])
    found = network.ask_all(seconds)
    if not found:
        raise InputError(f"in {seconds:g} s no hospital has said anything")
    path = Path(settings.work_dir) / WRITTEN
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(found).encode())
    print(tabulate_surveys(found).to_string(), *differing(found), sep="\n", flush=True)
    return path
