"""Grad-CAM where the answer is known, boxes that follow a resize, and points that never look."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_films, tiny_settings
from torch import nn

from fedutils.dataset import normalise
from fedutils.evidence import explain
from fedutils.evidence.cuts import YOUDEN
from fedutils.evidence.explain import (
    ALL_BOXES,
    BY_MODEL,
    CENTRE,
    ELSEWHERE,
    KINDS,
    POINTING,
    UPPER,
    box_pairs,
    fill_gallery,
    grad_cam,
    heat_maps,
    hottest,
    lies_in_box,
    load_model,
    pick_gallery,
    pointing_game,
    position_baselines,
    read_boxes,
    tally,
    upper_bounds,
)
from fedutils.evidence.intervals import share_interval
from fedutils.evidence.words import pointing_words
from fedutils.films.decode import decode_film
from fedutils.films.phantom.cases import FINDINGS
from fedutils.films.read import read_folder
from fedutils.model import build_resnet34


class Toy(nn.Module):
    """Layer: the input itself. Outputs: mean of channel 0 minus mean of channel 1; sum of squares."""

    def __init__(self):
        super().__init__()
        self.cells = nn.Identity()

    def forward(self, x):
        cells = self.cells(x)
        linear = cells[:, 0].mean(dim=(1, 2)) - cells[:, 1].mean(dim=(1, 2))
        return torch.stack([linear, (cells[:, 0] ** 2).sum(dim=(1, 2))], dim=1)


def test_grad_cam_of_a_toy_network_is_what_paper_and_pencil_give():
    x = torch.rand(4, 2, 3, 5, generator=torch.Generator().manual_seed(0)).double() - 0.3
    first = grad_cam(Toy(), "cells", x, torch.zeros(4, dtype=torch.long))
    assert torch.allclose(first, ((x[:, 0] - x[:, 1]) / 15).relu(), atol=1e-12)
    second = grad_cam(Toy(), "cells", x, torch.ones(4, dtype=torch.long))
    weight = (2 * x[:, 0]).mean(dim=(1, 2), keepdim=True)
    assert torch.allclose(second, (weight * x[:, 0]).relu(), atol=1e-12)


@pytest.mark.parametrize("tracked", ["layer4,fc", "fc"])
def test_grad_cam_of_a_resnet_is_its_class_activation_map_frozen_or_not(tracked):
    """With a mean and one linear layer behind it, Grad-CAM is CAM (Selvaraju et al., section 3)."""
    model = build_resnet34("none", tracked, outputs=14).double().eval()
    draw = torch.Generator().manual_seed(1)
    x = normalise(torch.randint(256, (2, 1, 96, 96), generator=draw, dtype=torch.uint8)).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        cam = grad_cam(model, "layer4", x, torch.tensor([3, 5]))
        assert not torch.is_grad_enabled() and not cam.requires_grad
        cells = nn.Sequential(*list(model.children())[:-2])(x)
    expected = torch.einsum("bc,bchw->bhw", model.fc.weight[[3, 5]].detach(), cells).relu() / 9
    assert cam.shape == (2, 3, 3) and torch.allclose(cam, expected, atol=1e-10) and cam.max() > 0
    assert not model.layer4._forward_hooks and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_hottest_cell_is_a_point_and_a_cold_map_points_nowhere():
    maps = np.zeros((3, 7, 7), np.float32)
    maps[0, 3, 3], maps[1, 0, 6] = 1, 2
    points = hottest(maps)
    assert points[0].tolist() == [0.5, 0.5]
    assert points[1] == pytest.approx([6.5 / 7, 0.5 / 7]) and np.isnan(points[2]).all()


def boxes_of(rows):
    """Boxes from (image, finding, x, y, w, h, patient)."""
    return pd.DataFrame(rows, columns=["image_index", "finding", *"xywh", "patient_id"])


def test_any_of_several_boxes_counts_and_the_edge_is_inside():
    boxes = boxes_of([
        ("a", "Mass", 0.0, 0.0, 0.2, 0.2, "1"), ("a", "Mass", 0.5, 0.5, 0.2, 0.2, "1"),
        ("a", "Nodule", 0.8, 0.8, 0.1, 0.1, "1"), ("b", "Mass", 0.5, 0.5, 0.2, 0.2, "2"),
    ])  # fmt: skip
    pairs = box_pairs(boxes)
    assert pairs[["image_index", "finding"]].to_numpy().tolist() == [
        ["a", "Mass"], ["a", "Nodule"], ["b", "Mass"],
    ]  # fmt: skip
    point = np.array([[0.5, 0.6]] * 3)
    assert lies_in_box(point, pairs, boxes).tolist() == [True, False, True]
    assert lies_in_box(point + [0, 0.11], pairs, boxes).tolist() == [False] * 3
    assert not lies_in_box(point * np.nan, pairs, boxes).any()


@pytest.mark.parametrize("size", [32, 64, 224])
def test_boxes_follow_a_resize(tmp_path, size):
    """A bright spot on a film that is not square, found again in its box at every size."""
    pixels = np.zeros((500, 1000), np.uint8)
    pixels[300:400, 100:200] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    film, about = decode_film(tmp_path / "a.png", size)
    box = np.array([100, 300, 100, 100]) / np.tile([about["width"], about["height"]], 2)
    boxes = boxes_of([("a.png", "Mass", *box, "1")])
    point = hottest(film[None].astype(np.float32))
    assert lies_in_box(point, box_pairs(boxes), boxes).all()
    assert not lies_in_box(point[:, ::-1], box_pairs(boxes), boxes).any()


def test_position_baselines_of_all_984_boxes_are_those_on_record(nih_test_data):
    """Image centre, and best fixed point fitted on the same films, which is an upper bound."""
    data = read_folder(nih_test_data / "nih_meta")
    boxes = data.boxes.merge(data.table[["image_index", "patient_id"]], on="image_index")
    boxes[["x", "y", "w", "h"]] /= 1024
    assert len(boxes) == len(box_pairs(boxes)) == 984
    recorded = {
        "Cardiomegaly": (0.97, 1.00), "Infiltration": (0.23, 0.55), "Pneumonia": (0.14, 0.50),
        "Effusion": (0.03, 0.37), "Pneumothorax": (0.01, 0.34), "Mass": (0.11, 0.33),
        "Atelectasis": (0.06, 0.23), "Nodule": (0.00, 0.10),
    }  # fmt: skip
    played = position_baselines(boxes, seed=0)
    shares = {m: tally(p).set_index("finding")["value"] for m, p in played.groupby("method")}
    upper = upper_bounds(boxes).set_index("finding")["value"]
    for finding, (centre, best) in recorded.items():
        assert round(shares[CENTRE][finding], 2) == centre, finding
        assert round(upper[finding], 2) == best, finding
        assert shares[ELSEWHERE][finding] <= upper[finding], finding
    assert set(shares[CENTRE].index) == {*recorded, ALL_BOXES}


def test_the_fixed_point_is_fitted_on_other_patients():
    """Ten patients whose boxes share nothing: a point fitted elsewhere never hits, a leak would."""
    rows = [
        (f"{k}{i}", "Mass", k / 10, 0.3, 0.05, 0.2, str(k)) for k in range(10) for i in range(3)
    ]
    boxes = boxes_of(rows)
    played = position_baselines(boxes, seed=0)
    mine = played[played["method"] == ELSEWHERE]
    assert len(mine) == 30 and not mine["hit"].any()
    assert upper_bounds(boxes)["value"].tolist() == [0.1, 0.1]
    together = boxes.assign(x=0.4)
    played = position_baselines(together, seed=0)
    assert played[played["method"] == ELSEWHERE]["hit"].all()


def test_without_another_patient_there_is_no_fixed_point():
    played = position_baselines(boxes_of([("a", "Mass", 0.4, 0.4, 0.3, 0.3, "1")]), seed=0)
    assert played["method"].tolist() == [CENTRE]
    assert np.isnan(tally(played.head(0))["value"]).all()


def test_the_interval_of_a_share_is_wilsons_over_patients():
    for k, n in ((0, 10), (7, 50), (10, 10)):
        z, p = 1.959963984540054, k / n
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        hits = np.arange(n) < k
        alone = share_interval(hits, np.arange(n))  # one film a patient: Wilson's own, but n - 1
        assert alone == pytest.approx((middle - half, middle + half), abs=0.004)
        if n > 10:  # five films of a patient that agree are one
            together = share_interval(np.repeat(hits, 5), np.repeat(np.arange(n), 5))
            assert together == pytest.approx(alone, abs=1e-9)
    assert np.isnan(share_interval(np.ones(90), np.arange(90) // 10)).all()  # of nine patients


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two untrained models, and films of 32 pixels that all have a box around their centre."""
    work = tmp_path_factory.mktemp("work")
    settings = tiny_settings(work, arms="federated,local", rounds=1)
    films = tiny_films(work, films=60)
    (settings.run / "models").mkdir(parents=True)
    for name, seed in (("trunk", 0), ("federated-s0", 1), ("local-s0-client-1", 2)):
        model = build_resnet34("none", settings.tracked, seed=seed, outputs=14)
        state = {
            k: v for k, v in model.state_dict().items() if model.is_tracked(k) != (name == "trunk")
        }
        save_file(
            {k: v.contiguous() for k, v in state.items()},
            settings.run / f"models/{name}.safetensors",
        )
    boxes = boxes_of([(n, "Mass", 0.0, 0.0, 0.6, 0.6, "") for n in films.index["image_index"]])
    boxes.drop(columns="patient_id").to_csv(settings.prepared / "boxes.csv", index=False)
    return settings, films


