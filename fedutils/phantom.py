"""The phantom: a synthetic chest X-ray set in the layout of NIH ChestX-ray14, quirks included.

It is the embedded default, so that everything runs with neither download nor network. Each film
is drawn from a seed: an anatomy by patient, a pose by film, a look by scanner, and one visible
sign for each finding where it would sit in the chest. It is no evidence about patients.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from fedutils.findings import FINDINGS, InputError, format_labels
from fedutils.rng import generator

FORMAT_VERSION = 4
DEFAULT_PATIENTS = 1200
DEFAULT_SIZE = 192  # pixels
NOTICE = "PHANTOM: synthetic drawings, not patients; nothing measured on them is clinical evidence."
NIH_COLUMNS = [
    "Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender",
    "View Position", "Width", "Height", "Spacing",
]  # fmt: skip
NIH_HEADER = (
    ",".join(NIH_COLUMNS[:7]) + ",OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
)
BOXED = FINDINGS[:8]  # the findings that NIH's radiologists boxed


class Scanner(NamedTuple):
    """One detector type: its share of patients, its case mix and the look of its films."""

    spacing: float  # mm a pixel of the original, which is how NIH's table tells scanners apart
    width: int
    height: int
    patients: float  # share of patients, like the next two from NIH's own table
    ap: float  # share of AP films
    clear: float  # share of films without a finding
    zoom: float
    gamma: float
    contrast: float
    noise: float
    border: float  # collimated margin, as a share of the film


SCANNERS = (
    Scanner(0.143, 2992, 2991, 0.45, 0.15, 0.45, 1.00, 1.00, 1.00, 0.010, 0.00),
    Scanner(0.168, 2048, 2500, 0.23, 0.59, 0.40, 1.08, 1.25, 1.10, 0.016, 0.00),
    Scanner(0.139, 2544, 3056, 0.13, 0.64, 0.34, 1.04, 0.80, 0.85, 0.013, 0.02),
    Scanner(0.171, 2500, 2048, 0.12, 0.43, 0.50, 0.94, 1.10, 0.92, 0.020, 0.05),
    Scanner(0.194311, 2021, 2020, 0.07, 0.15, 0.43, 0.98, 0.95, 1.18, 0.008, 0.00),
)

# NIH's share of films by finding, and how much likelier each finding is on the five scanners and
# on AP than on PA films (all measured on NIH's own table).
NIH_SHARE = dict(zip(FINDINGS, (
    0.103, 0.0248, 0.119, 0.177, 0.0516, 0.0565, 0.0128,
    0.0473, 0.0416, 0.0205, 0.0224, 0.0150, 0.0302, 0.0020,
), strict=True))  # fmt: skip
CASE_MIX = dict(zip(FINDINGS, (
    (0.9, 1.1, 1.2, 0.9, 0.8, 1.5), (0.9, 1.1, 1.2, 0.8, 1.1, 1.2), (0.9, 1.1, 1.3, 0.7, 0.8, 1.5),
    (0.9, 1.1, 1.4, 0.6, 0.9, 1.7), (1.1, 1.0, 0.9, 0.9, 0.7, 0.9), (1.1, 0.8, 1.0, 1.1, 0.9, 0.8),
    (0.8, 1.2, 1.3, 0.7, 0.5, 1.9), (1.2, 0.7, 1.1, 0.5, 1.8, 0.8), (0.6, 1.4, 1.4, 0.8, 0.5, 3.1),
    (0.2, 1.8, 1.6, 0.4, 0.1, 11.0), (1.0, 0.9, 1.0, 0.7, 1.6, 1.0),
    (1.4, 0.9, 0.6, 0.9, 0.7, 0.3), (1.2, 0.8, 1.1, 0.7, 1.3, 0.6), (1.4, 0.8, 0.7, 0.6, 1.3, 0.3),
), strict=True))  # fmt: skip
SHARE_FLOOR, TEST_SHARE, TEST_PATIENTS = 0.06, 0.32, 45
# How much likelier the first is on a film that shows the second (measured, the largest capped).
TOGETHER = {
    ("Effusion", "Infiltration"): 1.7, ("Atelectasis", "Effusion"): 2.4,
    ("Atelectasis", "Infiltration"): 1.6, ("Nodule", "Infiltration"): 1.4,
    ("Mass", "Nodule"): 2.8, ("Pneumothorax", "Effusion"): 1.6, ("Consolidation", "Effusion"): 2.3,
    ("Consolidation", "Atelectasis"): 2.5, ("Pleural_Thickening", "Effusion"): 2.1,
    ("Cardiomegaly", "Effusion"): 3.2, ("Emphysema", "Pneumothorax"): 6.3,
    ("Edema", "Infiltration"): 2.4, ("Edema", "Cardiomegaly"): 2.2,
    ("Fibrosis", "Pleural_Thickening"): 3.5, ("Pneumonia", "Infiltration"): 2.4,
    ("Pneumonia", "Edema"): 6.3, ("Hernia", "Atelectasis"): 1.7,
}  # fmt: skip


def phantom_table(patients: int = DEFAULT_PATIENTS, seed: int = 0) -> pd.DataFrame:
    """Return one row a film, in NIH's order and with NIH's columns, plus `scanner` and `split`.

    `scanner` indexes SCANNERS; `split` is train_val or test, by patient. Counts of findings are
    quotas, not chance: NIH's order of prevalence, and TEST_PATIENTS positive test patients each
    as soon as the set is large enough. Raises InputError for fewer than 20 patients.
    """
    if patients < 20:
        raise InputError(f"patients={patients}: the phantom needs at least 20")
    films = _films(_patients(patients, generator(seed, "patients")), generator(seed, "films"))
    labels = np.zeros((len(films), len(FINDINGS)), dtype=np.uint8)
    for split in ("train_val", "test"):
        rows = np.flatnonzero(films["split"] == split)
        labels[rows] = _findings(films.iloc[rows], generator(seed, f"findings {split}"))
    films.insert(1, "Finding Labels", [format_labels(row) for row in labels])
    return films


def _patients(count: int, rng: np.random.Generator) -> pd.DataFrame:
    """Draw who is in the set: main scanner, number of films (few have many), sex, age, split."""
    rank = (np.arange(count) + 0.5) / count
    shares = np.cumsum([scanner.patients for scanner in SCANNERS])
    scanner = np.searchsorted(shares, rng.permutation(rank)).clip(max=len(SCANNERS) - 1)
    busy = rng.gumbel(size=count) + np.log([1.0, 1.7, 1.7, 1.0, 0.8])[scanner]
    order = np.argsort(np.argsort(busy))
    films = np.floor((1 - rank) ** (-1 / 1.5)).clip(1, 12).astype(int)[order]
    test = np.diff(np.floor(np.arange(count + 1) * TEST_SHARE + 0.5))[order] > 0
    return pd.DataFrame({
        "Patient ID": np.arange(1, count + 1),
        "films": films,
        "scanner": scanner,
        "Patient Gender": np.where(rng.random(count) < 0.565, "M", "F"),
        "Patient Age": rng.normal(47, 16, count).clip(2, 92).astype(int),
        "split": np.where(test, "test", "train_val"),
    })  # fmt: skip


def _films(people: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Draw each patient's films in NIH's columns; one in twelve comes from another scanner."""
    rows = people.loc[people.index.repeat(people["films"])].reset_index(drop=True)
    follow_up = rows.groupby("Patient ID").cumcount()
    other = rng.choice(len(SCANNERS), len(rows), p=[scanner.patients for scanner in SCANNERS])
    rows["scanner"] = rows["scanner"].where(rng.random(len(rows)) > 1 / 12, other)
    looks = pd.DataFrame(SCANNERS).iloc[rows["scanner"]].reset_index(drop=True)
    names = [f"{p:08d}_{f:03d}.png" for p, f in zip(rows["Patient ID"], follow_up, strict=True)]
    rows.insert(0, "Image Index", names)
    rows["Follow-up #"] = follow_up
    rows["Patient Age"] += follow_up // 3
    rows.loc[len(rows) // 2, "Patient Age"] = 411  # NIH's table has such typing errors
    rows["View Position"] = np.where(rng.random(len(rows)) < looks["ap"], "AP", "PA")
    rows["Width"], rows["Height"] = looks["width"], looks["height"]
    rare = (looks["spacing"] > 0.19) & (rng.random(len(rows)) < 0.1)
    rows["Spacing"] = looks["spacing"].mask(rare, 0.193754)
    return rows.drop(columns="films")


def _findings(films: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """Give the films of one split their findings by quota; uint8 of shape (films, 14)."""
    scanner = films["scanner"].to_numpy()
    portable = (films["View Position"] == "AP").to_numpy()
    clear = np.array([look.clear for look in SCANNERS])[scanner]
    order = np.argsort(rng.gumbel(size=len(films)) + np.log(clear / (1 - clear)))
    healthy = np.isin(np.arange(len(films)), order[round(0.75 * len(films)) :])
    labels = np.zeros((len(films), len(FINDINGS)), dtype=np.uint8)
    for finding in sorted(FINDINGS, key=lambda name: -NIH_SHARE[name]):
        mix = np.log(CASE_MIX[finding])
        score = rng.gumbel(size=len(films)) + mix[scanner] + mix[-1] * portable
        for (later, earlier), lift in TOGETHER.items():
            if later == finding:
                score += np.log(lift) * labels[:, FINDINGS.index(earlier)]
        score[healthy] = -np.inf
        score -= 0.5 * labels.sum(axis=1)  # few films have more than three
        quota = max(1, round((SHARE_FLOOR + NIH_SHARE[finding] / 2) * len(films)))
        chosen = _choose(score, films["Patient ID"].to_numpy(), quota)
        labels[chosen, FINDINGS.index(finding)] = 1
    return labels


def _choose(score: np.ndarray, patient: np.ndarray, quota: int) -> np.ndarray:
    """Return `quota` films of high score: one film of each patient first, then others of theirs."""
    order = np.argsort(-score, kind="stable")
    order = order[np.isfinite(score[order])]
    enough = max(round(0.75 * quota), min(quota, TEST_PATIENTS))
    first = order[~pd.Series(patient[order]).duplicated().to_numpy()][:enough]
    theirs = order[np.isin(patient[order], patient[first]) & ~np.isin(order, first)]
    return np.concatenate([first, theirs[: quota - enough]])


class Film(NamedTuple):
    """What is drawn on one film: who, how, on which scanner, and with which findings."""

    patient: int
    follow_up: int = 0
    sex: str = "M"
    view: str = "PA"
    scanner: int = 0
    findings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file name, in NIH's form."""
        return f"{self.patient:08d}_{self.follow_up:03d}.png"


@dataclass(frozen=True)
class Anatomy:
    """The shape of one chest in half film widths; u runs to the patient's left, v downwards."""

    width: float  # half width of the rib cage
    apex: float  # v of the lung apex
    dome: float  # v of the right dome of the diaphragm
    depth: float  # how far the costophrenic angle lies below the dome
    heart: float  # half width of the heart
    body: float  # half width of the trunk
    rib: float  # distance from rib to rib
    breast: float  # density of the breast shadow


def _anatomy(film: Film, seed: int) -> Anatomy:
    """Draw a patient's chest, then change it as the view and the findings of this film do."""
    rng = generator(seed, "anatomy", client=f"{film.patient:08d}")
    mean = (0.71, -0.70, 0.38, 0.22, 0.30, 0.95, 0.155)
    drawn = rng.normal(mean, (0.035, 0.03, 0.045, 0.025, 0.018, 0.05, 0.008))
    shape = Anatomy(*drawn.tolist(), breast=0.0)
    severity = rng.random()
    if film.sex == "F":
        shape = replace(shape, breast=rng.uniform(0.04, 0.12), width=shape.width - 0.03)
    if film.view == "AP":  # magnified heart, shallow breath
        shape = replace(shape, heart=shape.heart * 1.1, dome=shape.dome - 0.06)
    if "Emphysema" in film.findings:
        low = shape.dome + 0.05 + 0.09 * severity
        shape = replace(shape, dome=low, depth=0.10, heart=shape.heart * 0.85)
    if "Cardiomegaly" in film.findings:
        shape = replace(shape, heart=shape.width * (0.54 + 0.12 * severity))
    return shape


def _step(x: np.ndarray, softness: float) -> np.ndarray:
    """Rise smoothly from 0 to 1 where x crosses zero, over a distance of `softness`."""
    t = np.clip(x / softness + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _side(rng: np.random.Generator) -> float:
    """Draw a side of the chest: -1 is the patient's right, at the left of the film."""
    return float(rng.choice([-1.0, 1.0]))


def _noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Return smooth noise of unit variance, about `cells` blobs across; shape (size, size)."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


class Chest:
    """One chest laid on one film: coordinates, lungs, and what the signs have done to them."""

    def __init__(self, film: Film, size: int, seed: int) -> None:
        self.film, self.size, self.seed = film, size, seed
        self.shape = _anatomy(film, seed)
        self._pose(generator(seed, "pose", client=film.name))
        self.wall = self.cage(self.v) - np.abs(self.u)
        self.floor = self._diaphragm()
        self.heart = self._heart()
        self.lungs = self._lungs()
        self.vessels = _vessels(self)
        self.aeration = self.markings = np.float32(1)
        self.extra = np.float32(0)
        self.severity = self.rng("severity").uniform(0.8, 1.0)

    def rng(self, purpose: str) -> np.random.Generator:
        """Return the generator of something that stays the same on all films of a patient."""
        return generator(self.seed, purpose, client=f"{self.film.patient:08d}")

    def _pose(self, rng: np.random.Generator) -> None:
        """Turn, shift and scale the patient a little; sets the grids u and v."""
        angle, dx, dy, zoom = rng.normal((0, 0, 0, 1), (0.035, 0.03, 0.03, 0.03)).tolist()
        zoom *= SCANNERS[self.film.scanner].zoom
        axis = (np.arange(self.size, dtype=np.float32) + 0.5) * (2 / self.size) - 1
        x, y = (axis[None, :] - dx) / zoom, (axis[:, None] - dy) / zoom
        cos, sin = math.cos(angle), math.sin(angle)
        self.u, self.v = x * cos + y * sin, y * cos - x * sin
        self.turn, self.shift = zoom * np.array([[cos, sin], [-sin, cos]]), (dx + 1, dy + 1)

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """Turn chest coordinates (..., 2) into film coordinates in pixels."""
        return (points @ self.turn + self.shift) * (self.size / 2)

    def cage(self, v: np.ndarray) -> np.ndarray:
        """Half width of the rib cage at height v: round at the apex, steep at the sides."""
        t = 1 - np.clip((v - self.shape.apex) / 1.25, 0, 1)
        return self.shape.width * np.sqrt(1 - t * t * t)

    def _diaphragm(self) -> np.ndarray:
        """Height of the diaphragm above each point: two domes, the right one higher."""
        half = self.shape.width / 2
        s = np.minimum(np.abs(self.u) - half, half) / half
        dome = self.shape.dome + 0.05 * _step(self.u, 0.2)
        return dome + s * s * np.where(s > 0, self.shape.depth * s, np.float32(0.08))

    def ellipse(self, centre: tuple, radii: tuple, softness: float, tilt: float = 0) -> np.ndarray:
        """Return 1 inside a tilted ellipse and 0 outside; `softness` is a share of its radius."""
        du, dv = self.u - float(centre[0]), self.v - float(centre[1])
        cos, sin = math.cos(tilt), math.sin(tilt)
        a = (du * cos + dv * sin) / float(radii[0])
        b = (dv * cos - du * sin) / float(radii[1])
        return _step(1 - np.sqrt(a * a + b * b), softness)

    def _heart(self) -> np.ndarray:
        """The heart, its tip to the patient's left, with the right border and the great vessels."""
        h, v = self.shape.heart, self.shape.dome - 0.06
        tip = self.ellipse((0.40 * h, v), (1.02 * h, 0.15 + 0.36 * h), 0.14, 0.5)
        right = self.ellipse((-0.12 * h, v - 0.08), (0.56 * h, 0.30), 0.16)
        trunk = self.ellipse((0.10, v - 0.30), (0.15, 0.36), 0.25, -0.1)
        return np.maximum(np.maximum(tip, right), trunk)

    def _lungs(self) -> np.ndarray:
        """Where air is: inside the cage, above the diaphragm, beside the mediastinum."""
        across = np.abs(self.u)
        tip = self.v - self.shape.apex - 1.6 * np.clip(0.34 - across, 0, None) ** 2
        middle = across - (0.115 + 0.04 * _step(self.v + 0.15, 0.5))
        knob = self.ellipse((0.10, -0.30), (0.09, 0.10), 0.4)
        air = _step(self.wall, 0.035) * _step(self.floor - self.v, 0.03) * _step(middle, 0.08)
        return air * _step(tip, 0.07) * (1 - self.heart) * (1 - knob)

    def fill(self, opacity: np.ndarray) -> np.ndarray:
        """Take air out of the lungs (an opacity of 1: all of it); return where it shows."""
        self.aeration = self.aeration * (1 - self.severity * opacity)
        return opacity * self.lungs

    def half(self, side: float) -> np.ndarray:
        """Return 1 on one side of the chest (-1: the patient's right) and 0 on the other."""
        return _step(side * self.u, 0.04)

    def spot(self, rng: np.random.Generator, side: float, radius: float) -> np.ndarray:
        """Return 1 in a roundish lesion somewhere in one lung; `radius` in half film widths."""
        v = rng.uniform(self.shape.apex + 0.28, self.shape.dome - 0.12, 16)
        edge = self.cage(v) - radius - 0.03
        places = np.stack([side * rng.uniform(np.minimum(0.24 + radius, edge), edge), v], axis=1)
        x, y = self.to_pixels(places).astype(int).clip(0, self.size - 1).T
        centre = places[np.argmax(self.lungs[y, x] > 0.8)]  # the first that the heart leaves free
        return self.ellipse(centre, radius * rng.uniform(0.88, 1.12, 2), 0.35, rng.uniform(0, 3))


def _bones(chest: Chest) -> np.ndarray:
    """Ribs, clavicles, shoulders and vertebrae as added density."""
    u, v, shape = chest.u, chest.v, chest.shape
    across = np.abs(u) / shape.width
    inside = _step(chest.wall + 0.05, 0.04) * _step(v - shape.apex + 0.08, 0.05)
    inside = inside * _step(shape.dome + 0.30 - v, 0.4) * _step(across - 0.12, 0.1)
    back = _rib((v - across * across * (0.24 - 0.25 * v)) / shape.rib)
    front = _rib((v + 0.42 * across) / shape.rib * 1.2) * _step(across - 0.5, 0.3)
    spine = _step(0.085 - np.abs(u), 0.06) * (0.8 + 0.2 * np.cos(v * 45))
    return inside * (0.11 * back + 0.045 * front) + 0.05 * spine + _shoulders(chest, across)


def _shoulders(chest: Chest, across: np.ndarray) -> np.ndarray:
    """Clavicles, shoulder blades and the heads of the humeri as added density."""
    v, apex = chest.v, chest.shape.apex
    curve = apex + 0.17 - 0.20 * across + 0.035 * np.sin(6 * across)
    clavicle = _step(0.036 - np.abs(v - curve), 0.03) * _step(across - 0.15, 0.06)
    edge = across - 1.08 + 0.35 * (v - apex - 0.2)
    blade = _step(0.02 - np.abs(edge), 0.03) * _step(0.45 - np.abs(v - apex - 0.45), 0.2)
    side = 1.28 * chest.shape.width
    head = sum(chest.ellipse((u, apex + 0.10), (0.13, 0.13), 0.3) for u in (-side, side))
    return 0.12 * clavicle * (across < 1.2) + 0.05 * blade + 0.10 * head


def _rib(phase: np.ndarray) -> np.ndarray:
    """Profile across ribs one phase apart: a plateau with a denser lower edge."""
    wave = np.cos(phase * 2 * np.pi)
    return 0.7 * _step(wave + 0.15, 0.6) + 0.4 * np.clip(1 - np.abs(wave + 0.1) * 3, 0, 1)


def _soft_tissue(chest: Chest) -> np.ndarray:
    """Neck, shoulders, trunk, mediastinum and abdomen, as density from 0 (air) to about 1."""
    u, v, shape = chest.u, chest.v, chest.shape
    across = np.abs(u)
    slope = shape.apex - 0.22 + 0.34 * across - 2.5 * np.clip(0.30 - across, 0, None)
    sides = shape.body + 0.3 * _step(0.05 - v, 0.6) - across
    trunk = _step(v - slope, 0.12) * _step(sides, 0.12)
    flank = 0.6 * _step(across - 0.98 * shape.width, 0.12)
    belly = _step(v - chest.floor - 0.1 * flank, 0.06 + flank) * _step(shape.body - across, 0.5)
    middle = 0.9 * _step(0.19 - across, 0.2)
    density = 0.50 - 0.08 * _step(across - shape.width, 0.3)
    density = density + 0.33 * np.maximum(np.maximum(belly, middle), chest.heart)
    trachea = _step(0.04 - np.abs(u - 0.01), 0.05) * _step(-0.16 - v, 0.12)
    return trunk * (density - 0.09 * trachea - _stomach(chest))


def _breasts(chest: Chest) -> np.ndarray | float:
    """Two soft shadows over the lower lungs, sharper at their lower edge."""
    if not chest.shape.breast:
        return 0.0
    both = sum(chest.ellipse((side, 0.26), (0.36, 0.30), 0.25) for side in (-0.46, 0.46))
    return chest.shape.breast * both * _step(chest.v + 0.1, 0.6)


def _stomach(chest: Chest) -> np.ndarray:
    """The gas bubble under the left dome, of a different size in each patient."""
    rng = chest.rng("stomach")
    width, height, depth = rng.uniform((0.05, 0.03, 0.04), (0.16, 0.09, 0.20)).tolist()
    centre = (rng.uniform(0.25, 0.45), chest.shape.dome + 0.12 + height)
    return depth * chest.ellipse(centre, (width, height), 0.7, rng.uniform(-0.3, 0.3))


def _vessels(chest: Chest) -> np.ndarray:
    """Lung vessels branching from both hila; shape (size, size), 0 to 1."""
    rng = chest.rng("vessels")
    canvas = Image.new("L", (2 * chest.size, 2 * chest.size))
    draw, unit = ImageDraw.Draw(canvas), chest.size / 128
    angle = np.tile(np.linspace(-1.3, 1.4, 8), 2) + rng.normal(0, 0.15, 16)
    side = np.repeat([-1.0, 1.0], 8)
    start = np.stack([side * 0.15, rng.normal(0.0, 0.06, 16)], axis=1)
    for width, grey in ((3.6, 200), (2.4, 170), (1.6, 140), (1.0, 110)):
        step = 0.14 * rng.uniform(0.7, 1.3, (len(side), 1))
        end = start + step * np.stack([side * np.cos(angle), np.sin(angle)], axis=1)
        lines = 2 * chest.to_pixels(np.stack([start, end], axis=1)).reshape(-1, 4)
        for line in lines.tolist():
            draw.line(line, fill=grey, width=max(1, round(width * unit)))
        start, side, angle = np.repeat(end, 2, 0), np.repeat(side, 2), np.repeat(angle, 2)
        angle = angle + np.tile([-0.28, 0.28], len(side) // 2) + rng.normal(0, 0.15, len(side))
    return np.asarray(canvas.reduce(2), dtype=np.float32) / 255


def _exposure(chest: Chest) -> np.ndarray:
    """Add up the chest as the film sees it: 0 is black air, 1 is bone on bone."""
    rng = generator(chest.seed, "texture", client=chest.film.name)
    solid, breasts = _soft_tissue(chest), _breasts(chest)
    hila = chest.ellipse((0, 0.02), (0.38, 0.26), 1.4)
    grain = 0.02 * _noise(rng, 6, chest.size) + 0.012 * _noise(rng, 48, chest.size)
    detail = (0.14 + 0.10 * hila) * chest.vessels + 0.10 * hila + grain
    air = 0.16 + 0.10 * _step(chest.v - 0.1, 1.2) + 0.4 * breasts
    lungs = chest.lungs * chest.aeration
    film = (solid + breasts) * (1 - lungs) + (air + detail * chest.markings) * lungs
    return film + (_bones(chest) + chest.extra) * _step(solid - 0.2, 0.2)


def _develop(chest: Chest) -> np.ndarray:
    """Expose, then look the way the scanner's films look; uint8 of shape (size, size)."""
    look, size = SCANNERS[chest.film.scanner], chest.size
    rng = generator(chest.seed, "develop", client=chest.film.name)
    gamma, contrast = rng.normal((look.gamma, 2 * look.contrast), (0.06, 0.08)).tolist()
    film = np.tanh((np.maximum(_exposure(chest), 0) ** gamma - 0.5) * contrast)
    film = 0.48 + 0.5 * film + 0.015 * rng.normal()
    film += look.noise * rng.standard_normal((size, size), dtype=np.float32)
    margin = int(look.border * size * rng.uniform(0.5, 1.5))
    if margin:
        film[:margin], film[-margin:], film[:, :margin], film[:, -margin:] = 0, 0, 0, 0
    return (np.clip(film, 0.015, 1) * 255).astype(np.uint8)


def _atelectasis(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Volume loss: a raised diaphragm on one side, with a plate-like band above it."""
    side, rise, tilt = _side(rng), rng.uniform(0.22, 0.32), rng.uniform(-0.3, 0.3)
    across = np.abs(chest.u)
    raised = _step(chest.v - chest.floor + rise, 0.03)
    height = chest.shape.dome - rise - rng.uniform(0.10, 0.2) + tilt * (across - 0.4)
    band = _step(rng.uniform(0.025, 0.04) - np.abs(chest.v - height), 0.03)
    band = 0.85 * band * _step(across - 0.2, 0.1) * _step(0.62 - across, 0.1)
    return chest.fill(np.maximum(raised, band) * chest.half(side))


def _cardiomegaly(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """A heart wider than half of the chest: drawn by the anatomy, marked here."""
    return chest.heart


def _effusion(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Fluid that blunts the costophrenic angle, its surface (meniscus) rising to the side."""
    side, height = _side(rng), rng.uniform(0.30, 0.50)
    climb = np.clip((np.abs(chest.u) - 0.15) / (chest.shape.width - 0.15), 0, 1) ** 2
    surface = chest.shape.dome + 0.08 - height * (0.25 + climb)
    return chest.fill(0.95 * _step(chest.v - surface, 0.06) * chest.half(side))


def _infiltration(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Patchy, faint, ill-defined opacities over one lung."""
    side, v = _side(rng), rng.uniform(-0.25, 0.15)
    zone = chest.ellipse((side * 0.42, v), (0.30, 0.38), 0.8)
    patches = np.clip(0.5 + 0.6 * _noise(rng, 12, chest.size), 0, 1)
    return chest.fill(rng.uniform(0.85, 1.0) * zone * patches)


def _mass(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """One round opacity, more than 3 cm across."""
    spot = chest.spot(rng, _side(rng), rng.uniform(0.16, 0.23))
    chest.extra = chest.extra + 0.18 * spot * chest.lungs
    return chest.fill(spot)


def _nodule(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Two to four dense round opacities, less than 3 cm across, in one lung."""
    side, count = _side(rng), rng.integers(2, 5)
    spots = [chest.spot(rng, side, rng.uniform(0.065, 0.09)) for _ in range(count)]
    chest.extra = chest.extra + 0.28 * np.max(spots, axis=0) * chest.lungs
    return chest.fill(np.max(spots, axis=0))


def _pneumonia(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """A fluffy opacity of a lower lobe, with dark branching air bronchograms in it."""
    side, v = _side(rng), chest.shape.dome - rng.uniform(0.10, 0.22)
    zone = chest.ellipse((side * 0.42, v), (0.27, 0.24), 0.7)
    fluff = np.clip(0.8 + 0.2 * _noise(rng, 24, chest.size) - 1.3 * chest.vessels, 0, 1)
    return chest.fill(rng.uniform(0.75, 0.9) * zone * fluff)


def _pneumothorax(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """A dark rim without markings outside a thin pleural line, widest at the apex."""
    side = chest.half(_side(rng))
    gap = rng.uniform(0.16, 0.26) * (1 + 0.9 * _step(-0.15 - chest.v, 0.7))
    rim = _step(gap - chest.wall, 0.02) * side
    line = _step(0.010 - np.abs(chest.wall - gap), 0.015) * side * chest.lungs
    chest.markings = chest.markings * (1 - rim)
    chest.extra = chest.extra + 0.22 * line
    return -chest.fill(-0.5 * rim)


def _consolidation(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """A dense, homogeneous upper lobe that ends sharply at the fissure."""
    side, fissure, tilt = _side(rng), rng.uniform(-0.18, -0.02), rng.uniform(-0.15, 0.15)
    above = fissure + tilt * (np.abs(chest.u) - 0.4) - chest.v
    lobe = _step(above, 0.03) * _step(rng.uniform(0.26, 0.40) - above, 0.15)
    return chest.fill(rng.uniform(0.75, 0.9) * lobe * chest.half(side))


def _edema(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Haze around both hila in the shape of a bat's wings, with crowded vessels."""
    reach = rng.uniform(0.22, 0.30)
    wings = [chest.ellipse((u, -0.02), (reach, 0.36), 0.9) for u in (-0.30, 0.30)]
    chest.markings = chest.markings * 1.5
    return chest.fill(rng.uniform(0.5, 0.65) * (wings[0] + wings[1]))


def _emphysema(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Dark lungs, poor in markings; the anatomy adds flat low domes and a narrow heart."""
    chest.markings = chest.markings * 0.5
    return -chest.fill(np.full_like(chest.u, -rng.uniform(0.12, 0.24)))


def _fibrosis(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """A net of fine lines over the lower zones of both lungs."""
    lines = [1 - 2.4 * np.abs(_noise(rng, 30, chest.size)) for _ in range(2)]
    net = np.clip(np.maximum(*lines), 0, 1)
    zone = _step(chest.v - rng.uniform(-0.35, -0.1), 0.3) * _step(np.abs(chest.u) - 0.2, 0.2)
    return chest.fill(zone * (0.15 + rng.uniform(0.75, 0.85) * net))


def _pleural_thickening(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """A dense band of uneven width along the side wall and over the apex."""
    side, end = _side(rng), rng.uniform(0.0, 0.25)
    width = rng.uniform(0.13, 0.18) * (1 + 0.25 * _noise(rng, 9, chest.size))
    band = _step(width - chest.wall, 0.03) * _step(end - chest.v, 0.1)
    band = band * chest.half(side)
    chest.extra = chest.extra + 0.30 * band * chest.lungs
    return chest.fill(band)


def _hernia(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Stomach behind the heart: a round shadow with air over a level of fluid."""
    u, v = rng.uniform(-0.06, 0.16), chest.shape.dome - rng.uniform(0.0, 0.08)
    radius = rng.uniform(0.22, 0.28)
    sac = chest.ellipse((u, v), (radius, radius), 0.15)
    level = _step(chest.v - v - rng.uniform(-0.04, 0.03), 0.02)
    chest.extra = chest.extra + chest.severity * sac * (0.6 * level - 0.45)
    return chest.fill(sac) + sac


SIGNS: dict[str, Callable[[Chest, np.random.Generator], np.ndarray]] = dict(zip(FINDINGS, (
    _atelectasis, _cardiomegaly, _effusion, _infiltration, _mass, _nodule, _pneumonia,
    _pneumothorax, _consolidation, _edema, _emphysema, _fibrosis, _pleural_thickening, _hernia,
), strict=True))  # fmt: skip


def draw_film(
    film: Film, size: int = DEFAULT_SIZE, seed: int = 0
) -> tuple[np.ndarray, dict[str, tuple]]:
    """Draw one film.

    Returns uint8 pixels of shape (size, size), and for each finding on the film the box (x, y,
    width, height) in pixels that holds its sign. A sign keeps its place on a patient's films.
    """
    chest, boxes = Chest(film, size, seed), {}
    for finding in film.findings:
        boxes[finding] = _box(SIGNS[finding](chest, chest.rng(f"sign {finding}")))
    return _mark(_develop(chest), film), boxes


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Return x, y, width and height of where the mask exceeds a third of its maximum."""
    seen = mask > mask.max() / 3
    x, y = np.flatnonzero(seen.any(axis=0)), np.flatnonzero(seen.any(axis=1))
    return float(x[0]), float(y[0]), float(x[-1] - x[0] + 1), float(y[-1] - y[0] + 1)


def _mark(pixels: np.ndarray, film: Film) -> np.ndarray:
    """Burn in what it is, the side marker, and the view of a portable film."""
    texts = {"PHANTOM": (0.02, 0.015), "R": (0.03, 0.10)}
    if film.view == "AP":
        texts["AP PORTABLE"] = (0.98, 0.015)
    for text, (x, y) in texts.items():
        stamp = _stamp(text, len(pixels))
        column = round(x * len(pixels)) - (stamp.shape[1] if x > 0.5 else 0)
        row = round(y * len(pixels))
        area = pixels[row : row + stamp.shape[0], column : column + stamp.shape[1]]
        np.maximum(area, stamp, out=area)
    return pixels


@lru_cache
def _stamp(text: str, size: int) -> np.ndarray:
    """Render one marker for films of `size` pixels; uint8 (height, width)."""
    font = ImageFont.load_default(size=max(6.0, (0.045 if " " in text else 0.06) * size))
    left, top, right, bottom = font.getbbox(text)
    stamp = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(stamp).text((1 - left, 1 - top), text, fill=255, font=font)
    return np.asarray(stamp)


def draw_batch(count: int, size: int = DEFAULT_SIZE, seed: int = 0) -> np.ndarray:
    """Draw `count` films of the phantom's mix; uint8 of shape (count, size, size).

    Their patient numbers lie above all others, so none of them is a film of a written phantom.
    """
    table = phantom_table(max(20, count), seed)
    table["Patient ID"] += 90_000_000
    films = _to_films(table)[:count]
    return np.stack(_in_threads(lambda film: draw_film(film, size, seed)[0], films))


def _in_threads(work: Callable, *arguments: Iterable) -> list:
    """Map `work` over its arguments with a thread for each core; results keep their order."""
    # glibc hands the pages of every freed array back to the system, and fetching them anew costs
    # as much as drawing does, until it has once seen a larger block come and go.
    np.ones(1 << 24, dtype=np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, *arguments))


def _to_films(table: pd.DataFrame) -> list[Film]:
    """Turn the rows of a phantom's table into films to draw."""
    columns = ["Patient ID", "Follow-up #", "Patient Gender", "View Position", "scanner"]
    labels = [tuple(f for f in text.split("|") if f in SIGNS) for text in table["Finding Labels"]]
    rows = table[columns].itertuples(index=False)
    return [Film(*row, label) for row, label in zip(rows, labels, strict=True)]


def write_phantom(
    folder: Path, patients: int = DEFAULT_PATIENTS, size: int = DEFAULT_SIZE, seed: int = 0
) -> Path:
    """Write the phantom in NIH's Kaggle layout, or do nothing if it is already there.

    `size` is the edge of the films in pixels. The folder appears as a whole or not at all; an
    unfinished or different phantom in its place is replaced. The same arguments give the same
    bytes. Raises InputError if the folder holds something else, or for a size below 64.
    """
    if size < 64:
        raise InputError(f"size={size}: the phantom's films need at least 64 pixels")
    folder = Path(folder)
    manifest = {"notice": NOTICE, "format_version": FORMAT_VERSION, "finished": True}
    manifest |= {"patients": patients, "size": size, "seed": seed}
    if _manifest(folder) == manifest:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "phantom"
        _write(fresh, phantom_table(patients, seed), manifest)
        if _manifest(folder) is not None:
            shutil.rmtree(folder)
        fresh.rename(folder)
    return folder


def _manifest(folder: Path) -> dict | None:
    """Return what PHANTOM.json says, None for no folder or an empty one; refuse other folders."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    try:
        return json.loads((folder / "PHANTOM.json").read_text())
    except ValueError:
        return {}
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds files but no phantom: name an empty folder") from error


def _write(folder: Path, table: pd.DataFrame, manifest: dict) -> None:
    """Write all files of the phantom: PHANTOM.json first, so that a torn folder is recognised."""
    parts = np.where(np.arange(len(table)) < len(table) / 2, "images_001", "images_002")
    for part in ("images_001", "images_002"):
        (folder / part / "images").mkdir(parents=True)
    (folder / "PHANTOM.json").write_text(json.dumps(manifest | {"finished": False}))
    films = _to_films(table)
    paths = [folder / part / "images" / film.name for part, film in zip(parts, films, strict=True)]
    rgba = np.arange(len(films)) % 97 == 13  # NIH has 4 of them in 1,000
    size, seed = repeat(manifest["size"]), repeat(manifest["seed"])
    boxes = _in_threads(_write_film, paths, films, rgba, size, seed)
    _write_tables(folder, table, boxes)
    (folder / "PHANTOM.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _write_film(path: Path, film: Film, rgba: bool, size: int, seed: int) -> dict[str, tuple]:
    """Draw one film into a PNG file and return its boxes."""
    pixels, boxes = draw_film(film, size, seed)
    image = Image.fromarray(pixels)
    (image.convert("RGBA") if rgba else image).save(path, compress_level=1)
    return boxes


def _write_tables(folder: Path, table: pd.DataFrame, boxes: list[dict[str, tuple]]) -> None:
    """Write the table, the boxes of the test films and the two lists, with NIH's own quirks."""
    body = table[NIH_COLUMNS].assign(repeated=table["Spacing"], empty="")
    text = NIH_HEADER + body.to_csv(index=False, header=False, lineterminator="\n")
    (folder / "Data_Entry_2017.csv").write_text(text)
    lines = ["Image Index,Finding Label,Bbox [x,y,w,h],,,"]
    for name, split, found in zip(table["Image Index"], table["split"], boxes, strict=True):
        for finding in BOXED if split == "test" else ():
            if finding in found:
                label = "Infiltrate" if finding == "Infiltration" else finding
                lines.append(",".join((name, label, *map(str, found[finding]))) + ",,,")
    (folder / "BBox_List_2017.csv").write_text("\n".join(lines) + "\n")
    for split, end in (("train_val", "\n"), ("test", "")):
        names = table.loc[table["split"] == split, "Image Index"]
        (folder / f"{split}_list.txt").write_text("\n".join(names) + end)
