"""The attack finds what a model remembers, and says when there are too few patients to say."""

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_films

from fedutils.evidence.membership import RATE, attack_films
from fedutils.evidence.membership import attack_models as membership
from fedutils.evidence.membership import found_at as rate_at
from fedutils.evidence.words import membership_words
from fedutils.films.phantom.cases import FINDINGS


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """2,000 patients, each with two films, at two hospitals; 400 of them in validation."""
    dataset = tiny_films(tmp_path_factory.mktemp("films"), 4000, size=32)
    patient = np.arange(4000) // 2
    dataset.index["patient_id"] = [f"p{i:05d}" for i in patient]
    dataset.index["split"] = np.array(["train", "train", "train", "val", "test"])[patient % 5]
    dataset.index["client"] = np.array(["A", "B"])[patient // 5 % 2]
    return dataset


def predict(films, remembers, arm="federated", client=""):
    """Predictions that are surer, by `remembers`, where a film was trained on."""
    index = films.index[films.index["split"] != "test"]
    rng = np.random.default_rng(0)
    truth = index[list(FINDINGS)].to_numpy()
    surer = remembers * (index["split"] == "train").to_numpy()[:, None]
    logits = (2 * truth - 1) * (1 + surer) + rng.normal(0, 1, truth.shape)
    table = pd.DataFrame(1 / (1 + np.exp(-logits)), columns=FINDINGS)
    for name, value in (
        ("image_index", index["image_index"].to_numpy()),
        ("client", client),
        ("seed", 0),
        ("arm", arm),
    ):
        table.insert(0, name, value)
    return [table]


def values(table, metric="auroc"):
    return table[table["metric"] == metric].iloc[0]


def test_a_model_that_remembers_is_found_out_and_one_that_does_not_is_not(films):
    drawn = attack_films(films, 0)
    remembering = membership(predict(drawn, 1.0), films, 0)
    innocent = membership(predict(drawn, 0.0), films, 0)
    assert values(remembering)["value"] > 0.9 and values(remembering, RATE)["value"] > 0.2
    assert values(innocent)["ci_low"] < 0.5 < values(innocent)["ci_high"]
    assert "members have the lower loss; finds" in membership_words(remembering)[0]
    assert "no better than guessing" in membership_words(innocent)[0]


def test_members_and_others_are_as_many_at_each_hospital(films):
    index = attack_films(films, 0, most=150).index
    counts = index.groupby(["client", "split"])["patient_id"].nunique()
    assert counts.tolist() == [150] * 4 and len(index) == 2 * 600
    assert set(index["split"]) == {"train", "val"}
    assert (
        attack_films(films, 1, most=150).index["patient_id"].tolist()
        != index["patient_id"].tolist()
    )


def test_below_300_others_no_rate_is_stated(films):
    few = membership(predict(attack_films(films, 0, most=149), 1.0), films, 0)
    assert few["non_members"].unique() == [298]
    assert np.isnan(values(few, RATE)["value"]) and not np.isnan(values(few)["value"])
    assert "needs 300 others" in membership_words(few)[0]


def test_a_local_model_is_judged_on_its_own_hospitals_patients(films):
    table = membership(predict(attack_films(films, 0), 1.0, "local", "A"), films, 0)
    assert table["members"].unique() == table["non_members"].unique() == [200]


def test_the_interval_is_over_patients_not_films(films):
    """Each patient's films twice: the same patients, the same interval."""
    once = predict(attack_films(films, 0), 0.2)
    expected = membership(once, films, 0)
    pd.testing.assert_frame_equal(membership([*once, *once], films, 0), expected)


def test_the_rate_is_that_of_the_best_allowed_threshold():
    truth = np.r_[np.ones(200), np.zeros(200)].astype(int)
    score = np.r_[np.linspace(0, 2, 200), np.linspace(-1, 1, 200)]
    limit = np.sort(score[truth == 0])[-3]  # two of 200 may be accused
    expected = (score[truth == 1] > limit).mean()
    assert rate_at(truth, score, np.ones((1, 400), np.uint8))[0] == expected
    tied = np.zeros(400)
    assert rate_at(truth, tied, np.ones((1, 400), np.uint8))[0] == 0  # none apart from the others
