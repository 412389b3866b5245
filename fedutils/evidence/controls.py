"""What a model has to beat: what patients' attributes alone tell, and labels dealt out anew."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..base.findings import findings_of
from ..base.rng import generator
from ..base.scores import auroc, both_classes
from .tables import MEAN, main_model

ATTRIBUTES = ("view", "sex", "scanner")  # beside the age


def control_scores(
    predictions: pd.DataFrame, index: pd.DataFrame, mean_over: Sequence[str], seed: int
) -> pd.DataFrame:
    """Return the AUROC of two controls on the test films: a row a finding, then `mean`.

    Column `attributes`: a logistic regression on age, sex, view and scanner, fitted on the training
    films. Column `shuffled`: the main model's scores against the labels of test films drawn anew
    without repeats. NaN where test or training films lack a finding, or have nothing else; then the
    mean over the findings in `mean_over`, the primary mean's, is NaN too.
    """
    test = index[index["split"] == "test"].set_index("image_index")
    scores = predictions.merge(main_model(predictions)).set_index("image_index").loc[test.index]
    dealt = test.iloc[generator(seed, "shuffled labels").permutation(len(test))]
    alone = _attributes_alone(index[index["split"] == "train"], test)
    names = findings_of(test)
    known = test[names].where(alone.notna())  # an AUROC needs scores
    table = pd.DataFrame({
        "attributes": {name: auroc(known[name], alone[name].fillna(0)) for name in names},
        "shuffled": {name: auroc(dealt[name], scores[name]) for name in names},
    })  # fmt: skip
    table.loc[MEAN] = table.loc[[*mean_over]].mean(skipna=False)
    return table.rename_axis("finding")


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
