"""The phantom has NIH's layout and quirks, enough of each finding, and signs where boxes say."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_settings

from fedutils.base.errors import InputError
from fedutils.base.findings import findings_of
from fedutils.dataset import ChestXrayDataset, read_index
from fedutils.evidence.metrics import evaluate_models
from fedutils.evidence.predict import predict_films
from fedutils.evidence.tables import tabulate
from fedutils.films.decode import decode_films, write_index
from fedutils.films.partition import partition_patients
from fedutils.films.phantom.cases import FINDINGS, NIH_SHARE, SCANNERS, Film, phantom_table
from fedutils.films.phantom.signs import draw_film
from fedutils.films.phantom.write import BOXED, draw_batch, write_phantom
from fedutils.films.prepared import check_prepared, prepared_with
from fedutils.films.sources import open_data
from fedutils.films.split import split_patients
from fedutils.training.training import Training

SMALL = {"patients": 60, "size": 96, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("small") / "phantom", **SMALL)


@pytest.fixture(scope="module")
def table():
    return phantom_table()


def positives(table):
    words = table["Finding Labels"].str.split("|")
    return pd.DataFrame([[name in said for name in FINDINGS] for said in words], columns=FINDINGS)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(folder, split):
    return (folder / f"{split}_list.txt").read_text().split()


def test_same_arguments_give_the_same_bytes_on_one_core_or_many(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert contents(write_phantom(tmp_path / "again", **SMALL)) == contents(folder)


def test_another_seed_gives_other_films():
    film = Film(1, findings=("Mass",))
    assert not np.array_equal(draw_film(film, 96, seed=0)[0], draw_film(film, 96, seed=1)[0])


def test_layout_is_that_of_nih(folder):
    names_in_table = pd.read_csv(folder / "Data_Entry_2017.csv", index_col=False)["Image Index"]
    images = sorted(folder.glob("images_00[12]/images/*.png"))
    assert [path.name for path in images] == list(names_in_table)
    assert sorted(names(folder, "train_val") + names(folder, "test")) == sorted(names_in_table)
    assert {path.parts[-3] for path in images} == {"images_001", "images_002"}
    assert Image.open(images[0]).size == (96, 96)


def test_tables_carry_the_quirks_of_nih(folder):
    header, *rows = (folder / "Data_Entry_2017.csv").read_text().splitlines()
    assert header == (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
        "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    )
    assert all(row.endswith(",") and row.count(",") == 11 for row in rows)
    assert not (folder / "test_list.txt").read_text().endswith("\n")
    boxes = (folder / "BBox_List_2017.csv").read_text()
    assert boxes.startswith("Image Index,Finding Label,Bbox [x,y,w,h],,,\n")
    assert ",Infiltrate," in boxes and ",Infiltration," not in boxes


def test_some_films_are_rgba_and_the_rest_grey(folder):
    modes = {Image.open(path).mode for path in folder.glob("images_*/images/*.png")}
    assert modes == {"L", "RGBA"}


def test_boxes_mark_test_films_of_the_boxed_findings_only(folder):
    boxes = pd.read_csv(folder / "BBox_List_2017.csv", usecols=[0, 1])
    assert set(boxes.iloc[:, 0]) <= set(names(folder, "test"))
    assert set(boxes.iloc[:, 1].replace("Infiltrate", "Infiltration")) == set(BOXED)


def test_no_patient_is_in_both_lists(folder):
    patients = [{name[:8] for name in names(folder, split)} for split in ("train_val", "test")]
    assert patients[0].isdisjoint(patients[1])


def test_a_small_phantom_has_every_finding_in_train_and_test():
    table = phantom_table(patients=60, seed=3)
    assert (positives(table).groupby(table["split"]).sum() > 0).all(axis=None)


@pytest.mark.parametrize("seed", range(3))
def test_prevalence_follows_the_order_of_nih(seed):
    counts = positives(phantom_table(seed=seed)).sum()
    counts = counts[sorted(FINDINGS, key=NIH_SHARE.get, reverse=True)]
    assert counts.is_monotonic_decreasing and counts.is_unique


def test_each_finding_has_40_positive_test_patients(table):
    test = (table["split"] == "test").to_numpy()
    patients = positives(table)[test].groupby(table["Patient ID"][test]).max()
    assert patients.sum().min() >= 40


def test_no_finding_is_the_most_frequent_label(table):
    assert table["Finding Labels"].value_counts().index[0] == "No Finding"


def test_few_patients_have_many_films(table):
    films = table.groupby("Patient ID").size()
    assert films.median() == 1 and films.max() >= 10


def test_scanners_differ_in_case_mix(table):
    edema = positives(table)["Edema"].groupby(table["scanner"]).mean()
    portable = (table["View Position"] == "AP").groupby(table["scanner"]).mean()
    assert len(edema) == len(SCANNERS)
    assert edema[1] > 3 * edema[0] and portable[2] > 3 * portable[0]


def test_findings_occur_together_as_in_the_chest(table):
    labels = positives(table)
    assert (
        labels["Emphysema"][labels["Pneumothorax"] == 1].mean() > 1.5 * labels["Emphysema"].mean()
    )
    assert labels["Effusion"][labels["Cardiomegaly"] == 1].mean() > labels["Effusion"].mean()


@pytest.mark.parametrize("finding", FINDINGS)
def test_each_finding_changes_the_film(finding):
    change = difference(finding, patient=7)
    assert change.max() > 20 and (change > 5).mean() > 0.002


@pytest.mark.parametrize("finding", BOXED)
def test_the_box_lies_in_the_film_and_holds_the_sign(finding):
    for patient in range(1, 6):
        _, boxes = draw_film(Film(patient, findings=(finding,)), size=128)
        x, y, width, height = map(int, boxes[finding])
        assert x >= 0 and y >= 0 and x + width <= 128 and y + height <= 128
        change = difference(finding, patient)
        inside = change[y : y + height, x : x + width]
        assert inside.sum() > 0.6 * change.sum()
        assert inside.mean() > 3 * (change.sum() - inside.sum()) / (change.size - inside.size)


def difference(finding, patient):
    films = [draw_film(Film(patient, findings=f), size=128)[0] for f in ((), (finding,))]
    return np.abs(films[1].astype(int) - films[0])


def test_every_film_says_phantom_in_a_corner():
    for scanner in range(len(SCANNERS)):
        corner = draw_film(Film(1, scanner=scanner), size=256)[0][4:20, 5:80]
        assert (corner > 200).mean() > 0.05


def test_a_batch_repeats_and_holds_no_film_of_the_phantom():
    batch = draw_batch(4, size=64, seed=5)
    assert batch.shape == (4, 64, 64) and batch.dtype == np.uint8
    assert np.array_equal(batch, draw_batch(4, size=64, seed=5))
    own = draw_film(Film(1, scanner=int(phantom_table(20, 5)["scanner"][0])), 64, seed=5)[0]
    assert not any(np.array_equal(film, own) for film in batch)


def test_a_finished_phantom_is_left_alone(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_phantom(folder, **SMALL) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("manifest", ['{"finished": false}', '{"finis'])
def test_a_half_written_or_different_phantom_is_replaced(tmp_path, manifest):
    folder = tmp_path / "phantom"
    folder.mkdir()
    (folder / "PHANTOM.json").write_text(manifest)
    (folder / "images_009").mkdir()
    write_phantom(folder, patients=20, size=64)
    assert not (folder / "images_009").exists()
    assert json.loads((folder / "PHANTOM.json").read_text())["finished"]
    assert [path.name for path in tmp_path.iterdir()] == ["phantom"]


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="holds files but no phantom"):
        write_phantom(tmp_path, patients=20, size=64)
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize("arguments", [{"patients": 19}, {"patients": 20, "size": 63}])
def test_a_phantom_too_small_to_be_one_is_refused(tmp_path, arguments):
    with pytest.raises(InputError, match="at least"):
        write_phantom(tmp_path / "phantom", **arguments)


def test_fewer_findings_are_a_smaller_head_and_smaller_tables(tmp_path):
    folder = write_phantom(tmp_path / "phantom", 60, 64)
    settings = tiny_settings(tmp_path / "work", findings="Mass,Effusion", rounds=1, num_clients=2)
    data = open_data(str(folder), settings.work_dir, settings.findings)
    assert findings_of(data.table) == ["Effusion", "Mass"]  # the data's order
    assert set(data.boxes["finding"]) == {"Effusion", "Mass"}
    table = data.table.assign(split=split_patients(data.table, 0))
    films = decode_films(table, data.folder, settings.prepared, 32)
    about = data.about() | prepared_with(settings)
    report = write_index(table, films, data.boxes, settings.prepared, about)
    assert report["outputs"] == ["Effusion", "Mass"]
    index = read_index(settings.prepared)
    check_prepared(settings, report, index)
    with pytest.raises(InputError, match=r"findings='': .* prepared with 'Mass,Effusion'"):
        check_prepared(dataclasses.replace(settings, findings=""), report, index)
    clients = partition_patients(index, "dirichlet", 2, 0.5, 0)
    index["client"] = index["patient_id"].map(clients.set_index("patient_id")["client"])
    films = ChestXrayDataset(settings.prepared, index)
    settings.run.mkdir(parents=True)
    Training(settings, films).train()
    head = load_file(settings.run / "global_model.safetensors")["fc.bias"]
    assert head.shape == (2,)
    result = evaluate_models(predict_films(settings, films, "test"), films, 0, 20)
    assert set(result.metrics["finding"]) == {"Effusion", "Mass", "mean"}
    assert list(tabulate(result.metrics).index[1:]) == ["Effusion", "Mass"]
