"""One visible sign for each finding, where it would sit in the chest."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .cases import DEFAULT_SIZE, FINDINGS, Film
from .chest import Chest, develop, side_of, smooth_noise, step


def _atelectasis(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Volume loss: a raised diaphragm on one side, with a plate-like band above it."""
    side, rise, tilt = side_of(rng), rng.uniform(0.22, 0.32), rng.uniform(-0.3, 0.3)
    across = np.abs(chest.u)
    raised = step(chest.v - chest.floor + rise, 0.03)
    height = chest.shape.dome - rise - rng.uniform(0.10, 0.2) + tilt * (across - 0.4)
    band = step(rng.uniform(0.025, 0.04) - np.abs(chest.v - height), 0.03)
    band = 0.85 * band * step(across - 0.2, 0.1) * step(0.62 - across, 0.1)
    return chest.fill(np.maximum(raised, band) * chest.half(side))


def _cardiomegaly(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """A heart wider than half of the chest: drawn by the anatomy, marked here."""
    return chest.heart


def _effusion(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Fluid that blunts the costophrenic angle, its surface (meniscus) rising to the side."""
    side, height = side_of(rng), rng.uniform(0.30, 0.50)
    climb = np.clip((np.abs(chest.u) - 0.15) / (chest.shape.width - 0.15), 0, 1) ** 2
    surface = chest.shape.dome + 0.08 - height * (0.25 + climb)
    return chest.fill(0.95 * step(chest.v - surface, 0.06) * chest.half(side))


def _infiltration(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Patchy, faint, ill-defined opacities over one lung."""
    side, v = side_of(rng), rng.uniform(-0.25, 0.15)
    zone = chest.ellipse((side * 0.42, v), (0.30, 0.38), 0.8)
    patches = np.clip(0.5 + 0.6 * smooth_noise(rng, 12, chest.size), 0, 1)
    return chest.fill(rng.uniform(0.85, 1.0) * zone * patches)


def _mass(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """One round opacity, more than 3 cm across."""
    spot = chest.spot(rng, side_of(rng), rng.uniform(0.16, 0.23))
    chest.extra = chest.extra + 0.18 * spot * chest.lungs
    return chest.fill(spot)


def _nodule(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Two to four dense round opacities, less than 3 cm across, in one lung."""
    side, count = side_of(rng), rng.integers(2, 5)
    spots = [chest.spot(rng, side, rng.uniform(0.065, 0.09)) for _ in range(count)]
    chest.extra = chest.extra + 0.28 * np.max(spots, axis=0) * chest.lungs
    return chest.fill(np.max(spots, axis=0))


def _pneumonia(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """A fluffy opacity of a lower lobe, with dark branching air bronchograms in it."""
    side, v = side_of(rng), chest.shape.dome - rng.uniform(0.10, 0.22)
    zone = chest.ellipse((side * 0.42, v), (0.27, 0.24), 0.7)
    fluff = np.clip(0.8 + 0.2 * smooth_noise(rng, 24, chest.size) - 1.3 * chest.vessels, 0, 1)
    return chest.fill(rng.uniform(0.75, 0.9) * zone * fluff)


def _pneumothorax(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """A dark rim without markings outside a thin pleural line, widest at the apex."""
    side = chest.half(side_of(rng))
    gap = rng.uniform(0.16, 0.26) * (1 + 0.9 * step(-0.15 - chest.v, 0.7))
    rim = step(gap - chest.wall, 0.02) * side
    line = step(0.010 - np.abs(chest.wall - gap), 0.015) * side * chest.lungs
    chest.markings = chest.markings * (1 - rim)
    chest.extra = chest.extra + 0.22 * line
    return -chest.fill(-0.5 * rim)


def _consolidation(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """A dense, homogeneous upper lobe that ends sharply at the fissure."""
    side, fissure, tilt = side_of(rng), rng.uniform(-0.18, -0.02), rng.uniform(-0.15, 0.15)
    above = fissure + tilt * (np.abs(chest.u) - 0.4) - chest.v
    lobe = step(above, 0.03) * step(rng.uniform(0.26, 0.40) - above, 0.15)
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
    lines = [1 - 2.4 * np.abs(smooth_noise(rng, 30, chest.size)) for _ in range(2)]
    net = np.clip(np.maximum(*lines), 0, 1)
    zone = step(chest.v - rng.uniform(-0.35, -0.1), 0.3) * step(np.abs(chest.u) - 0.2, 0.2)
    return chest.fill(zone * (0.15 + rng.uniform(0.75, 0.85) * net))


def _pleural_thickening(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """A dense band of uneven width along the side wall and over the apex."""
    side, end = side_of(rng), rng.uniform(0.0, 0.25)
    width = rng.uniform(0.13, 0.18) * (1 + 0.25 * smooth_noise(rng, 9, chest.size))
    band = step(width - chest.wall, 0.03) * step(end - chest.v, 0.1)
    band = band * chest.half(side)
    chest.extra = chest.extra + 0.30 * band * chest.lungs
    return chest.fill(band)


def _hernia(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Stomach behind the heart: a round shadow with air over a level of fluid."""
    u, v = rng.uniform(-0.06, 0.16), chest.shape.dome - rng.uniform(0.0, 0.08)
    radius = rng.uniform(0.22, 0.28)
    sac = chest.ellipse((u, v), (radius, radius), 0.15)
    level = step(chest.v - v - rng.uniform(-0.04, 0.03), 0.02)
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
    return _mark(develop(chest), film), boxes


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
