"""What a frozen trunk makes of the films, computed once: rounds then train layer4 and fc alone.

A `.npy` of shape (films, h, w, 256), and a journal with a checksum for each block of films: what
is missing or damaged is computed again.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..base.device import find_devices
from ..base.errors import InputError
from ..base.files import KAGGLE, sha256, write_atomic
from ..base.parameters import Parameters, parameter, split_list
from ..base.state import state_hash
from ..base.threads import Shared
from ..dataset import ChestXrayDataset, read_report
from ..model import ChestResNet, build_resnet34
from ..run import TRUNK, read_model

FEATURE_LAYERS = {"layer4", "fc"}  # what may be trained from cached features of conv1 to layer3
FEATURES_VERSION = 1
BLOCK = 64  # films in one pass and one entry of the journal: what a kill costs at most
DTYPES = {"fp16": np.float16, "fp32": np.float32}
KAGGLE_WORKING, KAGGLE_TEMP = KAGGLE / "working", KAGGLE / "temp"


@dataclass(frozen=True)
class FeatureParameters(Parameters):
    """Whether a frozen trunk runs once, or in each epoch."""

    cache_features: bool = parameter(
        False, "run the frozen trunk once and train from its output; wants augment=false",
        identity=False,  # it is how a run computes, as the device is
    )  # fmt: skip
    feature_dtype: str = parameter(
        "fp16", "of that output on disk, should a run go on with it", allowed=tuple(DTYPES)
    )

    def check(self) -> None:
        """Raise InputError where features of the trunk cannot stand for the films."""
        if not self.cache_features:
            return
        if self.augment:
            raise InputError("cache_features=true wants augment=false: features are computed once")
        if not set(split_list(self.tracked)) <= FEATURE_LAYERS:
            what = f"cache_features=true wants tracked=layer4,fc, not {self.tracked!r}"
            raise InputError(f"{what}: only a trunk that stays frozen can be computed once")


class FeatureStore:
    """The output of conv1 to layer3 for every film; its name is a key of all that it depends on."""

    def __init__(
        self,
        models: Shared[ChestResNet],
        films: ChestXrayDataset,
        settings: Parameters,
        fingerprint: str,
    ) -> None:
        self.models, self.films = models, films.store
        model = models.tools[0]
        self.dtype = np.dtype(DTYPES[settings.feature_dtype])
        side = -(-films.store.shape[1] // 16)
        self.shape = (len(films.store), side, side, model.layer4[0].conv1.in_channels)
        state = model.state_dict()
        trunk = {k: v for k, v in state.items() if not k.startswith(("layer4.", "fc."))}
        about = [FEATURES_VERSION, state_hash(trunk), fingerprint, films.store.shape[1]]
        about += [settings.feature_dtype, model.computes_in()]
        key = sha256(json.dumps(about).encode())[:16]
        self.path = find_scratch(settings.prepared) / f"features-{key}.npy"
        count = -(-self.shape[0] // BLOCK)
        # Blocks of even size: a single film alone may be computed with other last bits.
        self.bounds = np.linspace(0, self.shape[0], count + 1).astype(int)
        store = self._find()
        self.is_there, self.sums = store is not None, {}
        with contextlib.suppress(OSError, ValueError):  # killed before the first block, or damaged
            journal = self.path.with_suffix(".json")
            self.sums = json.loads(journal.read_text()) if self.is_there else {}
        self.missing = [i for i in range(count) if not self._is_whole(store, i)]

    @property
    def gigabytes(self) -> float:
        """The size of the whole store, in GB."""
        return float(np.prod(self.shape)) * self.dtype.itemsize / 1e9

    def open(self) -> np.ndarray | None:
        """Return the features (N, h, w, 256), read only, or None where some are still missing."""
        return None if self.missing else np.load(self.path, mmap_mode="r")

    def fill(self, progress: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
        """Compute what is missing and return all features; `progress` gets films done and all."""
        if not self.is_there:
            write_atomic(self.path, self._allocate)
            self.is_there = True
        numbers = list(self.missing)
        for number, block in zip(numbers, self.models.each(self.compute, numbers), strict=True):
            start, stop = self.bounds[number : number + 2]
            np.load(self.path, mmap_mode="r+")[start:stop] = block
            self.sums[str(number)] = zlib.crc32(block)
            write_atomic(self.path.with_suffix(".json"), json.dumps(self.sums).encode())
            self.missing.pop(0)
            progress(self.shape[0] - self._films_left(), self.shape[0])
        return self.open()

    @torch.no_grad()
    def compute(self, number: int, model: ChestResNet) -> np.ndarray:
        """Return the features of one block of films, as they are stored."""
        start, stop = self.bounds[number : number + 2]
        model.eval()
        films = torch.from_numpy(np.array(self.films[start:stop]))[:, None]
        output = model.features(films.to(next(model.parameters()).device))
        block = output.permute(0, 2, 3, 1).float().cpu().numpy().astype(self.dtype)
        if not np.isfinite(block).all():
            what = f"features of films {start} to {stop} do not fit into {self.dtype}"
            raise InputError(f"{what}: choose feature_dtype=fp32, or look at the weights")
        return np.ascontiguousarray(block)

    def seconds_left(self) -> float:
        """Estimate the time that `fill` will take, from a block on each device, side by side."""
        if not self.missing:
            return 0.0
        some = self.missing[:1] * len(self.models.tools)
        list(self.models.each(self.compute, some))  # the first pass prepares a network's kernels
        began = time.perf_counter()
        list(self.models.each(self.compute, some))
        films = sum(self.bounds[number + 1] - self.bounds[number] for number in some)
        return (time.perf_counter() - began) / films * self._films_left()

    def stand_in(self) -> np.ndarray:
        """Return the features of the first film in place of all, for timing; it takes no memory."""
        (block,) = self.models.each(self.compute, [0])
        return np.broadcast_to(block[0], self.shape)

    def describe(self) -> str:
        """Say in a sentence what is stored where, and what is left to compute."""
        left, minutes = self._films_left(), self.seconds_left() / 60
        todo = f"{left:,} of them will be computed first, in about {minutes:.1f} minutes"
        return (
            f"The trunk's output for {self.shape[0]:,} films takes {self.gigabytes:.2f} GB as"
            f" {self.dtype} in {self.path.parent.name}/: {todo if left else 'all of it is there'}."
        )

    def _films_left(self) -> int:
        """Count the films whose features are missing."""
        return int(sum(self.bounds[i + 1] - self.bounds[i] for i in self.missing))

    def _find(self) -> np.ndarray | None:
        """Return the store that lies there, whole or in part; warn of another file."""
        if not self.path.is_file():
            return None
        try:
            store = np.load(self.path, mmap_mode="r")
            fault = f"it holds {store.shape} {store.dtype}, not {self.shape} {self.dtype}"
            if store.shape == self.shape and store.dtype == self.dtype:
                return store
        except (ValueError, OSError, EOFError) as error:
            fault = str(error)
        warnings.warn(f"{self.path} cannot be used ({fault}): computed again", stacklevel=3)
        return None

    def _is_whole(self, store: np.ndarray | None, number: int) -> bool:
        """Tell whether a block is what was written; warn of one that is damaged."""
        start, stop = self.bounds[number : number + 2]
        known = self.sums.get(str(number))
        damaged = known is not None and zlib.crc32(store[start:stop]) != known
        if damaged:
            text = f"{self.path}: films {start} to {stop} are damaged, computed again"
            warnings.warn(text, stacklevel=3)
        return known is not None and not damaged

    def check_disk(self) -> None:
        """Raise InputError where the store does not fit beside what is there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        free, need = shutil.disk_usage(self.path.parent).free / 1e9, self.gigabytes
        if not self.is_there and need > free * 0.98:
            others = sorted(p.name for p in self.path.parent.glob("features-*.npy"))
            hint = f"; {', '.join(others)} there may be deleted" if others else ""
            raise InputError(
                f"cache_features=true needs {need:.1f} GB in {self.path.parent}, {free:.1f} GB are"
                f" free: choose cache_features=false, feature_dtype=fp16 or fewer films{hint}"
            )

    def _allocate(self, path: Path) -> None:
        """Write an empty store, which gets its place on the disk at once, or fails here and now."""
        np.lib.format.open_memmap(path, "w+", self.dtype, self.shape)
        if hasattr(os, "posix_fallocate"):  # not on Windows
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def find_scratch(prepared: Path) -> Path:
    """Return the folder for features: beside the films, on Kaggle where it is no output."""
    if not KAGGLE_WORKING.is_dir():
        return prepared
    return KAGGLE_TEMP if KAGGLE_TEMP.is_dir() else Path(tempfile.gettempdir())


def stored_features(settings: Parameters, films: ChestXrayDataset) -> ChestXrayDataset:
    """Return the films as the features that training stored; as they are where there are none."""
    if not settings.cache_features:
        return films
    model = build_resnet34(
        "none", settings.tracked, "average",
        outputs=len(films.findings), precision=settings.precision,
    )  # fmt: skip
    model.place(find_devices(settings.device)[0]).load(read_model(settings.run, TRUNK))
    fingerprint = read_report(settings.prepared)["fingerprint"]
    features = FeatureStore(Shared([model]), films, settings, fingerprint).open()
    return films if features is None else films.holding(features)
