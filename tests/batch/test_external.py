"""A finished run's models on films of another folder: other findings, patients and formats."""

import json
import os
import re
import shutil

import numpy as np
import ownfilms
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from tiny import tiny_films, tiny_settings

from fedutils.__main__ import main
from fedutils.dataset import read_index
from fedutils.evidence.bootstrap import bootstrap, patient_resamples
from fedutils.evidence.cuts import operating_points
from fedutils.evidence.external import lay_beside, read_external
from fedutils.evidence.metrics import evaluate_models
from fedutils.evidence.predict import (
    list_films,
    predict_files,
    predict_films,
    read_predictions,
    write_predictions,
)
from fedutils.evidence.summary import write_summary
from fedutils.evidence.tables import read_table
from fedutils.training.training import Training

SHARED = ["Effusion", "Cardiomegaly", "Pneumothorax", "Edema", "Mass", "Infiltration"]


@pytest.fixture(scope="module", params=["average", "local"])
def run(tmp_path_factory, request):
    """A run, of one that shares each model's BatchNorm and one that does not, evaluated."""
    work = tmp_path_factory.mktemp("work")
    settings = tiny_settings(work, arms="federated,local", rounds=1, batchnorm=request.param)
    films = tiny_films(work, films=300)
    report = {"outputs": films.findings, "release": "tiny", "source": "Tiny", "labels_by": "Drawn."}
    report |= {"fingerprint": "tiny"}
    (settings.prepared / "report.json").write_text(json.dumps(report))
    Training(settings, films).train()
    clients = films.index[["patient_id", "client", "split"]].drop_duplicates()
    clients.to_csv(settings.run / "clients.csv", index=False)
    place = settings.run / "evaluation"
    write_predictions(predict_films(settings, films, "val"), place / "validation.csv.gz")
    path = place / "predictions.csv.gz"
    predictions = write_predictions(predict_films(settings, films, "test"), path)
    write_summary(settings, evaluate_models(predictions, films, 0, repeats=20), "tiny")
    return settings, films


def told(capsys):
    return capsys.readouterr().err.strip()


