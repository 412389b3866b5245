"""What a model has to beat: what patients' attributes alone tell, and labels dealt out anew."""

import numpy as np
import pandas as pd

from ..base.findings import findings_of
from ..base.rng import generator
from ..base.scores import auroc, both_classes
from .tables import main_model

ATTRIBUTES = ("view", "sex", "scanner")  # beside the age


def control_scores(predictions: pd.DataFrame, index: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return the AUROC of two controls on the test films: columns of `index`'s findings, then mean.

    Row `attributes`: a logistic regression on age, sex, view and scanner, fitted on the training
    films. Row `shuffled`: the main model's scores against the labels of test films drawn anew
    without repeats. NaN where a finding lacks films with it, or without.
    """
    test = index[index["split"] == "test"].set_index("image_index")
    scores = predictions.merge(main_model(predictions)).set_index("image_index").loc[test.index]
    dealt = test.iloc[generator(seed, "shuffled labels").permutation(len(test))]
    alone = _attributes_alone(index[index["split"] == "train"], test)
    names = findings_of(test)
    return pd.DataFrame({
        "attributes": {name: auroc(test[name], alone[name]) for name in names},
        "shuffled": {name: auroc(dealt[name], scores[name]) for name in names},
    }).T  # fmt: skip


def _attributes_alone(train: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    """Return the probabilities of test films by what is known of the patient and the picture."""
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    age = make_pipeline(
        SimpleImputer(add_indicator=True, keep_empty_features=True), StandardScaler()
    )
    kinds = OneHotEncoder(handle_unknown="ignore")
    inputs = make_column_transformer((kinds, [*ATTRIBUTES]), (age, ["age"]))
    model = make_pipeline(inputs, LogisticRegression(max_iter=1000))
    scores = {}
    for finding in findings_of(test):
        known = train[train[finding].notna()]
        scores[finding] = np.full(len(test), np.nan)
        if both_classes(known[finding]):
            scores[finding] = model.fit(known, known[finding]).predict_proba(test)[:, 1]
    return pd.DataFrame(scores, test.index)