def test_under_224_pixels_nothing_is_measured_and_said_so(run):
    table = pointing_game(*run)
    assert table.empty and list(table.columns) == POINTING
    assert "not measurable at this size" in pointing_words(table, 32)
    assert "no film of the test set has a box" in pointing_words(table, 224)


def test_the_game_is_played_on_test_films_by_one_model_an_arm(run, monkeypatch):
    monkeypatch.setattr(explain, "LEAST_SIZE", 32)  # layer4 is one cell, the image centre
    settings, films = run
    table = pointing_game(settings, films)
    whole = table[table["finding"] == ALL_BOXES].set_index("method")
    assert (whole["n"] == (films.index["split"] == "test").sum()).all()
    assert whole.loc[BY_MODEL, "arm"].tolist() == ["federated", "local"]
    assert whole.loc[BY_MODEL, "client"].tolist() == ["", "client-1"]
    assert whole.loc[CENTRE, "value"] == 1 and whole.loc[UPPER, "value"] == 1
    model = load_model(settings, "federated-s0", 14)
    test = films.where(films.index["split"] == "test")
    pairs = box_pairs(read_boxes(settings, test))
    warm = heat_maps(model, test, pairs, batch_size=5).max(axis=(1, 2)) > 0
    assert whole.loc[BY_MODEL, "hits"].iloc[0] == warm.sum()
    words = pointing_words(table, 224)
    assert f"point of federated lies in a box in {warm.sum()} of 12" in words
    assert "the image centre lies in a box in 12 of 12" in words


