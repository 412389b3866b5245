"""What notebook 04 writes, and that it can be recomputed from the files alone."""

import dataclasses
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score, roc_auc_score
from tiny import tiny_films, tiny_settings

from fedutils.__main__ import main
from fedutils.base.errors import InputError
from fedutils.batch.trained import read_run
from fedutils.dataset import read_report
from fedutils.evidence.calibration import calibrate
from fedutils.evidence.compare import compare_runs
from fedutils.evidence.cuts import operating_points
from fedutils.evidence.metrics import evaluate_models, test_groups
from fedutils.evidence.predict import (
    check_fingerprint,
    predict_films,
    read_predictions,
    write_predictions,
)
from fedutils.evidence.summary import record_files, verify_run, write_summary
from fedutils.evidence.tables import (
    hospitals,
    is_client,
    read_table,
    tabulate,
    tabulate_differences_text,
    tabulate_homes,
    training_cost,
    with_interval,
)
from fedutils.evidence.words import _hospitals_in_words, headline, too_small
from fedutils.films.phantom.cases import FINDINGS
from fedutils.run import read_films
from fedutils.settings import Settings
from fedutils.training.training import Training


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    settings = tiny_settings(work, arms="federated,local", rounds=1)
    films = tiny_films(work, films=120)
    Training(settings, films).train()
    clients = films.index[["patient_id", "client", "split"]].drop_duplicates()
    clients.to_csv(settings.run / "clients.csv", index=False)
    folder = settings.run / "evaluation"
    predicted = predict_films(settings, films, "test")
    read = write_predictions(predicted, folder / "predictions.csv.gz")
    result = evaluate_models(read, films, seed=0)
    return settings, films, predicted, read, result


MINED, DRAWN = "Labels were mined from reports by text.", "These films are drawn, not taken."


