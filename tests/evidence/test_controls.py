"""What a model has to beat: attributes alone, and shuffled labels."""

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fedutils.evidence.controls import control_scores
from fedutils.evidence.words import control_words
from fedutils.plots import auroc_forest

FINDINGS = ["Effusion", "Mass", "Edema"]


def drawn(films=400):
    """Films whose first finding goes with view and age, and a model that sees the second alone."""
    rng = np.random.default_rng(0)
    index = pd.DataFrame({
        "image_index": [f"{k:04d}.png" for k in range(films)],
        "patient_id": np.arange(films).astype(str),
        "age": rng.integers(20, 80, films).astype(float),
        "sex": rng.choice(["F", "M"], films),
        "view": rng.choice(["PA", "AP"], films),
        "scanner": "",
        "split": np.where(np.arange(films) % 2, "train", "test"),
    })  # fmt: skip
    chance = 0.1 + 0.4 * (index["view"] == "AP") + 0.3 * (index["age"] > 50)
    index["Effusion"] = (rng.random(films) < chance).astype(float)
    index["Mass"] = (rng.random(films) < 0.3).astype(float)
    index["Edema"] = (rng.random(films) < 0.3).astype(float)
    index.loc[index["split"] == "train", "Edema"] = np.nan
    seen = index[index["split"] == "test"]
    scores = {name: rng.random(len(seen)) for name in FINDINGS}
    scores["Mass"] = seen["Mass"] + rng.random(len(seen))
    names = {"arm": "federated", "seed": 0, "client": "", "image_index": seen["image_index"]}
    return index, pd.DataFrame(names | scores)


def test_attributes_alone_are_scikit_learns_logistic_regression_by_hand():
    index, predictions = drawn()
    index.loc[3, "age"] = np.nan  # of a training film
    controls = control_scores(predictions, index, ["Effusion", "Mass"], seed=0)
    train, test = (index[index["split"] == name] for name in ("train", "test"))
    mean = train["age"].mean()
    filled = train["age"].fillna(mean)
    columns = [
        np.c_[
            part["view"] == "AP", part["view"] == "PA", part["sex"] == "F", part["sex"] == "M",
            np.ones(len(part)), (part["age"].fillna(mean) - mean) / filled.std(ddof=0),
        ]
        for part in (train, test)
    ]  # fmt: skip
    missing = train["age"].isna().to_numpy()
    flag = [(part - missing.mean()) / missing.std() for part in (missing, np.zeros(len(test)))]
    ours, theirs = (np.c_[a, b] for a, b in zip(columns, flag, strict=True))
    for name in ("Effusion", "Mass"):
        model = LogisticRegression(max_iter=1000).fit(ours, train[name])
        area = roc_auc_score(test[name], model.predict_proba(theirs)[:, 1])
        assert np.isclose(controls.loc[name, "attributes"], area, atol=2e-3)
    assert controls.loc["Effusion", "attributes"] > 0.65
    means = controls.loc[["Effusion", "Mass"]].mean()
    assert np.allclose(controls.loc["mean"].astype(float), means)


def test_shuffled_labels_are_guessed_and_what_cannot_be_fitted_is_unknown():
    index, predictions = drawn()
    controls = control_scores(predictions, index, FINDINGS, seed=0)
    assert abs(controls.loc["Mass", "shuffled"] - 0.5) < 0.15
    assert controls["attributes"].isna().to_dict() == {
        "Effusion": False, "Mass": False, "Edema": True, "mean": True,
    }  # fmt: skip
    assert controls["shuffled"].notna().all()
    index.loc[index["split"] == "test", "Mass"] = 0.0
    assert (
        control_scores(predictions, index, [], seed=0).loc[["Mass", "mean"]].isna().all(axis=None)
    )
    again = [control_scores(predictions, index, ["Effusion"], seed=seed) for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(again[0], again[1])
    assert again[0].loc["mean", "shuffled"] != again[2].loc["mean", "shuffled"]


def test_they_are_said_and_drawn_as_ticks_beside_the_models():
    index, predictions = drawn()
    controls = control_scores(predictions, index, ["Effusion", "Mass"], seed=0)
    rows = pd.DataFrame({"finding": ["Effusion", "Mass", "Edema", "mean"], "value": 0.8})
    names = {"arm": "federated", "client": "", "test_set": "all", "metric": "auroc"}
    rows = rows.assign(**names, ci_low=0.7, ci_high=0.9, n=200, positives=2, seed="")
    said = control_words(controls, rows)
    assert f"reach a mean AUROC of {controls.loc['mean', 'attributes']:.3f}," in said
    assert said.endswith("with it federated 0.800 (0.700 to 0.900).")
    assert "cannot be said" in control_words(controls * np.nan, rows)
    (ax,) = auroc_forest(rows, controls=controls).axes
    ticks = [line for line in ax.lines if line.get_marker() == "|"]
    drawn_at = {(line.get_xdata()[0], line.get_color()) for line in ticks}
    for name, colour in (("attributes", "#222222"), ("shuffled", "#767676")):
        for value in controls[name].dropna():
            assert (value, colour) in drawn_at
    assert "grey, labels shuffled" in ax.get_xlabel()