def test_a_run_is_tested_on_another_folder_and_laid_beside_its_own_films(run, tmp_path, capsys):
    settings, films = run
    folder = ownfilms.write_films(tmp_path / "elsewhere")
    shutil.copy(folder / "pictures/P-00/0.PNG", folder / "pictures/P-01/0.jpg")  # 64 pixels
    one = films.index.query("split == 'train'").iloc[0]  # a film of training, under another id
    stored = Image.fromarray(films.store[one["row"]])
    stored.save(folder / "pictures/P-03/0.PNG", format="PNG")
    (folder / "pictures/P-03/1.jpg").write_bytes(b"no picture")
    assert main(["test", str(settings.run), "--data", str(folder)]) == 0
    said, place = capsys.readouterr().out, settings.run / "external" / "elsewhere"
    predictions = read_predictions(place / "predictions.csv.gz")
    assert list(predictions)[4:] == films.findings
    assert set(predictions["arm"] + predictions["client"].fillna("")) == {
        "federated", "localclient-1", "localclient-2", "localclient-3",
    }  # fmt: skip
    index = read_index(place).set_index("image_index")
    assert len(index) == 79 and (index["split"] == "test").all()
    assert (
        index.drop(columns=SHARED)[[n for n in films.findings if n not in SHARED]]
        .isna()
        .all(axis=None)
    )
    summary = json.loads((place / "summary.json").read_text())
    assert sorted(summary["shared"]) == sorted(SHARED)
    assert [one["image_index"], "pictures/P-03/0.PNG"] in summary["near_equal"]
    assert "6 findings are shared" in said and "); its data do not know Atelectasis" in said
    assert "near-equal films" in said

    metrics = read_table(place / "metrics.csv")
    federated = predictions[predictions["arm"] == "federated"].set_index("image_index")
    for name in SHARED:
        known = index[index[name].notna()]
        value = roc_auc_score(known[name], federated.loc[known.index, name])
        row = metrics.query("arm == 'federated' and seed == '' and test_set == 'all'")
        row = row[(row["finding"] == name) & (row["metric"] == "auroc")]
        assert np.isclose(row["value"].item(), value)
    beside = read_table(place / "external.csv")
    row = beside.query("arm == 'federated' and finding == 'Effusion'").iloc[0]
    assert np.isclose(row["difference"], row["external"] - row["internal"])
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert set(beside["arm"]) == {"federated", "local"} and "mean" in set(beside["finding"])
    assert f"{row['external']:.3f} ({row['external_low']:.3f} to" in str(
        read_external(settings)[1].values
    )
    assert read_external(settings)[0] == [said.strip()]

    points = read_table(place / "operating_points.csv")  # cuts of the run's own validation films
    seen = read_predictions(settings.run / "evaluation" / "validation.csv.gz")
    chosen = operating_points(seen, seen, films.index)
    by = ["arm", "client", "finding", "rule"]
    cuts = points.set_index(by)["threshold"], chosen.set_index(by)["threshold"]
    pd.testing.assert_series_equal(*cuts)
    one = points.query("arm == 'federated' and finding == 'Effusion' and rule == 'Youden'").iloc[0]
    ill = index.index[index["Effusion"] == 1]
    found = (federated.loc[ill, "Effusion"] >= one["threshold"]).mean()
    assert np.isclose(one["sensitivity"], found)
    controls = read_table(place / "controls.csv").set_index("finding")
    assert controls.loc[SHARED, "attributes"].between(0, 1).all()

    if settings.batchnorm == "local":
        return  # what follows is the same

    first = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
    assert {
        "auroc.png", "roc.png", "precision_recall.png", "calibration.png", "subgroups.png"
    } < set(first)  # fmt: skip
    assert main(["test", str(settings.run), "--data", str(folder)]) == 0
    assert {p.name: p.read_bytes() for p in place.iterdir() if p.is_file()} == first

    shutil.copytree(folder, tmp_path / "again" / "elsewhere")  # another folder of that name
    assert main(["test", str(settings.run), "--data", str(tmp_path / "again/elsewhere")]) == 0
    assert {p.name: p.read_bytes() for p in place.iterdir() if p.is_file()} == first
    assert (place.with_name("elsewhere~2") / "external.csv").is_file()
    assert len(read_external(settings)[0]) == 2
    shutil.rmtree(place.with_name("elsewhere~2"))


def test_what_cannot_be_tested_is_said_in_one_line(run, tmp_path, capsys):
    settings, _ = run
    other = ownfilms.write_films(tmp_path / "other", patients=4)
    mapping = (other / "films.toml").read_text()
    head, _, _ = mapping.partition("[findings]")
    (other / "films.toml").write_text(f'{head}[findings]\n"Bone age" = "Effusion"\n')
    for command, message in (
        (
            [str(settings.run), "--data", str(other)],
            "its data know Bone age.* no finding is shared",
        ),
        ([str(settings.run), "--data", str(tmp_path / "none")], "none cannot be read"),
        ([str(tmp_path), "--data", str(other)], "expected a run"),
    ):
        assert main(["test", *command]) == 2
        err = told(capsys)
        assert "\n" not in err
        assert pd.Series(err).str.contains(message).all(), err
    (other / "films.toml").write_text(f'{head}[findings]\nMass = "Lump"\neffusion = "Effusion"\n')
    assert main(["test", str(settings.run), "--data", str(other)]) == 2
    assert "'effusion' is the 'Effusion' of run" in told(capsys)
    wrong, fit = ["--data", str(other), "--data", str(tmp_path / "none")], tmp_path / "fit"
    ownfilms.write_films(fit, patients=4)
    assert main(["test", str(settings.run), *wrong, "--data", str(fit)]) == 2
    err = told(capsys)  # all that is wrong, before what is not wrong is tested
    assert re.search(
        r"other: 'effusion' is the 'Effusion' of run .*; and .*none cannot be read", err
    )
    assert 'write `Effusion = "Effusion"` under `[findings]` in' in err and "\n" not in err
    assert not (settings.run / "external/fit").exists()
    assert main(["predict", str(settings.run), str(fit), *(str(tmp_path / n) for n in "xy")]) == 2
    assert re.search(r"/x: is not there; give .*; and .*/y: is not there; give", told(capsys))
    copy = tmp_path / "work/runs/run"
    shutil.copytree(settings.run, copy)
    (copy / "models/federated-s0.safetensors").unlink()
    assert main(["test", str(copy), "--data", str(other)]) == 2
    assert "no model federated-s0" in told(capsys)
    (copy / "evaluation/summary.json").unlink()
    assert main(["test", str(copy), "--data", str(other)]) == 2
    assert "run notebook 04_evaluate" in told(capsys)


