"""What three hospitals count gives the tables of notebook 04 from their films in one place."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from fedutils.evidence.calibration import calibrate
from fedutils.evidence.cuts import operating_points
from fedutils.evidence.metrics import evaluate_parts
from fedutils.evidence.pooled import (
    Plan,
    draw_shapes,
    draw_sums,
    grid_shapes,
    grid_sums,
    plan_of,
    pooled_tables,
    span_shapes,
    span_sums,
    spans_of,
)
from fedutils.evidence.tables import truth_of

FINDINGS = ["Mass", "Hernia", "Edema", "Fibrosis", "Nodule"]
TEST, REPEATS = 2400, 400


def everything(rng):
    """Predictions of a model on validation and test films, and their index by hospital.

    Hernia is rare, Edema was labelled at one hospital, Fibrosis has no training label, and of
    Nodule most probabilities are alike.
    """
    films, split = TEST + 1200, np.r_[np.repeat("test", TEST), np.repeat("val", 600)]
    split = np.r_[split, np.repeat("train", 600)]
    patient = np.r_[rng.integers(0, 700, TEST), 1000 + rng.integers(0, 300, 1200)]
    ill = rng.random((1300, 5)) < [0.2, 0.02, 0.3, 0.01, 0.2]
    truth = np.where(rng.random((films, 5)) < 0.9, ill[patient], 0).astype(float)
    truth[rng.random(films) < 0.05, 0] = np.nan
    logit = rng.normal(size=(films, 5)) * 1.3 - 2 + 1.2 * np.nan_to_num(truth)
    logit[:, 4] = np.round(logit[:, 4])
    chance = 1 / (1 + np.exp(-logit))
    client = np.array(["a", "b", "c"])[patient % 3]
    truth[client != "a", 2] = np.nan
    truth[split == "train", 3] = np.nan
    index = pd.DataFrame(truth, columns=FINDINGS)
    about = {"image_index": [f"{k}.png" for k in range(films)], "client": client, "split": split}
    index = pd.concat([pd.DataFrame(about | {"patient_id": patient.astype(str)}), index], axis=1)
    told = pd.DataFrame(chance, columns=FINDINGS).assign(Fibrosis=np.nan)
    owner = {"arm": "federated", "seed": "0", "client": "", "image_index": index["image_index"]}
    return pd.concat([pd.DataFrame(owner), told], axis=1), chance, index


@pytest.fixture(scope="module")
def both():
    """The tables from films in one place, and those from sums over three hospitals."""
    predictions, chance, index = everything(np.random.default_rng(1))
    split, truth, who = index["split"], truth_of(index), index["patient_id"].to_numpy()
    val, test = (predictions[split == name] for name in ("val", "test"))
    own = index.set_index("image_index").loc[test["image_index"]]
    whole = {"all": {"all": np.full(TEST, True)}}
    _, metrics, _, mean_over = evaluate_parts(test, own, whole, 7, REPEATS)
    errors = calibrate(test, index, 7, REPEATS).query("hospital == ''")
    one = mean_over, metrics, errors, operating_points(val, test, index)
    masks = [index["client"] == name for name in "abc"]

    def part(mask, name):
        chosen = (mask & (split == name)).to_numpy()
        return truth[chosen], chance[chosen], who[chosen]

    def add(sums):
        return {key: sum(one[key] for one in sums) for key in sums[0]}

    coarse = add([span_sums(*part(m, "val")) for m in masks])
    spans = spans_of(coarse)
    grid = add(
        [grid_sums(part(m, "train")[0], part(m, "val"), part(m, "test"), spans) for m in masks]
    )
    plan = Plan(**json.loads(json.dumps(asdict(plan_of(spans, grid)))))
    sums = add([draw_sums(*part(m, "test"), plan, 7, REPEATS) for m in masks])
    assert {name: value.shape for name, value in coarse.items()} == span_shapes(5)
    assert {name: value.shape for name, value in grid.items()} == grid_shapes(5)
    assert {name: value.shape for name, value in sums.items()} == draw_shapes(5, REPEATS)
    for value in (*grid.values(), *sums.values()):
        assert value.dtype == np.int64
    found, calibration, points = pooled_tables(
        FINDINGS, {("federated", "0", ""): (spans, grid, sums)}
    )
    return one, (found.mean_over, found.metrics, calibration, points)


@pytest.mark.parametrize("table", [1, 2, 3], ids=["metrics", "calibration", "operating points"])
def test_all_tables_agree_within_a_thousandth(both, table):
    one, sums = (side[table].reset_index(drop=True) for side in both)
    assert list(one.columns) == list(sums.columns) and len(one) == len(sums)
    for name in one:
        if pd.api.types.is_numeric_dtype(one[name]):
            np.testing.assert_allclose(sums[name], one[name], atol=1e-3, err_msg=name)
        else:
            assert one[name].fillna("").tolist() == sums[name].fillna("").tolist(), name


def test_values_and_cuts_agree_far_better(both):
    (mean_over, metrics, _, points), (same, pooled, _, cuts) = both
    assert mean_over == same and {"Mass", "Edema"} <= {*same}
    gap = (metrics["value"] - pooled["value"]).abs()
    assert gap.max() < 1e-4 and metrics.query("finding == 'mean'")["value"].notna().all()
    assert points["threshold"].equals(cuts["threshold"]) and cuts["threshold"].notna().any()


def test_what_nobody_was_taught_has_no_value(both):
    rows = both[1][1].query("finding == 'Fibrosis'")
    assert rows["value"].isna().all() and (rows["positives"] > 0).all()


def test_a_hospital_without_test_films_adds_nothing(both):
    none = np.empty((0, 5)), np.empty((0, 5)), np.empty(0)
    spans = spans_of(span_sums(*none))
    grid = grid_sums(none[0], none, none, spans)
    assert not any(value.any() for value in grid.values())
    sums = draw_sums(*none, plan_of(spans, grid), 7, REPEATS)
    assert {name: value.shape for name, value in sums.items()} == draw_shapes(5, REPEATS)
    assert not any(value.any() for value in sums.values())
