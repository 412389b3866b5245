"""What the metrics promise: scikit-learn's numbers, whole patients, honest intervals."""

import time
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from fedutils.base import scores
from fedutils.base.scores import average_precision, pr_points, roc_points
from fedutils.evidence.bootstrap import RESAMPLES_AT_ONCE, bootstrap, interval, patient_resamples
from fedutils.evidence.differences import holm, join_rows, pair_rows
from fedutils.evidence.metrics import (
    Counts,
    count_patients,
    evaluable_findings,
    tabulate_draws,
    with_mean,
)
from fedutils.films.phantom.cases import FINDINGS


def labels_and_scores(rng, n, ties, prevalence=0.3):
    """Labels with both classes and scores on few or many levels."""
    truth = (rng.random(n) < prevalence).astype(float)
    truth[:2] = 0, 1
    score = rng.normal(size=n) + truth
    return truth, np.round(score) if ties else score


def ward(rng, patients=150, true_auroc=0.75, findings=14):
    """Test set of patients with 1 to 12 similar films each; every finding's AUROC is known.

    Binormal: a film's score is a shift for positives, plus the patient's and the film's noise
    of total variance 1, so that AUROC = Phi(shift / sqrt 2).
    """
    owner = np.repeat(np.arange(patients), rng.integers(1, 13, patients))
    films = (len(owner), findings)
    ill = rng.random((patients, findings))[owner] < 0.3
    truth = np.where(rng.random(films) < 0.9, ill, rng.random(films) < 0.3).astype(float)
    noise = 0.8 * rng.normal(size=(patients, findings))[owner] + 0.6 * rng.normal(size=films)
    return truth, truth * NormalDist().inv_cdf(true_auroc) * np.sqrt(2) + noise, owner


def table_of(truth, score, patients, repeats):
    """The rows of one model, as notebook 04 computes them."""
    resamples = patient_resamples(patients, repeats, seed=0)
    columns = zip(truth.T, score.T, strict=True)
    draws = np.stack([bootstrap(*column, resamples) for column in columns], axis=1)
    chosen = evaluable_findings(truth, patients)
    names, counts = FINDINGS[: truth.shape[1]], Counts.of(truth, patients)
    return tabulate_draws(names, with_mean(draws, chosen), counts, chosen)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 60), ties=st.booleans())
def test_point_values_are_scikit_learns(seed, n, ties):
    truth, score = labels_and_scores(np.random.default_rng(seed), n, ties)
    assert scores.auroc(truth, score) == pytest.approx(roc_auc_score(truth, score))
    expected = average_precision_score(truth, score)
    assert average_precision(truth, score) == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 60), ties=st.booleans())