def side(films, seed, gain):
    """Predictions of one model and the index of its films, two of each patient."""
    rng = np.random.default_rng(seed)
    index = pd.DataFrame({"image_index": [f"{seed}-{k:05d}" for k in range(films)]})
    index["patient_id"] = [f"{k // 2}" for k in range(films)]
    index["Mass"] = (rng.random(films) < 0.3).astype(float)
    index["Edema"] = np.where(np.arange(films) < 8, index["Mass"], 0)
    names = {"arm": "federated", "seed": 0, "client": "", "image_index": index["image_index"]}
    scores = {name: gain * index[name] + rng.normal(size=films) for name in ("Mass", "Edema")}
    return pd.DataFrame(names | scores), index


def test_the_interval_of_the_difference_is_that_of_independent_draws_subtracted():
    sides = [side(800, 0, 1.5), side(600, 1, 0.8)]
    table = lay_beside(sides, seed=0).set_index("finding")
    assert list(table.index) == ["Mass", "mean"]  # too few patients have the other
    draws = []
    for number, (predictions, index) in enumerate(sides):
        resamples = patient_resamples(index["patient_id"].to_numpy(), 2000, seed=number)
        truth, scores = index["Mass"].to_numpy(), predictions["Mass"].to_numpy()
        draws.append(bootstrap(truth, scores, resamples, wanted=["auroc"])[0])
    gap = draws[1] - draws[0]
    row = table.loc["Mass"]
    assert np.isclose(row["difference"], gap[0])
    low, high = np.percentile(gap[1:], [2.5, 97.5])
    assert np.allclose([row["difference_low"], row["difference_high"]], [low, high], atol=0.01)
    assert lay_beside([side(20, 0, 1), side(20, 1, 1)], seed=0).empty


