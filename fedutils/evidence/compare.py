"""Runs side by side, paired by patient."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from ..base.errors import InputError
from ..base.parameters import Parameters, parameter, split_list
from ..dataset import read_index, read_report
from .differences import draws_by_seed, join_rows, pair_rows
from .metrics import REPEATS, evaluate_parts
from .predict import check_fingerprint, read_predictions
from .tables import ALL_FILMS, Evaluation, name_rows, read_summary, rows_of


@dataclass(frozen=True)
class CompareParameters(Parameters):
    """What notebook 04 lays beside a run."""

    compare: str = parameter(
        "", "names of other runs, such as A,B, to lay beside this one", identity=False,
        pattern=r"letters, digits, . _ -: [\w.,\s-]*",
    )  # fmt: skip

    @property
    def compared(self) -> list[str]:
        """The names in `compare`, each once."""
        return list(dict.fromkeys(filter(None, split_list(self.compare))))


def compare_runs(runs: Sequence[Parameters], repeats: int = REPEATS) -> Evaluation:
    """Lay several evaluated runs on the same prepared data side by side, paired by patient.

    Returns an `Evaluation` of the test set `all` alone: `metrics` has a first column `run`, and
    means over seeds only; `differences` are those between the federated arms of every two runs,
    whose names are `first` and `second`, by seed where both runs have it. Raises InputError for a
    run that notebook 04 has not evaluated, and for one on other data.
    """
    check_fingerprint(runs[0], read_report(runs[0].prepared))
    fingerprints = {run.name: read_summary(run)["fingerprint"] for run in runs}
    for name, fingerprint in fingerprints.items():
        if fingerprint != fingerprints[runs[0].name]:
            raise InputError(
                f"runs {runs[0].name} and {name} do not compare: they were evaluated on different"
                f" data ({fingerprints[runs[0].name][:16]} and {fingerprint[:16]})"
            )
    predictions = [read_predictions(run.run / "evaluation" / "predictions.csv.gz") for run in runs]
    index = read_index(runs[0].prepared).set_index("image_index")
    index = index.loc[predictions[0]["image_index"].unique()]
    groups = {"all": {ALL_FILMS: np.ones(len(index), dtype=bool)}}
    own, metrics = {}, []
    for run, table in zip(runs, predictions, strict=True):
        draws, rows, enough, mean_over = evaluate_parts(table, index, groups, runs[0].seed, repeats)
        own[run.name] = draws_by_seed(draws, ALL_FILMS)
        rows = rows_of(rows, seed="", client="").drop(columns="on_all_films")
        metrics.append(name_rows(rows, {"run": run.name}))
    pairs = []
    for one, two in combinations(own, 2):
        names = {"test_set": ALL_FILMS, "first": one, "second": two}
        pairs.append(pair_rows(own[one], own[two], enough[ALL_FILMS], names))
    return Evaluation(pd.concat(metrics, ignore_index=True), join_rows(pairs), mean_over)