def test_bootstrap_equals_scikit_learn_with_multiplicities_as_weights(seed, n, ties):
    rng = np.random.default_rng(seed)
    truth, score = labels_and_scores(rng, n, ties)
    draws = patient_resamples(rng.integers(0, max(n // 3, 1), n), 2 * RESAMPLES_AT_ONCE + 1, 5)
    films = rng.random(n) < 0.8
    resampled = bootstrap(truth, score, draws, films)
    oracles = (roc_auc_score, average_precision_score)
    for values, oracle in zip(resampled, oracles, strict=True):
        for value, times in zip(values[::9], draws.times.T[::9], strict=True):
            weight = times[draws.owner] * films
            if 0 < weight @ truth < weight.sum():
                assert value == pytest.approx(oracle(truth, score, sample_weight=weight))
            else:
                assert np.isnan(value)


@pytest.mark.parametrize("ties", [False, True])
def test_the_first_column_is_the_value_on_the_films_themselves(ties):
    truth, score = labels_and_scores(np.random.default_rng(0), 200, ties)
    draws = patient_resamples(np.arange(200) // 4, 3, seed=0)
    area, precision = bootstrap(truth, score, draws)[:, 0]
    assert area == pytest.approx(scores.auroc(truth, score), abs=1e-12)
    assert precision == pytest.approx(average_precision(truth, score), abs=1e-12)
    assert bootstrap(truth, score, draws, wanted=["auroc"])[0, 0] == area


def test_unlabelled_films_are_masked_in_values_and_in_resamples():
    rng = np.random.default_rng(1)
    truth, score = labels_and_scores(rng, 120, ties=False)
    known = rng.random(120) < 0.6
    masked = np.where(known, truth, np.nan)
    draws = patient_resamples(np.arange(120) // 2, 30, seed=0)
    assert scores.auroc(masked, score) == roc_auc_score(truth[known], score[known])
    expected = bootstrap(truth, score, draws, films=known)
    np.testing.assert_array_equal(bootstrap(masked, score, draws), expected)


@pytest.mark.parametrize("truth", [[0, 0, 0], [1, 1, 1], [np.nan] * 3, [1, np.nan, np.nan]])
def test_undefined_is_nan_and_has_no_curve(truth):
    score = np.array([0.1, 0.2, 0.3])
    assert np.isnan(scores.auroc(truth, score))
    assert np.isnan(average_precision(truth, score))
    assert all(len(axis) == 0 for axis in roc_points(truth, score))
    assert all(len(axis) == 0 for axis in pr_points(truth, score))
    resampled = bootstrap(truth, score, patient_resamples(np.arange(3), 4, 0))
    assert resampled.shape == (2, 5) and np.isnan(resampled).all()


@pytest.mark.parametrize(
    ("truth", "score"),
    [([0, 1], [0.1]), ([0, 1], [0.1, np.nan]), ([0, 2], [0.1, 0.2]), ([[0, 1]], [[0.1, 0.2]])],
)
def test_unusable_input_is_refused(truth, score):
    with pytest.raises(ValueError, match=r"length|labels must be"):
        scores.auroc(truth, score)


def test_curves_enclose_the_areas():
    truth, score = labels_and_scores(np.random.default_rng(2), 300, ties=True)
    false_rate, true_rate = roc_points(truth, score)
    assert auc(false_rate, true_rate) == pytest.approx(scores.auroc(truth, score))
    recall, precision = pr_points(truth, score)
    area = -(np.diff(recall) * precision[:-1]).sum()
    assert area == pytest.approx(average_precision(truth, score))


def test_resamples_draw_whole_patients_each_by_its_id_alone():
    patients = np.repeat(np.array(["a", "b", "c", "d"]), [1, 5, 2, 7])
    owner, times = patient_resamples(patients, repeats=4000, seed=3)
    assert times.shape == (4, 4001) and (np.array(list("abcd"))[owner] == patients).all()
    assert (times[:, 0] == 1).all()
    np.testing.assert_allclose(times.mean(axis=1), 1, atol=0.06)
    np.testing.assert_allclose(times.var(axis=1), 1, atol=0.1)  # Poisson's
    np.testing.assert_allclose(np.corrcoef(times) - np.eye(4), 0, atol=0.06)
    alone = patient_resamples(np.array(["c", "x"]), repeats=4000, seed=3).times
    np.testing.assert_array_equal(alone[0], times[2])


def test_many_scores_are_joined_and_the_value_stays_exact():
    """Of 6,000 films: interval ends move by less than a thousandth, the value by nothing."""
    rng = np.random.default_rng(0)
    truth, score = labels_and_scores(rng, 6000, ties=False)
    draws = patient_resamples(rng.integers(0, 1500, 6000), 400, seed=0)
    joined = bootstrap(truth, score, draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedutils.evidence.bootstrap.SEGMENTS", 10**6)
        whole = bootstrap(truth, score, draws)
    assert joined[:, 0] == pytest.approx(whole[:, 0], abs=1e-12)
    for one, two in zip(joined, whole, strict=True):
        assert interval(one[1:]) == pytest.approx(interval(two[1:]), abs=1e-3)
        assert one[1:].std() == pytest.approx(two[1:].std(), rel=0.02)


def test_resamples_depend_on_the_seed_alone():
    patients = np.arange(30) // 3
    first = patient_resamples(patients, 20, seed=7).times
    np.testing.assert_array_equal(first, patient_resamples(patients, 20, seed=7).times)
    assert (first != patient_resamples(patients, 20, seed=8).times).any()


def test_an_empty_test_set_is_refused():
    with pytest.raises(ValueError, match="no film"):
        patient_resamples(np.empty(0), repeats=5, seed=0)


def test_evaluate_has_a_row_for_every_finding_even_undefined_ones():
    truth, score, patients = ward(np.random.default_rng(4))
    truth[:, 13] = 0
    truth[:40, 0] = np.nan
    table = table_of(truth, score, patients, 100)
    assert ",".join(table.columns) == "finding,metric,value,ci_low,ci_high,n,positives"
    auroc = table[table.metric == "auroc"].set_index("finding")
    assert list(auroc.index) == [*FINDINGS, "mean"]
    assert auroc.loc["Hernia", ["value", "ci_low", "ci_high"]].isna().all()
    assert auroc.loc["Hernia", ["n", "positives"]].tolist() == [len(truth), 0]
    assert auroc.loc["Atelectasis", "n"] == len(truth) - 40
    assert auroc.loc["Effusion", "value"] == pytest.approx(scores.auroc(truth[:, 2], score[:, 2]))
    defined = auroc[auroc.value.notna()]
    assert (defined.ci_low <= defined.value).all() and (defined.value <= defined.ci_high).all()


def test_mean_is_taken_over_the_evaluable_findings():
    truth, score, patients = ward(np.random.default_rng(5))
    truth[:, 13] = 0
    few = np.flatnonzero(np.diff(patients, prepend=-1))[:9]
    truth[:, 12] = np.isin(np.arange(len(truth)), few)
    assert evaluable_findings(truth, patients) == list(range(12))
    table = table_of(truth, score, patients, 50)
    for _, rows in table.groupby("metric"):
        rows = rows.set_index("finding")
        assert rows.value["mean"] == pytest.approx(rows.value[list(FINDINGS[:12])].mean())
        assert rows.loc["mean", ["n", "positives"]].tolist() == [len(truth), 12]


def test_positive_patients_count_not_positive_films():
    truth, patients = np.zeros((60, 14)), np.r_[np.arange(30), np.full(30, 99)]
    truth[:10, 0] = 1  # 10 films of 10 patients
    truth[30:50, 1] = 1  # 20 films of one patient
    assert evaluable_findings(truth, patients) == [0]
    assert [count[:3].tolist() for count in count_patients(truth, patients)] == [
        [10, 1, 0],
        [21, 31, 31],
    ]


def test_negative_patients_are_wanted_too():
    truth, patients = np.zeros((60, 14)), np.arange(60)
    truth[:50, 0], truth[:51, 1], truth[:, 2] = 1, 1, 1
    assert evaluable_findings(truth, patients) == [0]


def test_nothing_is_judged_from_few_patients():
    truth = np.zeros((40, 14))
    truth[:9, 3], truth[:10, 5] = 1, 1
    score = truth + np.random.default_rng(0).normal(size=truth.shape)
    table = table_of(truth, score, np.arange(40), 50).query("metric == 'auroc'")
    table = table.set_index("finding")
    assert table["value"].notna().sum() == 3  # and the mean, over the one that has enough
    assert table["value"]["mean"] == table["value"][FINDINGS[5]]
    assert table["ci_low"].notna().tolist() == [False] * 5 + [True] + [False] * 8 + [True]


def test_of_a_tiny_test_set_there_is_no_mean():
    truth = np.zeros((6, 14))
    truth[0, 3], truth[:2, 5], truth[:, 7] = 1, 1, 1
    assert evaluable_findings(truth, np.arange(6)) == []
    table = table_of(np.zeros((6, 14)), np.zeros((6, 14)), np.arange(6), 5)
    assert table.value.isna().all() and len(table) == 30


def test_an_interval_of_a_minority_of_resamples_is_not_given():
    values = np.r_[np.full(60, np.nan), np.linspace(0, 1, 40)]
    assert np.isnan(interval(values)).all()
    assert interval(values[40:]) == pytest.approx((0.025, 0.975))


def test_groups_are_compared_over_the_findings_that_all_of_them_have():
    truth, patients = np.zeros((80, 14)), np.arange(80)
    left, right = patients < 40, patients >= 40
    truth[5:20, :2] = truth[50:65, 1:3] = 1
    assert evaluable_findings(truth, patients) == [0, 1, 2]
    assert evaluable_findings(truth, patients, [left, right]) == [1]
    nobody = np.zeros(80, dtype=bool)
    assert evaluable_findings(truth, patients, [left, right, nobody]) == [1]
    assert evaluable_findings(truth, patients, [nobody]) == []


def test_holm_is_the_step_down_of_the_paper():
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    np.testing.assert_allclose(holm(p), [0.03, 0.06, np.nan, 0.06, 0.02])
    assert np.isnan(holm(np.full(3, np.nan))).all()


@given(p=st.lists(st.floats(0.001, 1), min_size=1, max_size=14))
def test_holm_never_lowers_a_p_and_keeps_their_order(p):
    adjusted = holm(np.array(p))
    assert (adjusted >= p).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


ENOUGH = pd.Series(True, FINDINGS)


def draws_around(values, seeds, noise=0.01):
    """A model's draws by seed, and their mean: `values` (14,) moved by each of `seeds`."""
    over = noise * np.random.default_rng(1).normal(size=(14, 1001))
    over[:, 0] = 0
    one = {
        str(i): with_mean(np.asarray(values, float)[:, None] + over + move, range(14))[None]
        for i, move in enumerate(seeds)
    }
    return one | {"": np.mean(list(one.values()), axis=0)}


def differences(values, seeds, enough=ENOUGH, second="centralised"):
    """The rows of a difference from a model that has 0 in each finding, and seeds that agree."""
    zero = draws_around([0.0] * 14, [0.0] * len(seeds), noise=0)
    names = {"test_set": "all", "first": "federated", "second": second}
    rows = join_rows([pair_rows(draws_around(values, seeds), zero, enough, names)])
    return rows.set_index("finding")


def test_a_difference_is_shown_beyond_patients_and_seeds():
    clear = differences([0.1] * 14, seeds=[0.0, 0.001, -0.001])
    assert (clear["verdict"] == "shown").all() and (clear["seeds"] == 3).all()
    far_apart = differences([0.1] * 14, seeds=[0.1, 0.05, -0.15])
    assert (far_apart["ci_low"] < 0).all() and (far_apart["verdict"] == "no difference shown").all()
    assert far_apart["seed_low"]["mean"] == pytest.approx(-0.05)
    size = far_apart["detectable_3"]  # only of what Holm leaves alone
    assert size.drop("mean").isna().all() and far_apart["detectable_5"]["mean"] < size["mean"]
    undefined = differences([np.nan] + [0.1] * 13, seeds=[0.0, 0.01])
    assert undefined["verdict"].iloc[0] == "not defined" == undefined["verdict"]["mean"]


def test_with_one_seed_nothing_is_shown():
    one = differences([0.5] * 14, seeds=[0.0])
    assert set(one["verdict"]) == {"one training seed: not judged"} and one["ci_low"].isna().all()


def test_too_few_patients_give_no_verdict():
    few = differences([0.1] * 14, [0.0, 1e-4], pd.Series(np.arange(14) > 0, FINDINGS))
    assert few["verdict"].tolist() == ["too few patients"] + ["shown"] * 14
    assert few["p"].isna().tolist() == [True] + [False] * 14


def test_the_primary_hypothesis_stands_apart_and_all_others_together():
    values = [0.0225] + [0.0] * 13
    rows = differences(values, seeds=[0.0, 0.0])
    # An interval just beside 0: shown alone, not among 14.
    assert rows["ci_low"].iloc[0] > 0 and rows["p"].iloc[0] < 0.05 < rows["p_holm"].iloc[0]
    assert rows["verdict"].iloc[0] == "no difference shown"
    assert rows["p_holm"]["mean"] == rows["p"]["mean"]
    other = differences(values, seeds=[0.0, 0.0], second="local client-1")
    assert other["p_holm"]["mean"] >= other["p"]["mean"]
    assert other["p_holm"].iloc[0] == pytest.approx(15 * other["p"].iloc[0])


def coverage(runs, level="patient", repeats=200):
    """Share of 14 x `runs` intervals that hold the true AUROC of 0.75, and their mean width."""
    inside, widths = [], []
    for run in range(runs):
        truth, score, owner = ward(np.random.default_rng([9, run]))
        unit = owner if level == "patient" else np.arange(len(owner))
        draws = patient_resamples(unit, repeats, seed=run)
        for column in zip(truth.T, score.T, strict=True):
            low, high = interval(bootstrap(*column, draws, None, ["auroc"])[0, 1:])
            inside.append(low <= 0.75 <= high)
            widths.append(high - low)
    return np.mean(inside), np.mean(widths)


def test_patient_intervals_cover_and_image_intervals_are_too_narrow():
    """36 test sets of 14 findings each: 504 repetitions."""
    by_patient, width = coverage(36)
    by_image, narrow = coverage(36, level="image")
    assert 0.92 <= by_patient <= 0.98
    assert by_image < 0.85
    assert narrow < 0.8 * width


def test_a_resample_of_a_full_size_test_set_takes_a_fifth_of_scikit_learns_time():
    """A thousand of them, of 14 findings, then stay within a minute where that takes five."""
    rng = np.random.default_rng(6)
    patients = rng.integers(0, 2797, 25_596)
    truth, score = labels_and_scores(rng, 25_596, ties=False, prevalence=0.18)
    began = time.process_time()
    draws = patient_resamples(patients, 100, seed=0)
    bootstrap(truth, score, draws)
    ours = (time.process_time() - began) / 100
    began = time.process_time()
    for times in draws.times.T[:10]:
        roc_auc_score(truth, score, sample_weight=times[draws.owner])
        average_precision_score(truth, score, sample_weight=times[draws.owner])
    assert ours < (time.process_time() - began) / 10 / 5
