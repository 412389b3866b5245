"""ChestXrayDataset: films and labels from the store; normalise, augment."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from .base.errors import InputError
from .base.files import open_store, read_written
from .base.findings import findings_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_ANGLE, MAX_SHIFT = 7.0, 0.05  # degrees; share of the film's side
AT_ONCE = 64  # films in a batch that is only predicted


def read_report(prepared: Path) -> dict[str, Any]:
    """Read `report.json`; raise InputError where notebook 02 has not run."""
    path = prepared / "report.json"
    if not path.is_file():
        raise InputError(f"{path} is not there: run notebook 02_preprocess first")
    return json.loads(path.read_text())


def read_index(prepared: Path) -> pd.DataFrame:
    """Read `index.csv` as notebook 02 wrote it; a finding that nobody looked for is NaN."""
    text = ("image_index", "source", "patient_id", "sex", "view", "scanner", "split")
    index = read_written(prepared / "index.csv", *text)
    return index.astype({"row": int} | dict.fromkeys(findings_of(index), np.float32))


class ChestXrayDataset(torch.utils.data.Dataset):
    """Films and labels of some rows of the index, read from the store without decoding anything.

    `dataset[i]` is a film, uint8 (1, H, W), and its labels, float32 (findings,), NaN where
    unknown; `dataset.batch(positions)` reads many at once. `dataset.index` is its films' table.
    """

    def __init__(self, prepared: Path, index: pd.DataFrame | None = None) -> None:
        self.index = (read_index(prepared) if index is None else index).reset_index(drop=True)
        self.store = open_store(prepared / "images.npy", self.index["row"].max())
        self.labels = self.index[self.findings].to_numpy(np.float32)
        self._rows = self.index["row"].to_numpy()

    def __len__(self) -> int:
        """Count the films."""
        return len(self._rows)

    @property
    def findings(self) -> list[str]:
        """The findings that the films are labelled with, in the order of the model's outputs."""
        return findings_of(self.index)

    @property
    def weight(self) -> float:
        """What these films count in a mean: each by the share of its labels that is known."""
        total = float((~np.isnan(self.labels)).mean(axis=1).sum())
        return int(total) if total.is_integer() else total

    @property
    def known(self) -> list[int]:
        """Count, for each finding, the films whose label of it is known."""
        return (~np.isnan(self.labels)).sum(axis=0).tolist()

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """Return one film, uint8 (1, H, W) or features (C, h, w), and its labels (findings,)."""
        films, labels = self.batch([position])
        return films[0], labels[0]

    def batch(
        self, positions: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Return films, uint8 (B, 1, H, W) or features (B, C, h, w), and labels, float32 (B, k)."""
        films = torch.from_numpy(self.store[self._rows[positions]])
        films = films[:, None] if films.ndim == 3 else films.permute(0, 3, 1, 2)
        labels = torch.from_numpy(self.labels[positions])
        if torch.device(device).type == "cuda":  # pinned, the copy overlaps with the last step
            films, labels = films.pin_memory(), labels.pin_memory()
        return films.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def holding(self, features: np.ndarray) -> "ChestXrayDataset":
        """Return the same films as features (N, h, w, C), a row for each row of the store."""
        part = self.where(np.full(len(self), True))
        part.store = features
        return part

    def where(self, keep: pd.Series | np.ndarray) -> "ChestXrayDataset":
        """Return the films for which the mask is true; the store is shared, not copied."""
        part = object.__new__(ChestXrayDataset)
        part.store, part.index = self.store, self.index[np.asarray(keep)].reset_index(drop=True)
        part.labels, part._rows = self.labels[np.asarray(keep)], self._rows[np.asarray(keep)]
        return part

    def parts(self, count: int) -> list["ChestXrayDataset"]:
        """Cut the films, in order, into at most `count` parts of the same batches as the whole."""
        batch = np.arange(len(self)) // AT_ONCE
        part = batch * count // (batch.max(initial=0) + 1)
        return [self.where(part == number) for number in range(part.max(initial=0) + 1)]


def draw_motion(rng: np.random.Generator, films: int) -> np.ndarray:
    """Draw how far each film is turned (up to 7 degrees) and shifted (up to 5 % of its side).

    Returns (3, films): the angle in radians and two shifts, where the side of a film is 2.
    """
    angle = np.radians(rng.uniform(-MAX_ANGLE, MAX_ANGLE, films))
    return np.vstack([angle, rng.uniform(-2 * MAX_SHIFT, 2 * MAX_SHIFT, (2, films))])


def normalise(films: Tensor, motion: np.ndarray | None = None) -> Tensor:
    """Turn uint8 films (B, 1, H, W) into the network's input, float32 (B, 3, H, W), channels last.

    First each film is turned and shifted by its `motion`, (3, B) of `draw_motion`, if there is one;
    never flipped, since hearts are on the left. ImageNet's mean and deviation are used.
    """
    grey = films.float().div_(255)
    if motion is not None:
        grey = _turn_and_shift(grey, *motion)
    # With plain numbers, since a tensor made here would make a GPU wait for the CPU in every step.
    channels = [(grey - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    return torch.cat(channels, dim=1).contiguous(memory_format=torch.channels_last)


def _turn_and_shift(grey: Tensor, angle: np.ndarray, *shift: np.ndarray) -> Tensor:
    """Rotate and shift each film of a batch."""
    rows = [[np.cos(angle), -np.sin(angle), shift[0]], [np.sin(angle), np.cos(angle), shift[1]]]
    theta = torch.from_numpy(np.array(rows, np.float32).transpose(2, 0, 1))
    theta = theta.to(grey.device, non_blocking=True)
    grid = F.affine_grid(theta, list(grey.shape), align_corners=False)
    return F.grid_sample(grey, grid, padding_mode="border", align_corners=False)
