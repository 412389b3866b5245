"""One chest laid on one film: anatomy, pose, tissue, exposure."""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from ...base.rng import generator
from .cases import SCANNERS, Film


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


def step(x: np.ndarray, softness: float) -> np.ndarray:
    """Rise smoothly from 0 to 1 where x crosses zero, over a distance of `softness`."""
    t = np.clip(x / softness + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def side_of(rng: np.random.Generator) -> float:
    """Draw a side of the chest: -1 is the patient's right, at the left of the film."""
    return float(rng.choice([-1.0, 1.0]))


def smooth_noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
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
        dome = self.shape.dome + 0.05 * step(self.u, 0.2)
        return dome + s * s * np.where(s > 0, self.shape.depth * s, np.float32(0.08))

    def ellipse(self, centre: tuple, radii: tuple, softness: float, tilt: float = 0) -> np.ndarray:
        """Return 1 inside a tilted ellipse and 0 outside; `softness` is a share of its radius."""
        du, dv = self.u - float(centre[0]), self.v - float(centre[1])
        cos, sin = math.cos(tilt), math.sin(tilt)
        a = (du * cos + dv * sin) / float(radii[0])
        b = (dv * cos - du * sin) / float(radii[1])
        return step(1 - np.sqrt(a * a + b * b), softness)

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
        middle = across - (0.115 + 0.04 * step(self.v + 0.15, 0.5))
        knob = self.ellipse((0.10, -0.30), (0.09, 0.10), 0.4)
        air = step(self.wall, 0.035) * step(self.floor - self.v, 0.03) * step(middle, 0.08)
        return air * step(tip, 0.07) * (1 - self.heart) * (1 - knob)

    def fill(self, opacity: np.ndarray) -> np.ndarray:
        """Take air out of the lungs (an opacity of 1: all of it); return where it shows."""
        self.aeration = self.aeration * (1 - self.severity * opacity)
        return opacity * self.lungs

    def half(self, side: float) -> np.ndarray:
        """Return 1 on one side of the chest (-1: the patient's right) and 0 on the other."""
        return step(side * self.u, 0.04)

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
    inside = step(chest.wall + 0.05, 0.04) * step(v - shape.apex + 0.08, 0.05)
    inside = inside * step(shape.dome + 0.30 - v, 0.4) * step(across - 0.12, 0.1)
    back = _rib((v - across * across * (0.24 - 0.25 * v)) / shape.rib)
    front = _rib((v + 0.42 * across) / shape.rib * 1.2) * step(across - 0.5, 0.3)
    spine = step(0.085 - np.abs(u), 0.06) * (0.8 + 0.2 * np.cos(v * 45))
    return inside * (0.11 * back + 0.045 * front) + 0.05 * spine + _shoulders(chest, across)


def _shoulders(chest: Chest, across: np.ndarray) -> np.ndarray:
    """Clavicles, shoulder blades and the heads of the humeri as added density."""
    v, apex = chest.v, chest.shape.apex
    curve = apex + 0.17 - 0.20 * across + 0.035 * np.sin(6 * across)
    clavicle = step(0.036 - np.abs(v - curve), 0.03) * step(across - 0.15, 0.06)
    edge = across - 1.08 + 0.35 * (v - apex - 0.2)
    blade = step(0.02 - np.abs(edge), 0.03) * step(0.45 - np.abs(v - apex - 0.45), 0.2)
    side = 1.28 * chest.shape.width
    head = sum(chest.ellipse((u, apex + 0.10), (0.13, 0.13), 0.3) for u in (-side, side))
    return 0.12 * clavicle * (across < 1.2) + 0.05 * blade + 0.10 * head


def _rib(phase: np.ndarray) -> np.ndarray:
    """Profile across ribs one phase apart: a plateau with a denser lower edge."""
    wave = np.cos(phase * 2 * np.pi)
    return 0.7 * step(wave + 0.15, 0.6) + 0.4 * np.clip(1 - np.abs(wave + 0.1) * 3, 0, 1)


def _soft_tissue(chest: Chest) -> np.ndarray:
    """Neck, shoulders, trunk, mediastinum and abdomen, as density from 0 (air) to about 1."""
    u, v, shape = chest.u, chest.v, chest.shape
    across = np.abs(u)
    slope = shape.apex - 0.22 + 0.34 * across - 2.5 * np.clip(0.30 - across, 0, None)
    sides = shape.body + 0.3 * step(0.05 - v, 0.6) - across
    trunk = step(v - slope, 0.12) * step(sides, 0.12)
    flank = 0.6 * step(across - 0.98 * shape.width, 0.12)
    belly = step(v - chest.floor - 0.1 * flank, 0.06 + flank) * step(shape.body - across, 0.5)
    middle = 0.9 * step(0.19 - across, 0.2)
    density = 0.50 - 0.08 * step(across - shape.width, 0.3)
    density = density + 0.33 * np.maximum(np.maximum(belly, middle), chest.heart)
    trachea = step(0.04 - np.abs(u - 0.01), 0.05) * step(-0.16 - v, 0.12)
    return trunk * (density - 0.09 * trachea - _stomach(chest))


def _breasts(chest: Chest) -> np.ndarray | float:
    """Two soft shadows over the lower lungs, sharper at their lower edge."""
    if not chest.shape.breast:
        return 0.0
    both = sum(chest.ellipse((side, 0.26), (0.36, 0.30), 0.25) for side in (-0.46, 0.46))
    return chest.shape.breast * both * step(chest.v + 0.1, 0.6)


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
    grain = 0.02 * smooth_noise(rng, 6, chest.size) + 0.012 * smooth_noise(rng, 48, chest.size)
    detail = (0.14 + 0.10 * hila) * chest.vessels + 0.10 * hila + grain
    air = 0.16 + 0.10 * step(chest.v - 0.1, 1.2) + 0.4 * breasts
    lungs = chest.lungs * chest.aeration
    film = (solid + breasts) * (1 - lungs) + (air + detail * chest.markings) * lungs
    return film + (_bones(chest) + chest.extra) * step(solid - 0.2, 0.2)


def develop(chest: Chest) -> np.ndarray:
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
