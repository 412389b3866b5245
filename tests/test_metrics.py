"""What the metrics promise: scikit-learn's numbers, whole patients, honest intervals."""

import time
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from fedutils import metrics
from fedutils.findings import FINDINGS


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


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 60), ties=st.booleans())
def test_point_values_are_scikit_learns(seed, n, ties):
    truth, score = labels_and_scores(np.random.default_rng(seed), n, ties)
    assert metrics.auroc(truth, score) == pytest.approx(roc_auc_score(truth, score))
    expected = average_precision_score(truth, score)
    assert metrics.average_precision(truth, score) == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 60), ties=st.booleans())
def test_bootstrap_equals_scikit_learn_with_multiplicities_as_weights(seed, n, ties):
    rng = np.random.default_rng(seed)
    truth, score = labels_and_scores(rng, n, ties)
    times = metrics.patient_resamples(rng.integers(0, max(n // 3, 1), n), 2 * metrics.CHUNK + 1, 5)
    resampled = metrics.bootstrap(truth, score, times)
    oracles = (roc_auc_score, average_precision_score)
    for name, oracle in zip(("auroc", "average_precision"), oracles, strict=True):
        for value, weight in zip(resampled[name][::9], times[::9], strict=True):
            if 0 < weight @ truth < weight.sum():
                assert value == pytest.approx(oracle(truth, score, sample_weight=weight))
            else:
                assert np.isnan(value)


def test_counting_every_film_once_gives_the_point_value():
    truth, score = labels_and_scores(np.random.default_rng(0), 200, ties=True)
    once = metrics.bootstrap(truth, score, np.ones((1, 200), dtype=np.uint8))
    assert once["auroc"][0] == pytest.approx(metrics.auroc(truth, score))
    assert once["average_precision"][0] == pytest.approx(metrics.average_precision(truth, score))


def test_unlabelled_films_are_masked_in_values_and_in_resamples():
    rng = np.random.default_rng(1)
    truth, score = labels_and_scores(rng, 120, ties=False)
    known = rng.random(120) < 0.6
    masked = np.where(known, truth, np.nan)
    times = metrics.patient_resamples(np.arange(120) // 2, 30, seed=0)
    assert metrics.auroc(masked, score) == roc_auc_score(truth[known], score[known])
    expected = metrics.bootstrap(truth[known], score[known], times[:, known])
    for name, values in metrics.bootstrap(masked, score, times).items():
        np.testing.assert_allclose(values, expected[name])


@pytest.mark.parametrize("truth", [[0, 0, 0], [1, 1, 1], [np.nan] * 3, [1, np.nan, np.nan]])
def test_undefined_is_nan_and_has_no_curve(truth):
    score = np.array([0.1, 0.2, 0.3])
    assert np.isnan(metrics.auroc(truth, score))
    assert np.isnan(metrics.average_precision(truth, score))
    assert all(len(axis) == 0 for axis in metrics.roc_points(truth, score))
    assert all(len(axis) == 0 for axis in metrics.pr_points(truth, score))
    resampled = metrics.bootstrap(truth, score, np.ones((4, 3), dtype=np.uint8))
    assert all(np.isnan(values).all() and len(values) == 4 for values in resampled.values())


@pytest.mark.parametrize(
    ("truth", "score"),
    [([0, 1], [0.1]), ([0, 1], [0.1, np.nan]), ([0, 2], [0.1, 0.2]), ([[0, 1]], [[0.1, 0.2]])],
)
def test_unusable_input_is_refused(truth, score):
    with pytest.raises(ValueError, match=r"length|labels must be"):
        metrics.auroc(truth, score)


def test_curves_enclose_the_areas():
    truth, score = labels_and_scores(np.random.default_rng(2), 300, ties=True)
    false_rate, true_rate = metrics.roc_points(truth, score)
    assert auc(false_rate, true_rate) == pytest.approx(metrics.auroc(truth, score))
    recall, precision = metrics.pr_points(truth, score)
    area = -(np.diff(recall) * precision[:-1]).sum()
    assert area == pytest.approx(metrics.average_precision(truth, score))


def test_resamples_draw_whole_patients():
    patients = np.repeat(np.array(["a", "b", "c", "d"]), [1, 5, 2, 7])
    times = metrics.patient_resamples(patients, repeats=400, seed=3)
    assert times.shape == (400, 15)
    for name in "abcd":
        assert (np.ptp(times[:, patients == name], axis=1) == 0).all()
    drawn = times[:, [0, 1, 6, 8]].astype(int)
    assert (drawn.sum(axis=1) == 4).all()
    np.testing.assert_allclose(drawn.mean(axis=0), 1, atol=0.15)


def test_resamples_depend_on_the_seed_alone():
    patients = np.arange(30) // 3
    first = metrics.patient_resamples(patients, 20, seed=7)
    np.testing.assert_array_equal(first, metrics.patient_resamples(patients, 20, seed=7))
    assert (first != metrics.patient_resamples(patients, 20, seed=8)).any()


def test_an_empty_test_set_is_refused():
    with pytest.raises(ValueError, match="no film"):
        metrics.evaluate(np.empty((0, 14)), np.empty((0, 14)), np.empty(0), seed=0)


def test_evaluate_has_a_row_for_every_finding_even_undefined_ones():
    truth, score, patients = ward(np.random.default_rng(4))
    truth[:, 13] = 0
    truth[:40, 0] = np.nan
    table = metrics.evaluate(truth, score, patients, seed=0, repeats=100)
    assert ",".join(table.columns) == "finding,metric,value,ci_low,ci_high,n,positives"
    auroc = table[table.metric == "auroc"].set_index("finding")
    assert list(auroc.index) == [*FINDINGS, "mean"]
    assert auroc.loc["Hernia", ["value", "ci_low", "ci_high"]].isna().all()
    assert auroc.loc["Hernia", ["n", "positives"]].tolist() == [len(truth), 0]
    assert auroc.loc["Atelectasis", "n"] == len(truth) - 40
    assert auroc.loc["Effusion", "value"] == roc_auc_score(truth[:, 2], score[:, 2])
    defined = auroc[auroc.value.notna()]
    assert (defined.ci_low <= defined.value).all() and (defined.value <= defined.ci_high).all()


def test_mean_is_taken_over_the_evaluable_findings():
    truth, score, patients = ward(np.random.default_rng(5))
    truth[:, 13] = 0
    few = np.flatnonzero(np.diff(patients, prepend=-1))[:9]
    truth[:, 12] = np.isin(np.arange(len(truth)), few)
    assert metrics.evaluable_findings(truth, patients) == list(FINDINGS[:12])
    table = metrics.evaluate(truth, score, patients, seed=0, repeats=50)
    for _, rows in table.groupby("metric"):
        rows = rows.set_index("finding")
        assert rows.value["mean"] == pytest.approx(rows.value[list(FINDINGS[:12])].mean())
        assert rows.loc["mean", ["n", "positives"]].tolist() == [len(truth), 12]


def test_positive_patients_count_not_positive_films():
    truth, patients = np.zeros((60, 14)), np.r_[np.arange(30), np.full(30, 99)]
    truth[:10, 0] = 1  # 10 films of 10 patients
    truth[30:50, 1] = 1  # 20 films of one patient
    assert metrics.evaluable_findings(truth, patients) == ["Atelectasis"]
    assert metrics.evaluable_findings(truth, patients, minimum=1) == [*FINDINGS[:2]]


def test_a_tiny_test_set_falls_back_to_what_is_defined():
    truth = np.zeros((6, 14))
    truth[0, 3], truth[:2, 5], truth[:, 7] = 1, 1, 1
    assert metrics.evaluable_findings(truth, np.arange(6)) == ["Infiltration", "Nodule"]
    assert metrics.evaluable_findings(np.zeros((6, 14)), np.arange(6)) == []
    table = metrics.evaluate(np.zeros((6, 14)), np.zeros((6, 14)), np.arange(6), 0, repeats=5)
    assert table.value.isna().all() and len(table) == 30


def test_an_interval_of_a_minority_of_resamples_is_not_given():
    values = np.r_[np.full(60, np.nan), np.linspace(0, 1, 40)]
    assert np.isnan(metrics.interval(values)).all()
    assert metrics.interval(values[40:]) == pytest.approx((0.025, 0.975))


def coverage(runs, level="patient", repeats=200):
    """Share of 14 x `runs` intervals that hold the true AUROC of 0.75, and their mean width."""
    inside, widths = [], []
    for run in range(runs):
        truth, score, owner = ward(np.random.default_rng([9, run]))
        unit = owner if level == "patient" else np.arange(len(owner))
        times = metrics.patient_resamples(unit, repeats, seed=run)
        for column in zip(truth.T, score.T, strict=True):
            low, high = metrics.interval(metrics.bootstrap(*column, times)["auroc"])
            inside.append(low <= 0.75 <= high)
            widths.append(high - low)
    return np.mean(inside), np.mean(widths)


def test_patient_intervals_cover_and_image_intervals_are_too_narrow():
    by_patient, width = coverage(36)
    by_image, narrow = coverage(36, level="image")
    assert 0.92 <= by_patient <= 0.98
    assert by_image < 0.85
    assert narrow < 0.8 * width


def test_bootstrap_of_a_full_size_test_set_stays_within_its_budget():
    rng = np.random.default_rng(6)
    patients = rng.integers(0, 2797, 25_596)
    truth, score = labels_and_scores(rng, 25_596, ties=False, prevalence=0.18)
    start = time.perf_counter()
    metrics.bootstrap(truth, score, metrics.patient_resamples(patients, 100, seed=0))
    seconds_for_all = (time.perf_counter() - start) * 10 * 14
    assert seconds_for_all < 60, "1,000 resamples of 14 findings"
