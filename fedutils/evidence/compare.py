"""Runs side by side, paired by patient."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from ..base.errors import InputError
from ..base.parameters import Parameters, parameter
from ..dataset import read_index, read_report
from ..run import check_fingerprint
from .bootstrap import patient_resamples
from .differences import draws_by_seed, join_rows, pair_rows
from .metrics import (
    REPEATS,
    add_means,
    count_patients,
    evaluable_findings,
    resample_models,
    tabulate_draws,
)
from .predict import read_predictions
from .tables import ALL_FILMS, LEAST_PATIENTS, Evaluation, name_model, name_rows, truth_of


@dataclass(frozen=True)
class CompareParameters(Parameters):
    """What notebook 04 lays beside a run."""

    compare: str = parameter(
        "", "names of other runs, such as A,B, to lay beside this one", identity=False,
        pattern=r"letters, digits, . _ -: [\w.,\s-]*",
    )  # fmt: skip


def compare_runs(runs: Sequence[Parameters], repeats: int = REPEATS) -> Evaluation:
    """Lay several evaluated runs on the same prepared data side by side, paired by patient.

    Returns an `Evaluation` of the test set `all` alone: `metrics` has a first column `run`, and
    means over seeds only; `differences` are those between the federated arms of every two runs,
    whose names are `first` and `second`, by seed where both runs have it. Raises InputError for a
    run that notebook 04 has not evaluated, and for one on other data.
    """
    check_fingerprint(runs[0], read_report(runs[0].prepared))
    fingerprints = {run.name: _evaluated_on(run) for run in runs}
    for name, fingerprint in fingerprints.items():
        if fingerprint != fingerprints[runs[0].name]:
            raise InputError(
                f"runs {runs[0].name} and {name} do not compare: they were evaluated on different"
                f" data ({fingerprints[runs[0].name][:16]} and {fingerprint[:16]})"
            )
    predictions = [read_predictions(run.run / "evaluation" / "predictions.csv.gz") for run in runs]
    index = read_index(runs[0].prepared).set_index("image_index")
    index = index.loc[predictions[0]["image_index"].unique()]
    truth, patients = truth_of(index), index["patient_id"].to_numpy()
    findings = {ALL_FILMS: evaluable_findings(truth, patients)}
    counts = count_patients(truth, patients)
    enough = np.minimum(*counts) >= LEAST_PATIENTS
    resamples = patient_resamples(index["patient_id"], repeats, runs[0].seed)
    masks = {ALL_FILMS: np.ones(len(index), dtype=bool)}
    draws, tables = {}, []
    for run, table in zip(runs, predictions, strict=True):
        draws[run.name] = add_means(resample_models(table, index, resamples, masks, findings))
        for (arm, seed, client), values in draws[run.name].items():
            if not seed and not client:
                rows = tabulate_draws(values[ALL_FILMS], truth, *counts, findings[ALL_FILMS])
                rows = name_model(name_rows(rows, {"test_set": ALL_FILMS}), (arm, seed, client))
                tables.append(name_rows(rows, {"run": run.name}))
    own = {name: draws_by_seed(found, ALL_FILMS) for name, found in draws.items()}
    pairs = [
        pair_rows(own[one], own[two], enough, {"test_set": ALL_FILMS, "first": one, "second": two})
        for one, two in combinations(own, 2)
    ]
    return Evaluation(pd.concat(tables, ignore_index=True), join_rows(pairs), findings[ALL_FILMS])


def _evaluated_on(settings: Parameters) -> str:
    """Return the fingerprint of the data that a run was evaluated on, or raise InputError."""
    path = settings.run / "evaluation" / "summary.json"
    if not path.is_file():
        raise InputError(f"{path} is not there: run notebook 04_evaluate on {settings.name} first")
    return json.loads(path.read_text())["fingerprint"]
