"""Atomic, verified save and load of all that a round boundary needs, without any pickle."""

import contextlib
import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..base.files import sha256, write_atomic
from ..base.state import State, state_hash
from ..rounds import Progress
from ..run import ADOPTED, TRUNK, Model, model_file
from .identity import note_adopted

BROKEN = KeyError, TypeError, ValueError, SafetensorError
KEPT_ROUNDS = 2  # the last one, and the one before it should the last be damaged


def save_progress(folder: Path, progress: Progress, identity: str) -> Path:
    """Write a round boundary beside the one before, then drop older ones; return the file.

    The name holds the round and the checksum of the header's text, which holds those of all
    tensors and the run's `identity`. The state's hash is that of the last row of the history.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"state": progress.state, "server": progress.server}
    parts |= {f"client:{name}": kept for name, kept in progress.clients.items()}
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
    killed = folder.glob(".round-*.tmp")
    for old in [*_files(folder)[KEPT_ROUNDS:], *killed]:
        old.unlink()
    return path


def load_progress(folder: Path, identity: str) -> Progress | None:
    """Return the newest round boundary that is whole and of this run, with a warning for others."""
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
    """Copy an equal model and its checkpoint from a finished run beside `run`, if there is one.

    The history's `reason` says from where.
    """
    part = f"checkpoint/{model.name}"
    for other in (path.parent for path in sorted(run.parent.glob("*/finished.json"))):
        if other == run or last_identity(other / part) != identity:
            continue
        now = load_progress(other / part, identity)
        if now and now.round <= rounds:
            files = [model_file(other, model.name)]
            if model.arm == "federated":  # the BatchNorm that its clients keep
                files += other.glob(f"models/{model.name}-*.safetensors")
            if not model_file(run, TRUNK).is_file():
                files.append(model_file(other, TRUNK))
            for file in files:
                write_atomic(run / "models" / file.name, file.read_bytes())
            for row in now.rows:
                row["reason"] = row["reason"] or f"{ADOPTED}{other.name}"
            save_progress(run / part, now, identity)
            note_adopted(run, other)
            print(f"{model.name}: {now.rows[-1]['reason']}, which trained the same", flush=True)
            return now
    return None


def last_identity(folder: Path) -> str:
    """Return whose the newest round boundary of a folder is, by its header alone; '' for none."""
    for path in _files(folder):
        with contextlib.suppress(*BROKEN):
            return json.loads(_header(path))["identity"]
    return ""


def _read(path: Path) -> tuple[str, Progress | None]:
    """Return whose a checkpoint is and what it holds, None where that is not what was written."""
    try:
        text, tensors = _header(path), load_file(path)
        about = json.loads(text)
        owner, sums = about.pop("identity"), about.pop("sums")
        parts: dict[str, State] = {part: {} for part in sums}
        for key, value in tensors.items():
            part, _, name = key.partition("|")
            parts[part][name] = value
    except BROKEN:
        return "", None
    whole = sums == {part: state_hash(state) for part, state in parts.items()}
    if not whole or _checksum(text) != path.stem.rpartition("-")[2]:
        return "", None
    clients = {name: parts[f"client:{name}"] for name in about.pop("clients")}
    return owner, Progress(parts["state"], parts["server"], clients, **about)


def _checksum(text: str) -> str:
    """Return the part of a checkpoint's name that tells whether its header is whole."""
    return sha256(text.encode())[:16]


def _files(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, newest round first."""
    return sorted(folder.glob("round-*.safetensors"), reverse=True)


def _header(path: Path) -> str:
    """Return the text that `save_progress` put into the safetensors header."""
    with safe_open(path, "pt") as file:
        return file.metadata()["json"]


class Writer:
    """Writes in a thread of its own, one after the other; `wait` and `start` raise its errors."""

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
