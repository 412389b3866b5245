"""Calibration equals scikit-learn and the definitions; temperatures and cuts see no test film."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import brier_score_loss

from fedutils.base.findings import FINDINGS
from fedutils.evidence.calibration import (
    SENSITIVE,
    YOUDEN,
    brier,
    calibrate,
    calibration_error,
    choose_threshold,
    fit_temperature,
    operating_points,
    rates_at,
    reliability,
    rescale,
)
from fedutils.evidence.tables import main_model, tabulate_points


def naive_error(truth, probability, bins=15):
    """Expected calibration error, one bin after the other."""
    total = 0.0
    for k in range(bins):
        low, high = np.linspace(0, 1, bins + 1)[[k, k + 1]]
        inside = [i for i, p in enumerate(probability) if low < p <= high or (k == 0 and p == 0)]
        if inside:
            gap = np.mean([truth[i] for i in inside]) - np.mean([probability[i] for i in inside])
            total += len(inside) / len(probability) * abs(gap)
    return total


def cases():
    rng = np.random.default_rng(0)
    p = rng.random(500)
    yield "random", (rng.random(500) < p).astype(float), p
    yield "no positive", np.zeros(50), p[:50]
    yield "no negative", np.ones(50), p[:50]
    yield "on the edges of bins", rng.integers(0, 2, 46).astype(float), np.arange(46) / 45
    yield "one film", np.ones(1), np.array([0.2])
    yield "one bin", rng.integers(0, 2, 40).astype(float), np.full(40, 0.01)


@pytest.mark.parametrize(("truth", "p"), [c[1:] for c in cases()], ids=[c[0] for c in cases()])
def test_brier_and_calibration_error_equal_scikit_learn_and_the_definition(truth, p):
    expected = brier_score_loss(truth, p, pos_label=1, labels=[0, 1])
    assert brier(truth, p) == pytest.approx(expected, abs=1e-12)
    assert calibration_error(truth, p) == pytest.approx(naive_error(truth, p), abs=1e-12)
    hidden = np.r_[truth, np.nan, np.nan], np.r_[p, 0.9, np.nan]
    assert brier(*hidden) == brier(truth, p)
    assert calibration_error(*hidden) == calibration_error(truth, p)


def test_without_labels_nothing_is_defined_and_the_temperature_is_one():
    nothing = np.full(3, np.nan), np.full(3, 0.5)
    assert np.isnan(brier(*nothing)) and np.isnan(calibration_error(*nothing))
    assert fit_temperature(*nothing) == 1 and reliability(*nothing).empty


@pytest.mark.parametrize("bad", [([0, 2], [0.1, 0.2]), ([0, 1], [0.1, 1.2]), ([0, 1], [0.1])])
def test_what_is_no_label_or_no_probability_is_refused(bad):
    with pytest.raises(ValueError):
        brier(*map(np.array, bad))


def test_an_overconfident_model_gets_its_temperature_back():
    rng = np.random.default_rng(1)
    logits = rng.normal(-1, 1.5, (4000, 14))
    truth = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)
    truth[::7] = np.nan
    for temperature in (0.5, 1.0, 3.0):
        boasting = 1 / (1 + np.exp(-logits * temperature))
        found = fit_temperature(truth, boasting)
        assert found == pytest.approx(temperature, rel=0.03)
        error = calibration_error(truth, rescale(boasting, found))
        assert error < 0.01 and (temperature == 1 or error < calibration_error(truth, boasting))


def test_scaling_keeps_the_order_and_a_temperature_of_one_changes_nothing():
    p = np.r_[0, np.sort(np.random.default_rng(0).random(50)), 1]
    assert np.allclose(rescale(p, 1.0), p, atol=2e-9)
    assert (np.diff(rescale(p, 4.0)) > 0).all()


def test_thresholds_keep_their_promise_on_validation():
    rng = np.random.default_rng(2)
    for _ in range(20):
        truth, p = rng.integers(0, 2, 60).astype(float), rng.integers(0, 12, 60) / 12
        youden = {c: sum(_two(truth, p, c)) for c in np.unique(p)}
        cut = choose_threshold(truth, p, YOUDEN)
        best = max(youden.values())
        assert cut == max(c for c, value in youden.items() if value == pytest.approx(best))
        cut = choose_threshold(truth, p, SENSITIVE)
        assert cut == max(c for c in np.unique(p) if _two(truth, p, c)[0] >= 0.9)


def _two(truth, p, cut):
    return (p[truth == 1] >= cut).mean(), (p[truth == 0] < cut).mean()


def test_rates_are_those_of_the_table_of_four():
    truth, p = np.array([1, 1, 1, 0, 0, 0, 0, np.nan]), np.array([9, 8, 2, 7, 1, 1, 1, 9]) / 10
    found = rates_at(truth, p, 0.7)
    assert found["sensitivity"] == pytest.approx(2 / 3) and found["specificity"] == 3 / 4
    assert found["ppv"] == pytest.approx(2 / 3) and found["npv"] == 3 / 4
    assert (found["prevalence"], found["n"], found["positives"]) == (3 / 7, 7, 3)
    assert np.isnan(rates_at(truth, p, np.nan)["specificity"])
    assert np.isnan(rates_at(truth, p, 0.95)["ppv"]) and rates_at(truth, p, 0.95)["npv"] == 4 / 7
    assert np.isnan(rates_at(truth * 0, p, 0.5)["sensitivity"])


@pytest.fixture
def predicted():
    """Predictions of a federated model, and of a local one, for validation and test films."""
    rng = np.random.default_rng(3)
    names = [f"{k:08d}_000.png" for k in range(400)]
    index = pd.DataFrame(rng.integers(0, 2, (400, 14)), columns=FINDINGS).astype("float32")
    index.insert(0, "image_index", names)
    index.insert(1, "client", np.where(np.arange(400) % 4, "a", "b"))
    tables = []
    for arm, client in (("local", "a"), ("federated", "")):
        p = np.clip(index[list(FINDINGS)] * 0.4 + rng.random((400, 14)) * 0.6, 0, 1)
        p.insert(0, "image_index", names)
        tables.append(p.assign(arm=arm, seed=0, client=client))
    table = pd.concat(tables, ignore_index=True)
    val = table["image_index"].isin(names[:200])
    return table[val], table[~val], index


def test_tables_have_a_row_a_model_finding_and_rule(predicted):
    table, points = calibrate(*predicted), operating_points(*predicted)
    assert len(table) == 2 * 15 and len(points) == 2 * 14 * 2
    first = table[(table["arm"] == "federated") & (table["finding"] == "Mass")].iloc[0]
    _, test, index = predicted
    rows = test[test["arm"] == "federated"]
    truth = index.set_index("image_index").loc[rows["image_index"], "Mass"]
    assert first["brier"] == pytest.approx(brier_score_loss(truth, rows["Mass"]))
    scaled = rescale(rows["Mass"].to_numpy(), first["temperature"])
    assert first["brier_scaled"] == pytest.approx(brier_score_loss(truth, scaled))
    mean = table[(table["arm"] == "federated") & (table["finding"] == "mean")].iloc[0]
    mine = table[(table["arm"] == "federated") & (table["finding"] != "mean")]
    assert mean["ece"] == pytest.approx(mine["ece"].mean()) and mean["positives"] == 14
    assert main_model(table).values.tolist() == [["federated", 0, ""]]


def test_temperatures_and_cuts_never_see_a_test_label(predicted):
    validation, test, index = predicted
    other = index.copy()
    tested = other["image_index"].isin(test["image_index"])
    other.loc[tested, list(FINDINGS)] = 1 - other.loc[tested, list(FINDINGS)]
    pairs = [
        (calibrate(validation, test, i), operating_points(validation, test, i))
        for i in (index, other)
    ]
    assert (pairs[0][0]["temperature"] == pairs[1][0]["temperature"]).all()
    assert (pairs[0][1]["threshold"] == pairs[1][1]["threshold"]).all()
    assert (pairs[0][1]["sensitivity"] != pairs[1][1]["sensitivity"]).any()


def test_a_local_model_is_tuned_on_its_own_hospitals_films_alone(predicted):
    validation, test, index = predicted
    other = index.copy()
    theirs = other["client"] == "b"
    other.loc[theirs, list(FINDINGS)] = 1 - other.loc[theirs, list(FINDINGS)]
    before, after = (calibrate(validation, test, i).set_index("arm") for i in (index, other))
    same = before["temperature"] == after["temperature"]
    assert same["local"].all() and not same["federated"].any()


def test_a_class_absent_on_validation_gives_no_cut_and_says_so(predicted):
    validation, test, index = predicted
    index.loc[index["image_index"].isin(validation["image_index"]), "Hernia"] = 0
    points = operating_points(validation, test, index)
    hernia = points[points["finding"] == "Hernia"]
    assert hernia["threshold"].isna().all() and (hernia["val_positives"] == 0).all()
    said = tabulate_points(points[points["arm"] == "federated"])
    assert said.loc["Hernia", (YOUDEN, "sensitivity")] == "no cut"
    assert list(said.index) == list(FINDINGS)
    assert said.loc["Mass", ("test films", "prevalence")] == f"{index[200:]['Mass'].mean():.3f}"
