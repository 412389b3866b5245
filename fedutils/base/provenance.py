"""What a result depends on beside parameters and films: code, torch, weights, the dtype."""

import functools
import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torchvision.models import ResNet34_Weights

from .device import environment, find_devices, precision
from .files import PACKAGE, git_revision, package_files, sha256
from .weights import find_weights

# Wings that only read what was trained, or start it.
READERS = ("evidence", "plots", "batch")


def provenance(device: str, precision_wanted: str, weights: str) -> dict[str, str]:
    """Return what a run's result depends on beside its parameters, as its identity holds it.

    `weights` is the first eight digits of the file's SHA-256, as torchvision names its own.
    """
    return {
        "code": code_hash(),
        "torch": torch.__version__,
        "weights_sha256": "" if weights == "none" else weights_hash(find_weights(weights)),
        "dtype": str(precision(find_devices(device)[0], precision_wanted)),
    }


@functools.cache
def code_hash() -> str:
    """Return a hash of all code that may decide what is trained."""
    files = [path.relative_to(PACKAGE) for path in package_files()]
    chosen = [file for file in files if file.parts[0] not in READERS]
    content = [file.as_posix().encode() + (PACKAGE / file).read_bytes() for file in chosen]
    return sha256(b"".join(content))[:16]


def weights_hash(path: Path | None) -> str:
    """Return the hash of a file of weights; without one that of torchvision's, by its name."""
    if path is None:
        return Path(ResNet34_Weights.IMAGENET1K_V1.url).stem.rpartition("-")[2]
    return _hash_file(path, path.stat().st_size, path.stat().st_mtime_ns)


@functools.lru_cache
def _hash_file(path: Path, size: int, time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def this_machine() -> dict[str, Any]:
    """Return when and where this process computes: machine, versions, revision of the code."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"at": now} | environment() | {"git_revision": git_revision()}
