"""Calibration equals scikit-learn and the definitions, with intervals; cuts see no test film."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import brier_score_loss

from fedutils.evidence.bootstrap import patient_resamples
from fedutils.evidence.calibration import (
    brier,
    calibrate,
    calibration_error,
    error_sums,
    recalibrate,
    reliability,
    tabulate_errors,
)
from fedutils.evidence.cuts import (
    SENSITIVE,
    YOUDEN,
    choose_threshold,
    operating_points,
    rates_at,
)
from fedutils.evidence.intervals import share_interval
from fedutils.evidence.tables import main_model, tabulate_calibration, tabulate_points
from fedutils.films.phantom.cases import FINDINGS


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


def test_without_labels_nothing_is_defined():
    nothing = np.full(3, np.nan), np.full(3, 0.5)
    assert np.isnan(brier(*nothing)) and np.isnan(calibration_error(*nothing))
    assert reliability(*nothing).empty


@pytest.mark.parametrize("bad", [([0, 2], [0.1, 0.2]), ([0, 1], [0.1, 1.2]), ([0, 1], [0.1])])
def test_what_is_no_label_or_no_probability_is_refused(bad):
    with pytest.raises(ValueError):
        brier(*map(np.array, bad))


def test_slope_and_intercept_are_those_that_were_planted():
    """Logits that are too wide by a factor, or moved: the recalibration turns them back."""
    rng = np.random.default_rng(1)
    logits, owners = rng.normal(-1, 1.5, 6000), np.arange(6000) // 3
    truth = (rng.random(6000) < 1 / (1 + np.exp(-logits))).astype(float)
    for factor, shift in ((1, 0), (2, 0), (0.5, 0), (1, 1.0)):
        found = recalibrate(truth, 1 / (1 + np.exp(-(logits * factor + shift))), owners)
        assert found["slope_low"] < 1 / factor < found["slope_high"]
        assert found["slope"] == pytest.approx(1 / factor, rel=0.1)
        if factor == 1:
            assert found["intercept_low"] < -shift < found["intercept_high"]
    apart = recalibrate(truth, np.where(truth == 1, 0.9, 0.1), owners)
    assert np.isnan(apart["slope"]) and not np.isnan(apart["intercept"])


def test_the_fit_is_that_of_scikit_learn_and_its_error_counts_patients():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(2)
    p, owners = rng.random(400), np.arange(400)
    truth = (rng.random(400) < p).astype(float)
    logit = np.log(p / (1 - p))[:, None]
    exact = LogisticRegression(C=1e12, tol=1e-10, max_iter=1000).fit(logit, truth).coef_[0, 0]
    once = recalibrate(truth, p, owners)
    assert once["slope"] == pytest.approx(exact, rel=1e-4)
    four = [np.tile(values, 4) for values in (truth, p, owners)]  # four films that say the same
    again = recalibrate(*four)
    assert again["slope_high"] - again["slope"] == pytest.approx(
        once["slope_high"] - once["slope"], rel=1e-6
    )


def test_thresholds_keep_their_promise_on_validation():
    rng = np.random.default_rng(2)
    for _ in range(20):
        truth, p = rng.integers(0, 2, 60).astype(float), rng.integers(0, 12, 60) / 12
        youden = {c: sum(_two(truth, p, c)) for c in np.unique(p)}
        cut = choose_threshold(truth, p, YOUDEN)
        best = max(youden.values())
        expected = max(c for c, value in youden.items() if value == pytest.approx(best))
        assert 0 <= expected - cut < 1e-3 and ((p >= cut) == (p >= expected)).all()
        cut = choose_threshold(truth, p, SENSITIVE)
        expected = max(c for c in np.unique(p) if _two(truth, p, c)[0] >= 0.9)
        assert ((p >= cut) == (p >= expected)).all()


def _two(truth, p, cut):
    return (p[truth == 1] >= cut).mean(), (p[truth == 0] < cut).mean()


def test_rates_are_those_of_the_table_of_four():
    truth, p = np.array([1, 1, 1, 0, 0, 0, 0, np.nan]), np.array([9, 8, 2, 7, 1, 1, 1, 9]) / 10
    who = np.arange(8)
    found = rates_at(truth, p, 0.7, who)
    assert found["sensitivity"] == pytest.approx(2 / 3) and found["specificity"] == 3 / 4
    assert found["ppv"] == pytest.approx(2 / 3) and found["npv"] == 3 / 4
    assert (found["prevalence"], found["n"], found["positives"]) == (3 / 7, 7, 3)
    assert np.isnan(found["sensitivity_low"])  # of three patients there is no interval
    assert np.isnan(rates_at(truth, p, np.nan, who)["specificity"])
    none = rates_at(truth, p, 0.95, who)
    assert np.isnan(none["ppv"]) and none["npv"] == 4 / 7
    assert np.isnan(rates_at(truth * 0, p, 0.5, who)["sensitivity"])


def test_a_rate_of_one_has_an_interval_and_copies_of_films_do_not_shorten_it():
    truth, p, who = (
        np.r_[np.ones(20), np.zeros(20)],
        np.r_[np.full(20, 0.9), np.zeros(20)],
        np.arange(40),
    )
    once = rates_at(truth, p, 0.5, who)
    assert once["sensitivity"] == 1 and 0.8 < once["sensitivity_low"] < 0.87
    p[:5] = 0.1
    once, five = (
        rates_at(*(np.tile(v, k) for v in (truth, p)), 0.5, np.tile(who, k)) for k in (1, 5)
    )
    ends = [(r["sensitivity_low"], r["sensitivity_high"]) for r in (once, five)]
    assert ends[0] == pytest.approx(ends[1], abs=0.01)


@pytest.mark.parametrize(("patients", "rate"), [(15, 0.7), (15, 0.9), (40, 0.8), (100, 0.95)])
def test_intervals_of_rates_cover(patients, rate):
    """Patients with one to four films, which tend to be found or missed together."""
    rng, held = np.random.default_rng(0), []
    for _ in range(1500):
        of_patient = rng.beta(rate * 3, (1 - rate) * 3, patients)
        who = np.repeat(np.arange(patients), rng.integers(1, 5, patients))
        low, high = share_interval(rng.random(len(who)) < of_patient[who], who)
        held.append(low <= rate <= high)
    assert 0.92 <= np.mean(held) <= 0.99


@pytest.fixture
def predicted():
    """Predictions of a federated model, and of a local one, for validation and test films."""
    rng = np.random.default_rng(3)
    names = [f"{k:08d}_000.png" for k in range(400)]
    index = pd.DataFrame(rng.integers(0, 2, (400, 14)), columns=FINDINGS).astype("float32")
    index.insert(0, "image_index", names)
    index.insert(1, "client", np.where(np.arange(400) % 4, "a", "b"))
    index.insert(2, "patient_id", [f"p{k}" for k in range(400)])
    tables = []
    for arm, client in (("local", "a"), ("federated", "")):
        p = np.clip(index[list(FINDINGS)] * 0.4 + rng.random((400, 14)) * 0.6, 0, 1)
        p.insert(0, "image_index", names)
        tables.append(p.assign(arm=arm, seed=0, client=client))
    table = pd.concat(tables, ignore_index=True)
    val = table["image_index"].isin(names[:200])
    return table[val], table[~val], index


def test_tables_have_a_row_a_model_hospital_and_finding_or_rule(predicted):
    _, test, index = predicted
    table, points = calibrate(test, index, 0, 200), operating_points(*predicted)
    assert len(table) == 2 * 3 * 15 and len(points) == 2 * 14 * 2
    mine = table[table["arm"] == "federated"].set_index(["hospital", "finding"])
    rows = test[test["arm"] == "federated"].set_index("image_index")
    films = index.set_index("image_index").loc[rows.index]
    for hospital in ("", "a", "b"):
        own = films["client"].isin([hospital] if hospital else ["a", "b"])
        first = mine.loc[(hospital, "Mass")]
        assert first["n"] == own.sum()
        exact = brier_score_loss(films.loc[own, "Mass"], rows.loc[own, "Mass"])
        assert first["brier"] == pytest.approx(exact)
        assert first["brier_low"] < first["brier"] < first["brier_high"]
        assert first["ece_low"] <= first["ece"] < first["ece_high"]
        of_all = mine.loc[hospital].drop("mean")
        assert mine.loc[(hospital, "mean"), "ece"] == pytest.approx(of_all["ece"].mean())
        assert mine.loc[(hospital, "mean"), "positives"] == 14
    assert main_model(table).values.tolist() == [["federated", 0, ""]]
    shown = tabulate_calibration(table[table["arm"] == "federated"])
    assert shown["hospital"].unique().tolist() == ["all films", "a", "b"]
    assert " to " in shown["slope"][0] and " to " not in shown["slope"][14]  # a mean of slopes
    assert float(shown["slope"][14]) == pytest.approx(
        shown["slope"][:13].str[:4].astype(float).mean(), abs=0.2
    )


def test_intervals_of_the_brier_score_cover_over_patients():
    """Films of a patient share its luck; an interval over films would hold too seldom."""
    rng, held = np.random.default_rng(5), []
    names = [f"f{k}" for k in range(240)]
    index = pd.DataFrame({"image_index": names, "client": "a"})
    index["patient_id"] = np.repeat([f"p{k}" for k in range(60)], 4)
    for seed in range(150):
        chance = np.repeat(rng.beta(1, 2, 60), 4)
        films = index.assign(**dict.fromkeys(FINDINGS, np.nan))
        films["Mass"] = (rng.random(240) < chance).astype(float)
        told = pd.DataFrame(1 / 3, index=range(240), columns=FINDINGS)
        told = told.assign(arm="federated", seed=0, client="", image_index=names)
        row = calibrate(told, films, seed, 200).set_index(["hospital", "finding"]).loc[("", "Mass")]
        held.append(row["brier_low"] <= 2 / 9 <= row["brier_high"])
    assert 0.89 <= np.mean(held) <= 0.99


def test_with_few_patients_there_is_a_value_and_nothing_more(predicted):
    _, test, index = predicted
    index.loc[:, "Mass"] = 0.0
    index.loc[index.index[-9:], "Mass"] = 1.0
    table = calibrate(test, index, 0, 50)
    row = table[(table["hospital"] == "") & (table["finding"] == "Mass")].iloc[0]
    assert not np.isnan(row["ece"]) and row[["ece_low", "slope", "intercept_high"]].isna().all()
    mean = table[(table["hospital"] == "") & (table["finding"] == "mean")].iloc[0]
    assert mean["positives"] == 13


def test_cuts_never_see_a_test_label(predicted):
    validation, test, index = predicted
    other = index.copy()
    tested = other["image_index"].isin(test["image_index"])
    other.loc[tested, list(FINDINGS)] = 1 - other.loc[tested, list(FINDINGS)]
    before, after = (operating_points(validation, test, i) for i in (index, other))
    assert (before["threshold"] == after["threshold"]).all()
    assert (before["sensitivity"] != after["sensitivity"]).any()


def test_a_local_model_is_cut_by_its_own_hospitals_films_alone(predicted):
    validation, test, index = predicted
    other = index.copy()
    theirs = other["client"] == "b"
    other.loc[theirs, list(FINDINGS)] = 1 - other.loc[theirs, list(FINDINGS)]
    before, after = (operating_points(validation, test, i).set_index("arm") for i in (index, other))
    same = before["threshold"] == after["threshold"]
    assert same["local"].all() and not same["federated"].all()


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


def test_rates_of_a_finding_with_few_patients_have_no_interval():
    rng = np.random.default_rng(0)
    truth = np.r_[np.ones(9), np.zeros(90)]
    owners, p = np.arange(99).astype(str), rng.random(99)
    few = rates_at(truth, p, 0.5, owners)
    assert np.isnan(
        [few[f"{rate}_low"] for rate in ("sensitivity", "specificity", "ppv", "npv")]
    ).all()
    enough = rates_at(np.r_[1, truth[:-1]], p, 0.5, owners)
    assert np.isfinite([enough[f"{rate}_low"] for rate in ("sensitivity", "ppv", "npv")]).all()


@pytest.mark.parametrize(("films", "shift"), [(100, -2.0), (400, 0.0)])
def test_the_chance_error_is_the_calibration_error_of_right_probabilities(films, shift):
    rng = np.random.default_rng(1)
    p = 1 / (1 + np.exp(-(shift + 1.2 * rng.standard_normal(films))))
    drawn = [calibration_error((rng.random(films) < p).astype(float), p) for _ in range(300)]
    who = np.arange(films)
    sums = error_sums(np.zeros(films), p, who, patient_resamples(who, 1, 0))
    table = tabulate_errors([{"finding": "Mass", "positives": 0} | sums], np.array([False]), films)
    assert table["ece_chance"][0] == pytest.approx(np.mean(drawn), rel=0.06)
