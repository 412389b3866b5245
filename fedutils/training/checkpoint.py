"""Atomic, verified save and load of everything that a round boundary needs, and the run's lock.

No pickle anywhere: tensors are safetensors, the rest is JSON in the file's header.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file

from ..base.files import write_atomic
from ..base.state import State, state_hash
from ..rounds import Progress
from ..run import Model, copy_model

KEPT_ROUNDS = 2  # the last one, and the one before it should the last be damaged


def save_progress(folder: Path, progress: Progress, identity: str) -> Path:
    """Write a round boundary beside the one before, then drop older ones; return the file.

    The name holds the round and the checksum of the header's text, which holds those of all
    tensors. `identity` names the run, so that a checkpoint of another one is not mistaken for this
    one's. The state's hash is taken from the last row of the history, where it has been computed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = _parts(progress)
    last = progress.rows[-1] if progress.rows else {}
    known = {"state": last.get("state_sha256")}
    about = {
        "identity": identity,
        "round": progress.round,
        "best": progress.best,
        "best_round": progress.best_round,
        "clients": sorted(progress.clients),
        "rows": progress.rows,
        "sums": {part: known.get(part) or state_hash(state) for part, state in parts.items()},
    }
    text = json.dumps(about)
    path = folder / f"round-{progress.round:05d}-{_checksum(text)}.safetensors"
    tensors = {f"{part}|{k}": v.contiguous() for part, s in parts.items() for k, v in s.items()}
    write_atomic(path, partial(save_file, tensors, metadata={"json": text}))
    for old in _files(folder)[KEPT_ROUNDS:]:
        old.unlink()
    return path


def load_progress(folder: Path, identity: str) -> Progress | None:
    """Return the newest round boundary that is whole and of this run, or None.

    A truncated or foreign file is passed over with a warning that names it.
    """
    for left in folder.glob(".round-*.tmp"):
        left.unlink()
    for path in _files(folder):
        owner, progress = _read(path)
        if progress is None:
            warnings.warn(f"{path}: checksum does not match, using the round before", stacklevel=2)
        elif owner == identity:
            return progress
        else:
            warnings.warn(f"{path}: belongs to another run, not used", stacklevel=2)
    return None


def adopt_progress(run: Path, model: Model, identity: str, rounds: int) -> Progress | None:
    """Copy an equal model and its checkpoint from a finished run beside `run`, if there is one."""
    part = f"checkpoint/{model.name}"
    for other in (path.parent for path in sorted(run.parent.glob("*/finished.json"))):
        if other == run or last_identity(other / part) != identity:
            continue
        now = load_progress(other / part, identity)
        if now and now.round <= rounds:
            copy_model(other, run, model)
            save_progress(run / part, now, identity)
            return now
    return None


def last_identity(folder: Path) -> str:
    """Return whose the newest round boundary of a folder is, by its header alone; '' for none."""
    for path in _files(folder)[:1]:
        with path.open("rb") as file, contextlib.suppress(ValueError, KeyError):  # truncated
            length = file.read(8)
            text = _header(length + file.read(int.from_bytes(length, "little")))
            return json.loads(text)["identity"]
    return ""


def _read(path: Path) -> tuple[str, Progress | None]:
    """Return whose a checkpoint is and what it holds, None where that is not what was written."""
    content = path.read_bytes()
    try:
        text, tensors = _header(content), load(content)
        if _checksum(text) != path.stem.rpartition("-")[2]:
            return "", None
        about = json.loads(text)
        owner, sums = about.pop("identity"), about.pop("sums")
        progress = _unflatten(tensors, about)
    except (ValueError, KeyError, SafetensorError):
        return "", None
    whole = sums == {part: state_hash(state) for part, state in _parts(progress).items()}
    return owner, progress if whole else None


def _checksum(text: str) -> str:
    """Return the part of a checkpoint's name that tells whether its header is whole."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, newest round first."""
    return sorted(folder.glob("round-*.safetensors"), reverse=True)


def _header(content: bytes) -> str:
    """Return the text that `save_progress` put into the safetensors header."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]["json"]


def _parts(progress: Progress) -> dict[str, State]:
    """Return all tensors by where they belong."""
    clients = {f"client:{name}": kept for name, kept in progress.clients.items()}
    return {"state": progress.state, "server": progress.server} | clients


def _unflatten(tensors: State, about: dict[str, Any]) -> Progress:
    """Put tensors, named by part and name, back where they belong."""
    clients = {name: {} for name in about.pop("clients")}
    parts: dict[str, State] = {"state": {}, "server": {}}
    parts |= {f"client:{name}": kept for name, kept in clients.items()}
    for key, value in tensors.items():
        part, _, name = key.partition("|")
        parts[part][name] = value
    return Progress(parts["state"], parts["server"], clients, **about)


class Writer:
    """Writes while the next round trains: one thing at a time, in a thread of its own.

    What goes wrong there is raised at the next `wait` or `start`.
    """

    def __init__(self) -> None:
        self.pool, self.last = ThreadPoolExecutor(1, "writer"), None

    def start(self, write: Callable[[], None]) -> None:
        """Begin to write, once what was begun before is written."""
        self.wait()
        self.last = self.pool.submit(write)

    def wait(self) -> None:
        """Return when all is written."""
        last, self.last = self.last, None
        if last:
            last.result()