def invented(seeds=3, gain=1.0, films=240, clients=3):
    """Predictions of all arms on films of two each patient; federated sees more by `gain`."""
    rng = np.random.default_rng(0)
    truth = (rng.random((films, 14)) < 0.3).astype(int)
    truth[:, 13] = 0
    index = pd.DataFrame(truth, columns=FINDINGS).assign(
        image_index=[f"{k:06d}.png" for k in range(films)],
        patient_id=[str(k // 2) for k in range(films)],
        client=[f"client-{1 + k // 2 % clients}" for k in range(films)],
        sex=rng.choice(["F", "M", ""], films),
        view=rng.choice(["AP", "PA"], films),
        scanner="0.143",
        age=rng.integers(1, 90, films).astype(float),
    )
    names = [("federated", ""), ("centralised", "")]
    names += [("local", f"client-{1 + k}") for k in range(clients)]
    tables = []
    for seed, (arm, client) in itertools.product(range(seeds), names):
        sees = gain if arm == "federated" else 0.5
        logits = rng.normal(size=truth.shape) + sees * truth
        table = pd.DataFrame(1 / (1 + np.exp(-logits)), columns=FINDINGS)
        table.insert(0, "image_index", index["image_index"])
        for name, value in (("client", client), ("seed", seed), ("arm", arm)):
            table.insert(0, name, value)
        tables.append(table)
    return pd.concat(tables, ignore_index=True), SimpleNamespace(index=index)


@pytest.fixture(scope="module")
def three_arms():
    """All arms, three seeds, and a federated model that sees more."""
    return evaluate_models(*invented(), seed=0, repeats=200)


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
    write_predictions(predicted, tmp_path / "a.csv.gz")
    write_predictions(predicted, tmp_path / "b" / "a.csv.gz")
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b" / "a.csv.gz").read_bytes()


def test_metrics_equal_scikit_learns_on_the_written_file(run):
    settings, films, _, _, result = run
    table = pd.read_csv(settings.run / "evaluation" / "predictions.csv.gz", keep_default_na=False)
    truth = films.index.set_index("image_index")
    columns = (
        "arm,seed,client,test_set,finding,metric,value,ci_low,ci_high,n,positives,on_all_films"
    )
    assert ",".join(result.metrics.columns) == columns
    metrics = result.metrics[
        (result.metrics["test_set"] == "all") & (result.metrics["seed"] == "0")
    ]
    for (arm, client), rows in table.groupby(["arm", "client"]):
        mine = metrics[(metrics["arm"] == arm) & (metrics["client"] == client)]
        value = mine.set_index(["finding", "metric"])["value"]
        for finding in FINDINGS:
            labels = truth.loc[rows["image_index"], finding]
            assert value[finding, "auroc"] == pytest.approx(roc_auc_score(labels, rows[finding]))
            precision = average_precision_score(labels, rows[finding])
            assert value[finding, "average_precision"] == pytest.approx(precision)


def value(table, **names):
    """The one value of a table's row that has these names."""
    for name, wanted in names.items():
        table = table[table[name] == wanted]
    return table["value"].item()


def test_means_over_seeds_and_over_local_models_are_rows_of_their_own(three_arms):
    metrics = three_arms.metrics.query("test_set == 'all' and finding == 'Mass'")
    metrics = metrics[metrics["metric"] == "auroc"]
    local = metrics[
        (metrics["arm"] == "local") & (metrics["client"] != "") & (metrics["seed"] != "")
    ]
    assert len(local) == 9
    assert value(metrics, arm="local", client="", seed="") == pytest.approx(local["value"].mean())
    second = local[local["seed"] == "1"]["value"].mean()
    assert value(metrics, arm="local", client="", seed="1") == pytest.approx(second)


def test_differences_are_differences_of_the_values_and_paired(three_arms):
    rows = three_arms.differences.query("test_set == 'all' and metric == 'auroc'")
    assert set(rows["second"]) == {
        "centralised", "mean local model", "local client-1", "local client-2", "local client-3",
    }  # fmt: skip
    metrics = three_arms.metrics.query("test_set == 'all' and metric == 'auroc' and seed == ''")
    for second, arm, client in (
        ("centralised", "centralised", ""),
        ("mean local model", "local", ""),
        ("local client-2", "local", "client-2"),
    ):
        expected = value(metrics, arm="federated", finding="mean")
        expected -= value(metrics, arm=arm, client=client, finding="mean")
        assert value(rows, second=second, finding="mean") == pytest.approx(expected)
    mean = rows[rows["finding"] == "mean"]
    assert (mean["verdict"] == "shown").all() and (mean["seeds"] == 3).all()
    assert (mean["seed_low"] <= mean["value"]).all() and (mean["value"] <= mean["seed_high"]).all()


def test_equal_models_differ_by_exactly_nothing():
    predictions, films = invented(seeds=2)
    federated = predictions[predictions["arm"] == "federated"]
    twice = pd.concat([federated, federated.assign(arm="centralised")])
    rows = evaluate_models(twice, films, seed=0, repeats=50).differences
    known = rows[~rows["verdict"].isin(["not defined", "too few patients"])]
    assert len(known) and (known["value"] == 0).all()
    assert (known["ci_low"] <= 0).all() and (known["ci_high"] >= 0).all()
    assert set(known["verdict"]) == {"no difference shown"}


def test_every_model_is_judged_on_every_clients_films(three_arms):
    on_clients = three_arms.metrics[three_arms.metrics["test_set"].map(is_client)]
    mean = on_clients.query("finding == 'mean' and seed == ''")
    assert len(mean) == (2 + 3 + 1) * 3  # two arms, three local models and their mean
    assert len(hospitals(three_arms.metrics, "federated")) == 3
    films = invented()[1].index
    sizes = films["client"].value_counts()
    assert (mean["n"] == mean["test_set"].map(sizes)).all()
    one = films[films["client"] == "client-2"]
    rows = invented()[0].query("arm == 'local' and client == 'client-1' and seed == 0")
    rows = rows.set_index("image_index").loc[one["image_index"]]
    mine = on_clients.query("arm == 'local' and client == 'client-1' and test_set == 'client-2'")
    found = value(mine[mine["seed"] == "0"], finding="Edema")
    assert found == pytest.approx(roc_auc_score(one["Edema"], rows["Edema"]))


def test_a_local_model_is_judged_at_home_and_on_the_films_of_all_others(three_arms):
    films = invented()[1].index
    others = films[films["client"] != "client-2"]
    rows = invented()[0].query("arm == 'local' and client == 'client-2' and seed == 0")
    rows = rows.set_index("image_index").loc[others["image_index"]]
    mine = three_arms.metrics.query("arm == 'local' and client == 'client-2' and seed == '0'")
    found = value(mine[mine["test_set"] == "outside=client-2"], finding="Edema")
    assert found == pytest.approx(roc_auc_score(others["Edema"], rows["Edema"]))
    homes = tabulate_homes(three_arms).set_index("hospital")
    assert list(homes.index) == ["client-1", "client-2", "client-3"]
    gain = three_arms.differences.query("second == 'local client-2' and test_set == 'client-2'")
    gain = gain.query("finding == 'mean' and metric == 'auroc'").iloc[0]
    assert homes.loc["client-2", "gain at home"].startswith(f"{gain['value']:+.3f}")
    assert homes.loc["client-2", "verdict"] == gain["verdict"]
    wide = [float(homes.loc["client-2", f"{who}, at home"][:5]) for who in ("federated", "local")]
    assert wide[0] - wide[1] == pytest.approx(gain["value"], abs=0.0011)
    assert homes["local, outside"].str.len().min() > 5
    assert tabulate_homes(three_arms._replace(differences=three_arms.differences[:0])).empty


def test_subgroups_are_named_and_the_unknown_are_in_none(three_arms):
    films = invented()[1].index
    groups = test_groups(films)
    assert list(groups["sex"]) == ["sex=F", "sex=M"]
    assert sum(groups["sex"].values()).sum() == (films["sex"] != "").sum()
    assert sum(groups["age"].values()).max() == 1 and sum(groups["age"].values()).sum() == 240
    rows = three_arms.metrics.query("finding == 'mean' and arm == 'federated' and seed == ''")
    assert set(rows["test_set"]) >= {"sex=F", "age=60+", "view=AP", "scanner=0.143"}
    assert set(rows.query("test_set == 'sex=F'")["metric"]) == {"auroc"}


def test_one_film_a_patient_is_the_first_by_name(three_arms):
    films = invented()[1].index.set_index("image_index")
    (mask,) = test_groups(films)["sensitivity"].values()
    assert list(films.index[mask]) == [f"{k:06d}.png" for k in range(0, 240, 2)]
    shuffled = films.sample(frac=1, random_state=0)
    (mask,) = test_groups(shuffled)["sensitivity"].values()
    assert sorted(shuffled.index[mask]) == [f"{k:06d}.png" for k in range(0, 240, 2)]


def test_the_primary_mean_is_over_findings_with_ten_positive_patients(three_arms):
    assert three_arms.mean_over == [*FINDINGS[:13]]
    mean = three_arms.metrics.query("finding == 'mean' and test_set == 'all'")
    assert (mean["positives"] == 13).all()


def test_the_worst_hospital_is_named_only_where_it_stands_out(three_arms):
    means = three_arms.metrics.copy()
    row = (means["test_set"] == "client-2") & (means["finding"] == "mean")
    means.loc[row, ["value", "ci_low", "ci_high"]] = 0.5, 0.45, 0.55
    said = "\n".join(headline(three_arms._replace(metrics=means), "2017 data", MINED))
    assert "the federated model is worst on the films of client-2: mean AUROC 0.500" in said


def test_with_one_seed_words_say_what_is_missing():
    said = "\n".join(
        headline(evaluate_models(*invented(seeds=1), seed=0, repeats=50), "own", MINED)
    )
    assert "with one training seed. Another may turn it around" in said
    assert "shown to be" not in said


def test_a_test_set_that_is_too_small_says_which_size_would_do():
    predictions, films = invented()
    chosen = films.index["patient_id"].isin(films.index["patient_id"].unique()[:12])
    few = SimpleNamespace(index=films.index[chosen])
    kept = predictions[predictions["image_index"].isin(few.index["image_index"])]
    result = evaluate_models(kept, few, seed=0, repeats=50)
    assert result.mean_over == [] and too_small(result, few.index).startswith("The test set is too")
    assert "test patients would do" in too_small(result, few.index)
    assert set(result.differences["verdict"]) <= {"too few patients", "not defined"}
    said = "\n".join(headline(result, "own data", MINED))
    assert "has no mean AUROC: too few test patients" in said and "shown" not in said


def test_a_part_with_too_few_patients_has_no_mean():
    predictions, films = invented(seeds=1)
    films.index.loc[films.index["patient_id"].astype(int) < 6, "scanner"] = "0.199"
    rows = evaluate_models(predictions, films, seed=0, repeats=50).metrics
    means = rows.query("finding == 'mean' and metric == 'auroc' and arm == 'federated'")
    means = means[means["seed"] == ""].set_index("test_set")
    assert means.loc["scanner=0.143", "value"] > 0.5
    few = means.loc["scanner=0.199"]
    assert few[["value", "ci_low", "on_all_films"]].isna().all() and few["positives"] == 0


def test_a_subgroup_stands_beside_the_same_findings_on_all_films(three_arms):
    rows = three_arms.metrics.query("metric == 'auroc' and seed == '' and arm == 'federated'")
    mean = rows[(rows["test_set"] == "sex=F") & (rows["finding"] == "mean")].iloc[0]
    chosen = evaluable_of(three_arms, "sex=F")
    whole = rows[(rows["test_set"] == "all") & rows["finding"].isin(chosen)]
    assert len(whole) == mean["positives"]
    assert mean["on_all_films"] == pytest.approx(whole["value"].mean())


def evaluable_of(result, test_set):
    """The findings of a family's mean: those with an interval in each of its groups."""
    family = test_set.partition("=")[0] + "="
    rows = result.metrics.query("metric == 'auroc' and seed == '' and arm == 'federated'")
    rows = rows[rows["test_set"].str.startswith(family) & (rows["finding"] != "mean")]
    known = rows.groupby("finding")["ci_low"].apply(lambda ends: ends.notna().all())
    return set(known[known].index)


def test_words_say_who_wins_and_what_is_undecided(three_arms):
    said = "\n".join(headline(three_arms, "2017 data", MINED))
    assert "federated is shown to be above the centralised model in mean AUROC: +0." in said
    assert "federated is shown to be above the mean local model in mean AUROC: +0." in said
    assert "shown to be above 3 and below 0 of 3 local models" in said
    assert "mean of 3 seeds" in said and "no hospital stands out: mean AUROC 0." in said
    assert "leaves out Hernia" in said and "mined from reports by text" in said
    even = evaluate_models(*invented(gain=0.5), seed=0, repeats=200)
    said = "\n".join(headline(even, "phantom data", DRAWN))
    assert "federated is not shown to differ from the centralised model" in said
    assert "drawn, not taken" in said and "mined" not in said
    worse = evaluate_models(*invented(gain=0.0), seed=0, repeats=200)
    said = "\n".join(headline(worse, "phantom data", DRAWN))
    assert "federated is shown to be below the centralised model in mean AUROC: -0." in said


@pytest.mark.parametrize("arm", ["federated", "local", "centralised"])
def test_words_and_tables_are_true_of_one_arm_alone(arm):
    predictions, films = invented(seeds=1)
    result = evaluate_models(predictions[predictions["arm"] == arm], films, 0, 50)
    assert result.differences.empty
    said = "\n".join(headline(result, "2017 data", MINED))
    assert f"only one arm was trained ({arm})" in said and "one training seed" in said
    assert len(tabulate_differences_text(result.differences)) == 0
    assert list(tabulate(result.metrics).index) == ["mean of 13", *FINDINGS]


def test_words_survive_a_test_set_on_which_nothing_is_defined():
    predictions, films = invented(seeds=1)
    films.index[list(FINDINGS)] = 0
    result = evaluate_models(predictions, films, 0, 50)
    said = "\n".join(headline(result, "2017 data", MINED))
    assert "federated against the centralised model: not defined" in said and "nan" not in said


def test_summary_tells_what_repeating_takes(run):
    settings, _, _, _, result = run
    summary = write_summary(settings, result, "tiny data")
    stored = json.loads((settings.run / "evaluation" / "summary.json").read_text())
    assert stored["headline"] == summary["headline"]
    assert "tiny data: federated reaches a mean AUROC of 0." in stored["headline"][0]
    assert stored["mean_over"] == result.mean_over
    assert stored["fingerprint"] == "tiny" and stored["settings"]["threads"] == 1
    assert "models/federated-s0.safetensors" in stored["sha256"]
    assert "evaluation/predictions.csv.gz" in stored["sha256"]
    for about in (stored["trained"][0], stored["evaluated"]):
        assert {"at", "torch", "device", "cores", "machine", "git_revision"} <= about.keys()
    assert stored["adopted"] == {} and "starts" not in stored["settings"]
    assert {"code", "dtype", "torch", "weights_sha256"} <= stored["settings"].keys()


def test_tables_are_read_back_as_they_were_written(run):
    settings, _, _, _, result = run
    write_summary(settings, result, "tiny data")
    for name in ("metrics", "differences"):
        table = read_table(settings.run / "evaluation" / f"{name}.csv")
        pd.testing.assert_frame_equal(table, getattr(result, name), check_dtype=False)


def test_tabulate_has_a_column_an_arm_and_says_what_is_not_defined(three_arms):
    table = tabulate(three_arms.metrics)
    arms = ["federated", "centralised", "mean local model"]
    assert list(table.columns) == [
        f"{m}, {a}" for m in ("AUROC", "average precision") for a in arms
    ]
    assert list(table.index) == ["mean of 13", *FINDINGS]
    assert set(table.loc["Hernia"]) == {"no film shows it"}
    metrics = three_arms.metrics.copy()
    metrics.loc[metrics["finding"] == "Hernia", "n"] = 0
    assert set(tabulate(metrics).loc["Hernia"]) == {"not labelled"}


def test_cost_sums_films_and_bytes_and_averages_local_models():
    rows = [
        ["federated", 0, 1, "", 100, 4e9, 6e9, 0.6, "ok"],
        ["federated", 0, 2, "", 100, 4e9, 6e9, 0.7, "ok"],
        ["federated", 0, 1, "a", 60, 2e9, 3e9, np.nan, "ok"],
        ["federated", 0, 1, "b", 40, 2e9, 3e9, np.nan, "unmeasured"],
        ["federated", 0, 2, "c", 0, 0, 0, np.nan, "joined"],
        ["federated", 0, 2, "a", np.nan, 2e9, 3e9, np.nan, "ok"],  # masked
        ["federated", 0, 2, "b", np.nan, 2e9, 3e9, np.nan, "ok"],
        ["federated", 0, 3, "a", np.nan, 2e9, 3e9, np.nan, "ok"],  # of a round that failed
        ["local", 0, 1, "a", 60, 0, 0, 0.5, "ok"], ["local", 0, 1, "b", 40, 0, 0, 0.7, "ok"],
    ]  # fmt: skip
    names = ["arm", "seed", "round", "client", "examples", "bytes_up", "bytes_down", "val_auroc"]
    history = pd.DataFrame(rows, columns=[*names, "status"])
    cost = training_cost(history, Settings(local_epochs=2, batch_size=32), clients=2)
    assert cost["films_seen"].tolist() == [200, 400, 200]
    steps = Settings(local_steps=10, batch_size=32)  # 2 batches of 30 and of 20 a pass, or of 25
    steps = training_cost(history, steps, clients=2)["films_seen"].tolist()
    assert steps == [300 + 200, 500 + 2 * 250, 300 + 200]
    alone = pd.DataFrame([["centralised", 0, 1, "", 100, 0, 0, 0.5, "ok"]], columns=history.columns)
    steps = Settings(local_steps=10, batch_size=32)  # ten for each client, in batches of 25
    assert training_cost(alone, steps, clients=2)["films_seen"].tolist() == [2 * 250]
    assert cost["gigabytes"].tolist() == [10, 20, 0]
    assert cost["val_auroc"].tolist() == pytest.approx([0.6, 0.7, 0.6])


def test_other_data_are_refused_by_name(run):
    settings = run[0]
    check_fingerprint(settings, read_report(settings.prepared))
    with pytest.raises(
        InputError, match=r"run run was trained on data tiny.*run notebook 02 again"
    ):
        check_fingerprint(settings, {"fingerprint": "other"})


def test_clients_of_films_come_from_the_runs_own_table(run):
    settings, films, _, _, _ = run
    read = read_films(settings).index
    assert read["client"].tolist() == films.index["client"].tolist()


@pytest.fixture
def finished(run, tmp_path):
    """A copy of the run with its work folder, to damage."""
    settings, _, _, _, result = run
    write_summary(settings, result, "tiny data")
    shutil.copytree(settings.work_dir, tmp_path / "work")
    return tmp_path / "work" / "runs" / "run"


def settings_of(run):
    return read_run(str(run.parents[1]), run.name, "cpu")


def test_runs_are_compared_on_the_same_patients(finished):
    shutil.copytree(finished, finished.with_name("other"))
    path = finished.with_name("other") / "evaluation" / "predictions.csv.gz"
    table = read_predictions(path)
    table[list(FINDINGS)] = 1 - table[list(FINDINGS)]
    write_predictions(table, path)
    runs = [read_run(str(finished.parents[1]), name) for name in ("run", "other")]
    both = compare_runs(runs, repeats=50)
    assert list(both.metrics["run"].unique()) == ["run", "other"]
    assert set(both.metrics["arm"]) == {"federated", "local"}
    mean = both.metrics.query("arm == 'federated' and metric == 'auroc' and finding == 'mean'")
    assert mean["value"].sum() == pytest.approx(1)
    rows = both.differences
    assert set(rows["first"]) == {"run"} and set(rows["second"]) == {"other"}
    difference = value(rows, metric="auroc", finding="mean")
    assert difference == pytest.approx(mean["value"].iloc[0] - mean["value"].iloc[1])
    assert len(tabulate_differences_text(rows)) == 1


def test_runs_on_other_data_or_not_evaluated_are_refused_by_name(finished):
    other = finished.with_name("other")
    shutil.copytree(finished, other)
    runs = [read_run(str(finished.parents[1]), name) for name in ("run", "other")]
    summary = other / "evaluation" / "summary.json"
    summary.write_text(summary.read_text().replace('"tiny"', '"another"'))
    with pytest.raises(InputError, match=r"run and other do not compare.*tiny and another"):
        compare_runs(runs)
    summary.unlink()
    with pytest.raises(InputError, match=r"run notebook 04_evaluate on other first"):
        compare_runs(runs)


def test_verify_finds_nothing_wrong_with_a_whole_run(finished):
    assert verify_run(settings_of(finished)) == []
    assert main(["verify", str(finished)]) == 0


def test_verify_names_what_was_changed(finished, capsys):
    metrics = pd.read_csv(finished / "evaluation/metrics.csv")
    metrics.loc[0, "value"] += 0.01
    metrics.to_csv(finished / "evaluation/metrics.csv", index=False)
    differences = pd.read_csv(finished / "evaluation/differences.csv")
    differences.loc[differences["second"] == "local client-2", "value"] -= 0.01
    differences.loc[differences["second"] == "mean local model", "verdict"] = "shown"
    differences.to_csv(finished / "evaluation/differences.csv", index=False)
    (finished / "models/local-s0-client-1.safetensors").unlink()
    model = finished / "models/federated-s0.safetensors"
    state = load_file(model)
    state["fc.bias"][0] += 1
    save_file(state, model)
    wrong = "\n".join(verify_run(settings_of(finished)))
    assert "local-s0-client-1.safetensors is missing" in wrong
    assert "federated-s0.safetensors has changed" in wrong
    assert "federated-s0.safetensors is the state of no round" in wrong
    assert "metrics.csv says" in wrong and "'Atelectasis'" in wrong
    assert "differences.csv says" in wrong and "'local client-2'" in wrong
    assert "'shown'] for ['federated', 'mean local model', 'all', 'Mass', 'auroc']" in wrong
    assert main(["verify", str(finished)]) == 1
    (finished.parent.parent / "prepared/report.json").write_text('{"fingerprint": "other"}')
    assert "holds other data" in verify_run(settings_of(finished))[-1]


def test_verify_wants_an_evaluated_run(tmp_path):
    assert main(["verify", str(tmp_path)]) == 2


def test_too_few_films_for_an_interval_are_said_so():
    row = SimpleNamespace(value=0.5, ci_low=np.nan, ci_high=np.nan)
    assert with_interval(row) == "0.500 (no interval: too few patients)"


def test_verify_checks_what_was_written_after_the_summary_too(finished):
    settings = settings_of(finished)
    (finished / "MODEL_CARD.md").write_text("a card")
    record_files(settings, "MODEL_CARD.md", "evaluation/pointing.csv")
    assert verify_run(settings_of(finished)) == []  # what is not there is not recorded
    (finished / "MODEL_CARD.md").write_text("a nicer card")
    assert verify_run(settings_of(finished)) == ["MODEL_CARD.md has changed"]


def test_among_many_equal_hospitals_none_is_called_worst():
    """With 20 of them the extremes lie apart by chance; it was 12 of 30 before."""
    named = 0
    for run in range(30):
        rng = np.random.default_rng(run)
        values = 0.8 + 0.02 * rng.standard_normal(20)
        rows = pd.DataFrame(
            {"value": values, "ci_low": values - 0.0392, "ci_high": values + 0.0392}
        ).assign(on_all_films=0.8)
        rows = rows.assign(arm="federated", seed="", client="", finding="mean", metric="auroc",
                           test_set=[f"h{k}" for k in range(20)], positives=14, n=100)  # fmt: skip
        named += "worst" in _hospitals_in_words(rows)[0]
    assert named <= 3
    far = rows.assign(value=rows["value"].where(rows["test_set"] != "h3", 0.5))
    far.loc[far["test_set"] == "h3", ["ci_low", "ci_high"]] = [0.46, 0.54]
    assert "worst on the films of h3" in _hospitals_in_words(far)[0]


def test_what_a_hospital_was_not_taught_is_empty_and_in_no_mean():
    """Client 1 alone looks for Mass and Nodule, and for nothing else that the others know but Edema."""
    predictions, films = invented(films=600)
    first, own = films.index["client"] == "client-1", ["Mass", "Nodule", "Edema"]
    films.index = films.index.astype(dict.fromkeys(FINDINGS, float))
    films.index.loc[first, [name for name in FINDINGS if name not in own]] = np.nan
    films.index.loc[~first, ["Mass", "Nodule"]] = np.nan
    local = predictions["client"] == "client-1"
    predictions.loc[local, [name for name in FINDINGS if name not in own]] = np.nan
    predictions.loc[(predictions["arm"] == "local") & ~local, ["Mass", "Nodule"]] = np.nan
    result = evaluate_models(predictions, films, seed=0, repeats=50)
    rows = result.metrics.query("metric == 'auroc' and seed == '' and arm == 'local'")
    value = rows.set_index(["client", "test_set", "finding"])["value"]
    assert np.isnan(value["client-1", "all", "Effusion"]) and np.isnan(
        value["client-1", "all", "mean"]
    )
    assert value["", "all", "Mass"] == value["client-1", "all", "Mass"] > 0.5  # who knows it
    others = value["client-2", "all", "Effusion"], value["client-3", "all", "Effusion"]
    assert np.isclose(value["", "all", "Effusion"], np.mean(others))
    of_all = [value["", "all", name] for name in result.mean_over]
    assert len(of_all) == 13 and np.isclose(value["", "all", "mean"], np.mean(of_all))
    homes = tabulate_homes(result).set_index("hospital")
    assert homes["findings"].tolist() == [1, 11, 11]  # Edema alone can be laid beside the others
    assert np.isclose(value["client-1", "client-1", "mean"], value["client-1", "client-1", "Edema"])
    said = "\n".join(headline(result, "drawn", DRAWN))
    assert "look for different findings" in said and "over 1 at client-1" in said
    table = calibrate(predictions, films.index, 0, repeats=20)
    mine = table.query("client == 'client-1' and hospital == '' and finding == 'Effusion'")
    assert (mine["n"] == 0).all() and mine["brier"].isna().all()


def test_home_and_outside_are_over_the_same_findings_and_say_how_many():
    predictions, films = invented(films=240)
    small = films.index["client"] == "client-1"  # which has patients enough of few findings only
    films.index.loc[small, FINDINGS[3:]] = 0
    homes = tabulate_homes(evaluate_models(predictions, films, seed=0, repeats=50))
    assert homes["findings"].tolist() == [3, 3, 3]
    metrics = evaluate_models(predictions, films, seed=0, repeats=50).metrics
    rows = metrics[metrics["test_set"].str.startswith("outside=") & (metrics["finding"] == "mean")]
    assert set(rows["positives"]) == {3}


def test_the_size_that_would_do_is_that_of_a_finding_that_can_be_judged():
    _, films = invented(films=40)
    films.index[list(FINDINGS)] = 0
    films.index["Effusion"] = 1  # all films show it: no number would do
    films.index.loc[:11, "Mass"] = 1  # 6 of 20 patients
    empty = SimpleNamespace(mean_over=[])
    assert too_small(empty, films.index).endswith("About 34 test patients would do for Mass alone.")
    films.index["Mass"] = 0
    assert "more films of this kind would not help" in too_small(empty, films.index)


def test_a_model_that_predicts_a_film_twice_is_never_judged():
    predictions, films = invented(seeds=1)
    index = films.index.assign(split="test")
    twice = pd.concat([predictions, predictions[:1]])
    for judge in (
        lambda: evaluate_models(twice, films, seed=0, repeats=10),
        lambda: calibrate(twice, index, 0, 10),
        lambda: operating_points(predictions, twice, index),
        lambda: operating_points(twice, predictions, index),
    ):
        with pytest.raises(ValueError, match="has a film twice"):
            judge()


def test_where_nothing_is_defined_the_tables_say_so():
    predictions, films = invented(seeds=1)
    films.index.loc[films.index["client"] == "client-2", list(FINDINGS)] = np.nan
    result = evaluate_models(predictions, films, seed=0, repeats=50)
    said = tabulate_differences_text(result.differences).to_string()
    said += tabulate_homes(result).to_string()
    assert "not defined" in said and "+nan" not in said and " nan" not in said.lower()


def test_a_run_beside_itself_is_laid_once(run):
    settings = run[0]
    assert dataclasses.replace(settings, compare="A, A,,B ").compared == ["A", "B"]
