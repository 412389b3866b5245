"""Films that look wrong: blank, inverted, turned, mirrored, or unlike a frontal chest film.

The reference is the mean of the set's other films; nothing learned is shipped. Measured on real
films of 64 pixels (NIH's; 2 and 10 % of them changed), thresholds chosen on 369 films of one half
of the patients (the mirror's with an eye on both), counted on 321 of the other, and on all 690:
- Untouched, 0.3 and 0.6 % are named, and beside changed films up to 1.2 and 0.8 %: films that
  really are askew or cut off. Of 80 films of 1024 pixels at most one; of 400 phantom films none.
- Inverted, turned by 90, 180 or 270 degrees, or both: 99 to 100 %; blank: all.
- Mirrored: 60 to 64 % and 72 to 73 %: the more films, the better; of 80 films 40 %, of phantom
  films 98 to 100 %. A heart on the right is named, too.
- Photographs of a temple and a flower: all. A lung's corner, as large as a film, instead of it: 86
  to 100 %, often as turned; the upper half of a film: 32 to 54 %. Real laterals were not at hand.

What is upright is told by the mean of the phantom's films, with which that of real ones correlates
by 0.87: a whole set that lies on its side is named, too. Which side is left, nothing but the set
itself tells: a hospital that mirrors all its films is not noticed.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from torch import from_numpy
from torch.nn.functional import adaptive_avg_pool2d

from ..base.device import count_cores
from .phantom.write import draw_batch

SHRUNK, COARSE = 32, 16  # sides of the film whose edges are looked at, of that which is turned
MESH, DIRECTIONS = 8, 8  # of the histograms of edges: a grid of cells, and directions in each
ENOUGH = 40  # films whose mean is a reference; of fewer only blank ones are named
BLANK = 3.0  # grey levels that a film's standard deviation has at least
TURNED = 0.12  # correlation that a film gains if it is turned
FACELESS, UNLIKE = 0.3, 0.2  # least correlation with the mean film, however turned; of edges
MIRRORED = 0.5  # how far on the mirror's side, where 1 is a typical film's
PARTS, RIDGE = 5, 0.1  # parts of the patients, each judged by the others; penalty of the regression
MEANS = 10  # mean films
UPRIGHT = (0, 1)  # quarter turns, anticlockwise, and sign
WAYS = {UPRIGHT: "", (0, -1): "inverted"} | {
    (turns, sign): f"{'' if sign > 0 else 'inverted and '}turned by {90 * turns} degrees"
    for sign in (1, -1)
    for turns in (1, 2, 3)
}


def find_suspects(store: np.ndarray, index: pd.DataFrame) -> pd.DataFrame:
    """Name films, uint8 (N, S, S), that look wrong: `film, suspect`, in the order of the index.

    `index` has `row, image_index, patient_id`. A film is compared with the mean of the others of
    its `source`, if there are several, that are not suspect themselves, upright and in each of the
    `WAYS`; quarter turns are anticlockwise.
    """
    if "source" in index and index["source"].nunique() > 1:
        alone = [part.drop(columns="source") for _, part in index.groupby("source", sort=False)]
        found = pd.concat([find_suspects(store, part) for part in alone])
        order = index["image_index"].reset_index(drop=True)
        return order.rename("film").to_frame().merge(found)
    chunks = np.array_split(index["row"].to_numpy(), max(1, len(index) // 256))
    with ThreadPoolExecutor(count_cores()) as pool:
        parts = list(pool.map(lambda rows: _describe(store[rows]), chunks))
    spread, coarse, edges = map(np.concatenate, zip(*parts, strict=True))
    blank = spread < BLANK
    words = np.where(blank, "blank", "").astype(object)
    if len(index) >= ENOUGH:
        lies = _lie(coarse[~blank])
        good = ~blank
        for _ in range(2):  # once more without those that were found at first
            words[~blank] = _compare(coarse, edges, good, lies)[~blank]
            good = words == WAYS[lies]
        folds = index["patient_id"].factorize()[0] % PARTS
        mirrored = _left_or_right(edges, folds, good) < -MIRRORED
        words[(words == "") & mirrored] = "mirrored"
    found = pd.DataFrame({"film": index["image_index"].to_numpy(), "suspect": words})
    return found[words != ""].reset_index(drop=True)


def mean_films(store: np.ndarray, index: pd.DataFrame) -> dict[str, np.ndarray]:
    """Average the films, uint8 (S, S), of each source, or of each scanner if there is one source.

    Those with the most films come first, at most MEANS; the name tells their number.
    """
    several = "source" in index and index["source"].nunique() > 1
    where = index["source" if several else "scanner"].replace("", "unknown")
    means = {}
    for name, films in where.value_counts().head(MEANS).items():
        rows = index.loc[where == name, "row"].to_numpy()
        chunks = np.array_split(rows, -(-films // 256))
        total = sum(store[part].sum(axis=0, dtype=np.int64) for part in chunks)
        means[f"{name}: {films:,} films"] = np.rint(total / films).astype(np.uint8)
    return means


def _describe(films: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return each film's standard deviation, itself in 16 x 16, and histograms of its edges."""
    pixels = from_numpy(films).float()[:, None]
    coarse = adaptive_avg_pool2d(pixels, COARSE)[:, 0].numpy()
    fine = adaptive_avg_pool2d(pixels, SHRUNK)[:, 0].numpy()
    return fine.std(axis=(1, 2)), _unit(coarse), _edges(fine)


