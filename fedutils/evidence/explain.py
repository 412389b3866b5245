"""Where the model looks: Grad-CAM, the pointing game against the boxes, and a gallery of films.

Points and boxes are fractions of the film's sides, so that they follow any resize: x to the right,
y down, as `boxes.csv` has them.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..base.device import find_devices
from ..base.files import read_written
from ..base.findings import findings_of
from ..base.parameters import Parameters
from ..base.rng import generator
from ..dataset import ChestXrayDataset
from ..model import ChestResNet, build_resnet34
from ..run import TRUNK, Model, list_models, read_model
from .cuts import YOUDEN
from .intervals import share_interval
from .tables import OWNER

LAYER = "layer4"
LEAST_SIZE = 224  # layer4 of such a film is 7x7 cells; of a 64-pixel film 2x2, which point nowhere
NOT_MEASURABLE = "not measurable at this size"
CELLS = 64  # a side of the grid on which the best fixed point is sought
FOLDS = 5
BY_MODEL, CENTRE = "model", "image centre"
ELSEWHERE, UPPER = "best fixed point, other films", "best fixed point, same films"
ALL_BOXES = "all boxes"
POINTING = ["method", *OWNER, "finding", "hits", "n", "value", "ci_low", "ci_high"]
KINDS = ("true positive", "false positive", "false negative")


def grad_cam(model: nn.Module, layer: str, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Map what raises one output of each film (Selvaraju et al., ICCV 2017): (B, h, w), at least 0.

    `inputs` are what the model takes, `outputs` (B,) the position of each film's output.
    The layer's channels are weighted by the mean gradient of the output (before the sigmoid) and
    summed, and what lowers it is cut off. The map has the layer's own grid. The model's mode is
    left alone: call `eval()` before.
    """
    seen = {}

    def keep(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        """Begin the graph here: nothing before the layer needs a gradient, frozen or not."""
        torch.set_grad_enabled(True)  # until the `no_grad` around it ends
        seen["cells"] = output.detach().requires_grad_()
        return seen["cells"]

    with model.get_submodule(layer).register_forward_hook(keep), torch.no_grad():
        chosen = model(inputs).gather(1, outputs[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, seen["cells"])
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * seen["cells"].detach()).sum(dim=1).relu()


def hottest(maps: np.ndarray) -> np.ndarray:
    """Centre of the hottest cell of each map (N, h, w), as fractions (N, 2) of width and height.

    That is where the map is highest once it is enlarged to the film, too. A map without any
    positive cell points nowhere: NaN, which lies in no box.
    """
    height, width = maps.shape[1:]
    y, x = np.divmod(maps.reshape(len(maps), -1).argmax(axis=1), width)
    points = np.stack([(x + 0.5) / width, (y + 0.5) / height], axis=1)
    return np.where(maps.max(axis=(1, 2))[:, None] > 0, points, np.nan)


def heat_maps(
    model: ChestResNet, films: ChestXrayDataset, pairs: pd.DataFrame, batch_size: int = 64
) -> np.ndarray:
    """Grad-CAM of `layer4` for each pair of `image_index` and `finding`: float32 (N, h, w)."""
    device = next(model.parameters()).device
    positions = pd.Index(films.index["image_index"]).get_indexer(pairs["image_index"])
    outputs = pd.Index(films.findings).get_indexer(pairs["finding"])
    outputs = torch.from_numpy(outputs).to(device)
    model.eval()
    maps = []
    for part in torch.arange(len(pairs)).split(batch_size):
        batch, _ = films.batch(positions[part], device)
        maps.append(grad_cam(model, LAYER, batch, outputs[part]).cpu())
    return torch.cat(maps).numpy()


def load_model(settings: Parameters, name: str, outputs: int) -> ChestResNet:
    """Load one model of a run, such as federated-s0, in float32; local BatchNorm is the average."""
    model = build_resnet34(
        "none", settings.tracked, settings.batchnorm, outputs=outputs, precision="fp32"
    )
    model.load(read_model(settings.run, TRUNK) | read_model(settings.run, name))
    return model.place(find_devices(settings.device)[0]).eval()


def read_boxes(settings: Parameters, films: ChestXrayDataset) -> pd.DataFrame:
    """Read the boxes of these films by finding: `image_index, finding, x, y, w, h, patient_id`."""
    boxes = read_written(settings.prepared / "boxes.csv", "image_index", "finding")
    boxes = boxes[boxes["finding"].isin(films.findings)]
    boxes = boxes.merge(films.index[["image_index", "patient_id"]], on="image_index")
    order = boxes["finding"].map(films.findings.index)
    return boxes.loc[order.sort_values(kind="stable").index].reset_index(drop=True)


def box_pairs(boxes: pd.DataFrame) -> pd.DataFrame:
    """List what is played on: each film and finding with a box, however many boxes it has."""
    return boxes[["image_index", "finding", "patient_id"]].drop_duplicates(ignore_index=True)


def lies_in_box(points: np.ndarray, pairs: pd.DataFrame, boxes: pd.DataFrame) -> np.ndarray:
    """Tell which points (N, 2) lie in any box of their pair, or on its edge: bool (N,)."""
    placed = pairs[["image_index", "finding"]].assign(px=points[:, 0], py=points[:, 1])
    both = placed.reset_index().merge(boxes, on=["image_index", "finding"])
    inside = both["px"].between(both["x"], both["x"] + both["w"])
    inside &= both["py"].between(both["y"], both["y"] + both["h"])
    return inside.groupby(both["index"]).any().to_numpy()


def fit_point(boxes: pd.DataFrame) -> tuple[np.ndarray, int]:
    """Find the point that most boxes share: the cell of a 64x64 grid that most of them touch.

    Returns its centre (2,) and how many touch it, which no fixed point exceeds, since it was fitted
    on these very boxes. Of equally good cells, that nearest to their middle.
    """
    counts = np.zeros((CELLS, CELLS), int)
    for x, y, w, h in boxes[["x", "y", "w", "h"]].to_numpy():
        first, last = (np.array([[y, x], [y + h, x + w]]) * CELLS).astype(int)
        counts[first[0] : last[0] + 1, first[1] : last[1] + 1] += 1
    best = np.argwhere(counts == counts.max())
    nearest = best[((best - best.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    return (nearest[::-1] + 0.5) / CELLS, counts.max()


def cross_fitted(boxes: pd.DataFrame, pairs: pd.DataFrame, seed: int) -> np.ndarray:
    """Best fixed point for each pair of one finding, fitted on the boxes of other patients: (N, 2).

    Patients are dealt into five folds, and each fold's point comes from the other folds. NaN where
    there is no other patient.
    """
    patients = np.sort(pairs["patient_id"].unique())
    order = generator(seed, "pointing folds").permutation(len(patients))
    of_pair, of_box = (
        table["patient_id"].map(pd.Series(order % FOLDS, patients)) for table in (pairs, boxes)
    )
    points = np.full((len(pairs), 2), np.nan)
    for k in of_pair.unique():
        if (of_box != k).any():
            points[of_pair == k] = fit_point(boxes[of_box != k])[0]
    return points


def position_baselines(boxes: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Play the image centre, and the best fixed point of each finding on other patients' films.

    Returns a row a pair and method: `image_index, finding, patient_id, method, hit`.
    """
    tables = []
    for _, own in boxes.groupby("finding", sort=False):
        pairs = box_pairs(own)
        centre = np.full((len(pairs), 2), 0.5)
        for method, points in ((CENTRE, centre), (ELSEWHERE, cross_fitted(own, pairs, seed))):
            played = pairs.assign(method=method, hit=lies_in_box(points, pairs, own))
            tables.append(played[~np.isnan(points[:, 0])])  # no other patient: no point to play
    return pd.concat(tables, ignore_index=True)


def tally(played: pd.DataFrame) -> pd.DataFrame:
    """Count hits by finding and over all: `finding, hits, n, value, ci_low, ci_high` (patients)."""
    table = _shares(played.groupby("finding", sort=False)["hit"].agg(hits="sum", n="size"))
    own = {name: played[played["finding"] == name] for name in table["finding"]}
    own[ALL_BOXES] = played
    ends = [share_interval(own[k]["hit"], own[k]["patient_id"]) for k in table["finding"]]
    return table.assign(ci_low=[e[0] for e in ends], ci_high=[e[1] for e in ends])


def upper_bounds(boxes: pd.DataFrame) -> pd.DataFrame:
    """Share of each finding's boxes that one point can reach if fitted on these boxes: no interval.

    Rows as in `tally`, of boxes in place of films; those of all boxes have a point a finding.
    """
    counts = {
        name: (fit_point(own)[1], len(own)) for name, own in boxes.groupby("finding", sort=False)
    }
    return _shares(pd.DataFrame(counts, ["hits", "n"]).T)


def _shares(counts: pd.DataFrame) -> pd.DataFrame:
    """Add the counts of all boxes to those by finding, and the share of hits to each."""
    counts.loc[ALL_BOXES] = counts.sum()
    return counts.assign(value=counts["hits"] / counts["n"]).rename_axis("finding").reset_index()


def pointing_game(settings: Parameters, films: ChestXrayDataset) -> pd.DataFrame:
    """Play the pointing game on all boxes of test films: the rows of pointing.csv.

    Zhang et al. (IJCV 2018), without a tolerance: does the hottest point of the map lie in a box?
    Columns: POINTING. The model of each arm for the first seed (of local models the first
    client's), then what a point without a look at the film reaches. Empty where a film is under 224
    pixels, or there is no box.
    """
    test = films.where(films.index["split"] == "test")
    boxes, tables = read_boxes(settings, test), []
    if settings.image_size < LEAST_SIZE or boxes.empty:
        return pd.DataFrame(columns=POINTING)
    pairs = box_pairs(boxes)
    models = list_models(settings, films.index["client"].unique())
    first = {model.arm: model for model in reversed(models)}
    for arm in settings.arm_list:
        points = hottest(
            heat_maps(load_model(settings, first[arm].name, len(films.findings)), test, pairs)
        )
        owner = {"method": BY_MODEL} | dict(zip(OWNER, first[arm], strict=True))
        tables.append(tally(pairs.assign(hit=lies_in_box(points, pairs, boxes))).assign(**owner))
    played = position_baselines(boxes, settings.seed)
    tables += [tally(played[played["method"] == m]).assign(method=m) for m in (CENTRE, ELSEWHERE)]
    tables.append(upper_bounds(boxes).assign(method=UPPER))
    return pd.concat(tables, ignore_index=True)[POINTING].astype({"seed": "Int64"})


def pick_gallery(predictions: pd.DataFrame, points: pd.DataFrame, index: pd.DataFrame) -> list:
    """Pick the films to show by a rule that leaves no choice; return a dict for each panel.

    Of each finding the most confident true positive, false positive and false negative of one
    model's `predictions`: the highest probability of a film called positive, and the lowest of one
    that has the finding and is not. The cut is Youden's in the model's operating `points`, which
    come from validation. Of equals the first name. Keys: `finding, kind, image_index, probability`;
    the last two are None where there is no such film, or no cut.
    """
    films = predictions.merge(index, on="image_index", suffixes=("", " truth"))
    films = films.set_index("image_index").sort_index()
    cuts = points[points["rule"] == YOUDEN].set_index("finding")["threshold"]
    panels = []
    for finding in findings_of(predictions):
        p, truth = films[finding], films[f"{finding} truth"]
        called, missed = p >= cuts[finding], p < cuts[finding]
        masks = (truth == 1) & called, (truth == 0) & called, (truth == 1) & missed
        for kind, mask in zip(KINDS, masks, strict=True):
            panel = {"finding": finding, "kind": kind, "image_index": None, "probability": None}
            if mask.any():
                name = p[mask].idxmin() if kind == KINDS[2] else p[mask].idxmax()
                panel |= {"image_index": name, "probability": float(p[name])}
            panels.append(panel)
    return panels


def fill_gallery(
    settings: Parameters, films: ChestXrayDataset, panels: list[dict[str, Any]], owner: pd.DataFrame
) -> list[dict[str, Any]]:
    """Add to each panel of `pick_gallery` its `film` (uint8), `boxes` in pixels and `heat` map.

    `owner` is one row `arm, seed, client` that names the model. `heat` is None on films under 224
    pixels.
    """
    boxes, size = read_boxes(settings, films), settings.image_size
    shown = [panel for panel in panels if panel["image_index"]]
    heats = iter(())
    if size >= LEAST_SIZE and shown:
        model = load_model(settings, Model(*owner.iloc[0]).name, len(films.findings))
        heats = iter(heat_maps(model, films, pd.DataFrame(shown)))
    positions = pd.Series(films.index.index, films.index["image_index"])
    filled = []
    for panel in panels:
        name, film, heat = panel["image_index"], None, None
        if name:
            film, heat = films[positions[name]][0][0].numpy(), next(heats, None)
        own = boxes[(boxes["image_index"] == name) & (boxes["finding"] == panel["finding"])]
        pixels = (own[["x", "y", "w", "h"]].to_numpy() * size).tolist()
        filled.append(panel | {"film": film, "boxes": pixels, "heat": heat})
    return filled