def test_the_gallery_takes_the_most_confident_of_each_kind():
    names = list("abcdef")
    index = pd.DataFrame(0.0, index=range(6), columns=FINDINGS).assign(image_index=names)
    index["Mass"] = [1, 1, 1, 0, 0, np.nan]
    table = pd.DataFrame(0.1, index=range(6), columns=FINDINGS).assign(image_index=names)
    table["Mass"] = [0.8, 0.9, 0.2, 0.7, 0.7, 0.99]
    points = pd.DataFrame({"finding": FINDINGS, "rule": YOUDEN, "threshold": 0.5})
    points.loc[points["finding"] == "Hernia", "threshold"] = np.nan
    panels = pick_gallery(table.sample(frac=1, random_state=0), points, index)
    assert len(panels) == 14 * 3 and [p["kind"] for p in panels[:3]] == list(KINDS)
    mass = [p for p in panels if p["finding"] == "Mass"]
    assert [p["image_index"] for p in mass] == ["b", "d", "c"]  # d before e: equals go by name
    assert [p["probability"] for p in mass] == [0.9, 0.7, 0.2]
    assert all(p["image_index"] is None for p in panels if p["finding"] == "Hernia")


def test_gallery_panels_carry_film_boxes_and_a_heat_map_where_measurable(run, monkeypatch):
    settings, films = run
    name = films.index["image_index"][7]
    panels = [{"finding": "Mass", "kind": k, "image_index": n, "probability": 0.5}
              for k, n in zip(KINDS, (name, None, name), strict=True)]  # fmt: skip
    owner = pd.DataFrame({"arm": ["local"], "seed": [0], "client": ["client-1"]})
    filled = fill_gallery(settings, films, panels, owner)
    assert np.array_equal(filled[0]["film"], films[7][0][0]) and filled[1]["film"] is None
    assert filled[0]["boxes"] == [pytest.approx([0, 0, 19.2, 19.2])] and filled[1]["boxes"] == []
    assert all(panel["heat"] is None for panel in filled)
    monkeypatch.setattr(explain, "LEAST_SIZE", 32)
    filled = fill_gallery(settings, films, panels, owner)
    assert filled[0]["heat"].shape == (1, 1) and filled[1]["heat"] is None