def _unit(films: np.ndarray) -> np.ndarray:
    """Take the mean off each film, and make its length 1, so that products are correlations."""
    axes = tuple(range(1, films.ndim))
    films = films - films.mean(axis=axes, keepdims=True)
    return films / np.sqrt((films**2).sum(axis=axes, keepdims=True)).clip(1e-6)


def _edges(films: np.ndarray) -> np.ndarray:
    """Sum the strength of edges by cell and direction: (N, MESH, MESH, DIRECTIONS), of length 1.

    Histograms of oriented gradients after Dalal and Triggs, CVPR 2005.
    """
    down, right = np.gradient(films, axis=(1, 2))
    strength = np.hypot(down, right).ravel()
    angle = (np.arctan2(down, right) * (DIRECTIONS / (2 * np.pi)) % DIRECTIONS).ravel()
    cell = np.arange(SHRUNK) * MESH // SHRUNK
    place = (np.arange(len(films))[:, None, None] * MESH + cell[:, None]) * MESH + cell
    lower = angle.astype(int)
    total, first = np.zeros(len(films) * MESH * MESH * DIRECTIONS), place.ravel() * DIRECTIONS
    for step, share in enumerate((1 - (angle - lower), angle - lower)):
        total += np.bincount(first + (lower + step) % DIRECTIONS, share * strength, len(total))
    edges = np.sqrt(total).astype(np.float32).reshape(-1, MESH, MESH, DIRECTIONS)
    return edges / np.sqrt((edges**2).sum(axis=(1, 2, 3), keepdims=True)).clip(1e-6)


def _undo(films: np.ndarray, way: tuple[int, int]) -> np.ndarray:
    """Turn and invert films so that those that lie the given way stand upright."""
    return np.rot90(films, -way[0], (1, 2)) * way[1]


def _lie(coarse: np.ndarray) -> tuple[int, int]:
    """Tell which way the films lie as a whole: their mean is compared with the phantom's."""
    mean = coarse.sum(axis=0, keepdims=True)
    phantom = _describe(draw_batch(48, size=64))[1].sum(axis=0)
    return max(WAYS, key=lambda way: float((_undo(mean, way) * phantom).sum()))


def _compare(
    coarse: np.ndarray, edges: np.ndarray, good: np.ndarray, lies: tuple[int, int]
) -> np.ndarray:
    """Say of each film which way it lies, or that it is unlike the good ones, or nothing."""
    others = _undo(_unit(coarse[good].sum(axis=0) - coarse * good[:, None, None]), lies)
    likeness = {way: (_undo(coarse, way) * others).sum(axis=(1, 2)) for way in WAYS}
    table = np.stack(list(likeness.values()))
    words = np.array(list(WAYS.values()), object)[table.argmax(axis=0)]
    words[table.max(axis=0) - likeness[UPRIGHT] <= TURNED] = ""
    edges = _unit(edges)
    others = _unit(edges[good].sum(axis=0) - edges * good[:, None, None, None])
    unlike = (edges * others).sum(axis=(1, 2, 3)) < UNLIKE
    words[(unlike & (words == "")) | (table.max(axis=0) < FACELESS)] = "unlike a frontal chest film"
    return words


def _left_or_right(edges: np.ndarray, folds: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Score films: 1 is typical of the set, -1 of its mirror images.

    Ridge regression on what mirroring changes, fitted for each fold of patients on the good films
    of the others; once more without those that seem mirrored themselves.
    """
    mirror = edges[:, :, ::-1, (DIRECTIONS // 2 - np.arange(DIRECTIONS)) % DIRECTIONS]
    sides = (edges - mirror).reshape(len(edges), -1)
    score = np.zeros(len(sides))
    for fold in range(PARTS):
        fit = sides[good & (folds != fold)]
        for _ in range(2):
            square = fit.T @ fit + RIDGE * np.eye(sides.shape[1], dtype=np.float32)
            weights = np.linalg.solve(square, fit.sum(axis=0))
            fit = fit[fit @ weights > 0]
        score[folds == fold] = sides[folds == fold] @ weights
    return score
