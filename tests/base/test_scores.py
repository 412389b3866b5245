"""Sums of a validation: of logits that are not finite no figure comes that looks good."""

import numpy as np
import pytest

from fedutils.base.scores import judge, validation_sums


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["one", "a column", "all"])
def test_logits_that_are_not_finite_judge_a_model_by_nothing(bad, where):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (40, 3)).astype(np.float32)
    logits = rng.normal(size=(40, 3)).astype(np.float32)
    labels[0, 0] = 1 if bad != np.inf else 0
    logits[{"one": (0, 0), "a column": (slice(None), 0), "all": slice(None)}[where]] = bad
    sound = validation_sums(labels[:, 1:], rng.normal(size=(40, 2)))
    sound = {k: np.r_[0, v] if v.ndim else v for k, v in sound.items()}
    sums = validation_sums(labels, logits)
    loss, auroc = judge([sums, sound])
    assert np.isnan(loss)
    assert sums["loss"] >= 0 and sums["pairs"][0] == 0
    assert auroc > 0.3  # of what can be judged
    if where == "all":
        assert all(np.isnan(judge([sums])))


def test_a_hospital_without_films_and_a_large_but_finite_loss_are_judged():
    none = validation_sums(np.empty((0, 2)), np.empty((0, 2)))
    some = validation_sums(np.eye(2), np.array([[-1e5, 0], [0, 0]], np.float32))
    loss, auroc = judge([none, some])
    assert loss == pytest.approx((1e5 + 3 * np.log(2)) / 4) and auroc == 0.25
