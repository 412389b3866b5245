"""What notebook 04 writes, and that it can be recomputed from the files alone."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score, roc_auc_score
from tiny import tiny_films, tiny_settings

from fedutils import evaluation
from fedutils.__main__ import main
from fedutils.federation import Training
from fedutils.findings import FINDINGS, InputError
from fedutils.images import read_report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    settings = tiny_settings(work, arms="federated,local", rounds=1)
    films = tiny_films(work, films=120)
    Training(settings, films).train()
    folder = settings.run / "evaluation"
    predicted = evaluation.predict_films(settings, films, "test")
    read = evaluation.write_predictions(predicted, folder / "predictions.csv.gz")
    metrics = evaluation.evaluate_models(read, films, seed=0)
    return settings, films, predicted, read, metrics


def test_predictions_are_written_with_nine_digits_and_read_back(run):
    _, films, predicted, read, _ = run
    assert list(read.columns) == ["arm", "seed", "client", "image_index", *FINDINGS]
    assert len(read) == 24 * (1 + 3) and set(read["client"]) == {
        "",
        "client-1",
        "client-2",
        "client-3",
    }
    assert np.allclose(read[list(FINDINGS)], predicted[list(FINDINGS)], rtol=1e-8)
    test = films.index[films.index["split"] == "test"]["image_index"]
    assert set(read["image_index"]) == set(test)


def test_equal_predictions_make_equal_bytes(run, tmp_path):
    _, _, predicted, _, _ = run
    evaluation.write_predictions(predicted, tmp_path / "a.csv.gz")
    evaluation.write_predictions(predicted, tmp_path / "b" / "a.csv.gz")
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b" / "a.csv.gz").read_bytes()


def test_metrics_equal_scikit_learns_on_the_written_file(run):
    settings, films, _, _, metrics = run
    table = pd.read_csv(settings.run / "evaluation" / "predictions.csv.gz", keep_default_na=False)
    truth = films.index.set_index("image_index")
    columns = [
        "arm",
        "seed",
        "client",
        "test_set",
        "finding",
        "metric",
        "value",
        "ci_low",
        "ci_high",
    ]
    assert list(metrics.columns) == [*columns, "n", "positives"] and set(metrics["test_set"]) == {
        "all"
    }
    for (arm, client), rows in table.groupby(["arm", "client"]):
        mine = metrics[(metrics["arm"] == arm) & (metrics["client"] == client)]
        value = mine.set_index(["finding", "metric"])["value"]
        for finding in FINDINGS:
            labels = truth.loc[rows["image_index"], finding]
            assert value[finding, "auroc"] == pytest.approx(roc_auc_score(labels, rows[finding]))
            precision = average_precision_score(labels, rows[finding])
            assert value[finding, "average_precision"] == pytest.approx(precision)


def test_summary_tells_what_repeating_takes(run):
    settings, _, _, _, metrics = run
    summary = evaluation.write_summary(settings, metrics, "tiny data")
    stored = json.loads((settings.run / "evaluation" / "summary.json").read_text())
    assert stored["headline"] == summary["headline"] and len(stored["headline"]) == 4
    assert "tiny data: federated (seed 0) reaches a mean AUROC of 0." in stored["headline"][0]
    assert stored["fingerprint"] == "tiny" and stored["settings"]["threads"] == 1
    assert "models/federated-s0.safetensors" in stored["sha256"]
    assert "evaluation/predictions.csv.gz" in stored["sha256"]
    assert {"torch", "device", "cores"} <= stored["environment"].keys()


def test_tabulate_says_what_is_not_defined(run):
    metrics = run[-1]
    one = metrics[metrics["arm"] == "federated"].copy()
    one.loc[one["finding"].isin(["Hernia", "Mass"]), ["value", "ci_low", "ci_high"]] = np.nan
    one.loc[one["finding"] == "Hernia", "positives"] = 0
    one.loc[one["finding"] == "Mass", ["positives", "n"]] = 0
    table = evaluation.tabulate(one)
    assert table.loc["Hernia", "auroc"] == "not defined (0 positives)"
    assert table.loc["Mass", "auroc"] == "not labelled"
    assert list(table.index) == [*FINDINGS, "mean"]


def test_other_data_are_refused_by_name(run):
    settings = run[0]
    evaluation.check_fingerprint(settings, read_report(settings.prepared))
    with pytest.raises(
        InputError, match=r"run run was trained on data tiny.*run notebook 02 again"
    ):
        evaluation.check_fingerprint(settings, {"fingerprint": "other"})


def test_clients_of_films_come_from_the_runs_own_table(run):
    settings, films, _, _, _ = run
    clients = films.index[["patient_id", "client", "split"]].drop_duplicates()
    clients.to_csv(settings.run / "clients.csv", index=False)
    assert (
        evaluation.read_films(settings).index["client"].tolist() == films.index["client"].tolist()
    )


@pytest.fixture
def finished(run, tmp_path):
    """A copy of the run with its work folder, to damage."""
    settings, films, _, _, metrics = run
    clients = films.index[["patient_id", "client", "split"]].drop_duplicates()
    clients.to_csv(settings.run / "clients.csv", index=False)
    evaluation.write_summary(settings, metrics, "tiny data")
    shutil.copytree(settings.work_dir, tmp_path / "work")
    return tmp_path / "work" / "runs" / "run"


def test_verify_finds_nothing_wrong_with_a_whole_run(finished):
    assert evaluation.verify_run(finished) == []
    assert main(["verify", str(finished)]) == 0


def test_verify_names_what_was_changed(finished, capsys):
    metrics = pd.read_csv(finished / "evaluation/metrics.csv")
    metrics.loc[0, "value"] += 0.01
    metrics.to_csv(finished / "evaluation/metrics.csv", index=False)
    (finished / "models/local-s0-client-1.safetensors").unlink()
    model = finished / "models/federated-s0.safetensors"
    state = load_file(model)
    state["fc.bias"][0] += 1
    save_file(state, model)
    wrong = "\n".join(evaluation.verify_run(finished))
    assert "local-s0-client-1.safetensors is missing" in wrong
    assert "federated-s0.safetensors has changed" in wrong
    assert "federated-s0.safetensors is the state of no round" in wrong
    assert "metrics.csv says" in wrong and "'Atelectasis'" in wrong
    assert main(["verify", str(finished)]) == 1
    (finished.parent.parent / "prepared/report.json").write_text('{"fingerprint": "other"}')
    assert "holds other data" in evaluation.verify_run(finished)[-1]


def test_verify_wants_an_evaluated_run(tmp_path):
    assert main(["verify", str(tmp_path)]) == 2


def test_too_few_films_for_an_interval_are_said_so(run):
    one = run[-1].head(1).assign(value=0.5, ci_low=np.nan, ci_high=np.nan, finding="mean")
    assert "0.500 (no interval: too few films)" in evaluation.headline(one, "tiny")[0]


def test_verify_checks_what_was_written_after_the_summary_too(finished):
    settings = evaluation.read_run(str(finished.parent.parent), finished.name, "cpu")
    (finished / "MODEL_CARD.md").write_text("a card")
    evaluation.record_files(settings, "MODEL_CARD.md", "evaluation/pointing.csv")
    assert evaluation.verify_run(finished) == []  # what is not there is not recorded
    (finished / "MODEL_CARD.md").write_text("a nicer card")
    assert evaluation.verify_run(finished) == ["MODEL_CARD.md has changed"]