def test_predict_gives_a_row_a_film_of_the_main_model_with_cuts_of_validation(
    run, tmp_path, capsys, monkeypatch
):
    settings, films = run
    folder, index = settings.run / "evaluation", films.index
    seen = read_predictions(folder / "predictions.csv.gz")
    validation = write_predictions(predict_films(settings, films, "val"), folder / "v.csv.gz")
    points = operating_points(validation, seen, index)
    points.loc[points["finding"] == "Hernia", "threshold"] = np.nan
    points.to_csv(folder / "operating_points.csv", index=False)
    mine = seen[seen["arm"] == "federated"].head(20).set_index("image_index")
    for name in mine.index:
        pixels = films.store[index.set_index("image_index").loc[name, "row"]]
        (tmp_path / "films/inner").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "films/inner" / name)
    (tmp_path / "films/broken.png").write_bytes(b"no picture")
    (tmp_path / "films/notes.txt").write_text("no film")
    out, command = tmp_path / "out.csv", ["predict", str(settings.run), str(tmp_path / "films")]
    assert main([*command, "--out", str(out), "--cut", "youden"]) == 0
    table = pd.read_csv(out)
    assert list(table)[: 2 + len(films.findings)] == ["path", "problem", *films.findings]
    assert table["path"][0].endswith("broken.png") and "cannot identify" in table["problem"][0]
    assert table.iloc[0, 2:].isna().all() and table["problem"][1:].isna().all()
    read = table[1:].set_index(table["path"][1:].str.rpartition("/")[2]).loc[mine.index]
    cuts = points[(points["arm"] == "federated") & (points["rule"] == "Youden")].set_index(
        "finding"
    )
    if settings.batchnorm != "local":  # else hospitals judge their own films
        assert np.allclose(read[films.findings], mine[films.findings], rtol=1e-5)
    for name in films.findings:
        expected = (read[name] >= cuts.loc[name, "threshold"]).astype(float)
        expected = expected if name != "Hernia" else expected * np.nan
        assert read[f"{name} (Youden)"].equals(expected.rename(f"{name} (Youden)"))
    capsys.readouterr()
    assert main([*command, str(tmp_path / "films/broken.png")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == ",".join(["path", "problem", *films.findings])
    with monkeypatch.context() as early:  # before any film is looked at
        early.setattr("fedutils.evidence.predict.decode_films", None)
        for place in (tmp_path / "none/out.csv", tmp_path):
            assert main([*command, "--out", str(place)]) == 2
            assert f"{place}: cannot be written; give a file in a folder" in told(capsys)
    (tmp_path / "no").mkdir()
    (tmp_path / "no/notes.txt").touch()
    for path, message in (
        ("none.png", "/none.png: is not there; give films (.png, .jpg"),
        ("no", "/no: none of its 1 files is a film; give films (.png, .jpg"),
        ("films/broken.png", "none of 1 films can be read, such as films/broken.png: Unidentified"),
    ):
        monkeypatch.chdir(tmp_path)
        assert main(["predict", str(settings.run), path]) == 2
        assert message in told(capsys)
    monkeypatch.chdir(tmp_path / "no")
    assert main(["predict", str(settings.run), "."]) == 2
    assert f"{tmp_path}/no: none of its 1 files is a film" in told(capsys)


def test_films_are_found_as_archives_and_hospitals_name_them(tmp_path):
    """DICOM without an ending, behind links too; no index of a disk, and nothing that macOS adds."""
    dicom = bytes(128) + b"DICM"
    films = {"a.PNG": b"", "disk/IM0001": dicom, "disk/1.2.840.113619.2.5": dicom,
             "disk/old": b"\x08\0\x05\0"}  # fmt: skip
    others = {"._a.png": b"", "__MACOSX/._a.png": b"", "__MACOSX/b.png": b"", ".Trash/c.png": b"",
              "DICOMDIR": dicom, "README": b"no film", "notes.txt": b"", "disk/empty": b""}  # fmt: skip
    for name, content in (films | others).items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    os.mkfifo(tmp_path / "in/pipe")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/link").symlink_to(tmp_path / "in")
    for folder in (tmp_path / "in", tmp_path / "out/link", tmp_path / "out"):
        here = folder if folder.name != "out" else folder / "link"
        assert set(list_films([folder, folder])) == {f"{here}/{name}" for name in films}
    film, around = tmp_path / "in/a.PNG", tmp_path / "in/../in"
    same = [film, around / "a.PNG", tmp_path / "out/link/a.PNG", around]
    assert set(list_films(same)) == {f"{film}", *(f"{around}/{n}" for n in films if n != "a.PNG")}
    assert list_films([tmp_path / "in/README"]) == [f"{tmp_path}/in/README"]  # as it was asked for


def test_a_film_has_the_pixels_of_the_store_whatever_its_format(run, tmp_path):
    settings, _ = run
    folder = ownfilms.write_films(tmp_path / "pixels", patients=4)
    assert main(["test", str(settings.run), "--data", str(folder)]) == 0
    stored = read_predictions(settings.run / "external/pixels/predictions.csv.gz")
    stored = stored[stored["arm"] == "federated"].set_index("image_index")
    table = predict_files(settings, [folder]).set_index("path")
    table.index = [path.removeprefix(f"{folder}/") for path in table.index]
    names = [name for name in table if name in stored]
    assert len(names) == 14
    pd.testing.assert_frame_equal(table.loc[stored.index, names], stored[names], check_names=False)
