"""What the films on hand show to be impossible is said in a line before anything starts."""

import os

import pandas as pd
import pytest
from ownfilms import write_films
from tiny import tiny_films, tiny_settings
from torch import save
from torchvision.models import resnet34

from fedutils.base.errors import InputError
from fedutils.batch.early import check_early
from fedutils.batch.notebook import NOTEBOOKS
from fedutils.batch.run import identify
from fedutils.evidence.tables import read_budget
from fedutils.films.partition import partition_patients
from fedutils.films.prepared import check_prepared, prepared_with
from fedutils.settings import read_parameters
from fedutils.training.identity import open_run
from fedutils.training.training import Training


def settings_of(folder, work, **changes):
    values = {"data_dir": str(folder), "work_dir": str(work), "profile": "demo", "image_size": 32}
    return read_parameters(values | {"num_clients": 2, "weights": "none"} | changes)


@pytest.fixture
def folder(tmp_path):
    return write_films(tmp_path / "own")


def test_what_is_possible_passes(tmp_path, folder):
    check_early([settings_of(folder, tmp_path / "work")], NOTEBOOKS)


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("seed", 7),
        ("max_films", 10),
        ("twins", "drop"),
        ("suspects", "drop"),
        ("image_size", 64),
        ("data_dir", "other"),
    ],
)
def test_films_that_were_prepared_otherwise_are_refused_by_name(tmp_path, folder, name, used):
    settings = settings_of(folder, tmp_path)
    index = pd.DataFrame({"split": ["train", "val", "test"], "patient_id": ["1", "2", "3"]})
    report = prepared_with(settings)
    check_prepared(settings, report, index)
    with pytest.raises(InputError, match=f"{name}=.*was prepared with {used!r}"):
        check_prepared(settings, report | {name: used}, index)


@pytest.mark.parametrize("empty", ["train", "val", "test"])
def test_a_split_without_films_is_refused(tmp_path, folder, empty):
    settings = settings_of(folder, tmp_path)
    index = pd.DataFrame({"split": ["train", "val", "test"], "patient_id": ["1", "2", "3"]})
    with pytest.raises(InputError, match=f"falls to {empty}"):
        check_prepared(settings, prepared_with(settings), index[index["split"] != empty])


def test_a_name_that_a_run_of_other_parameters_has_is_refused_at_once(tmp_path, folder):
    work = tmp_path / "work"
    open_run(settings_of(folder, work, name="A", seed=7), "FedAvg", "data")
    check_early([settings_of(folder, work, name="A", seed=7)], NOTEBOOKS)
    other = settings_of(folder, work, name="A")
    check_early([other], NOTEBOOKS[:2])  # which a run's name says nothing about
    with pytest.raises(InputError, match="is a run with seed=7, not 0: choose another name"):
        check_early([other], NOTEBOOKS)


def test_weights_of_other_content_are_another_run_under_a_name_too(tmp_path, folder):
    def given():
        return settings_of(folder, tmp_path / "work", name="A", weights=str(tmp_path / "w.pth"))

    save(resnet34().state_dict(), tmp_path / "w.pth")
    open_run(given(), "FedAvg", "data")
    check_early([given()], NOTEBOOKS)
    save(resnet34().state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="is a run with weights_sha256="):
        check_early([given()], NOTEBOOKS)


def test_a_total_is_kept_before_the_start_and_the_same_model_costs_nothing_more(tmp_path):
    films = tiny_films(tmp_path)
    private = {"dp": "patient", "batchnorm": "frozen", "noise_multiplier": 2.0, "delta": 1e-3}
    how = private | {"num_clients": 3, "rounds": 1, "seed": 0}
    placed = partition_patients(films.index, "iid", 3, 0.5, 0).set_index("patient_id")["client"]
    films.index["client"] = films.index["patient_id"].map(placed)
    Training(tiny_settings(tmp_path, name="first", **how), films).train()
    spent = read_budget(tmp_path / "runs/first")["total_epsilon"].max()
    limit = how | {"total_epsilon": 1.05 * spent, "name": "second"}
    check_early([tiny_settings(tmp_path, **limit)], NOTEBOOKS[2:3])
    with pytest.raises(
        InputError, match=r"this run would take the patients .* beyond total_epsilon"
    ):
        check_early([tiny_settings(tmp_path, **limit | {"seeds": "1"})], NOTEBOOKS[2:3])


def test_our_own_output_in_the_data_folder_is_no_input_and_a_film_come_again_is(folder):
    work = folder / "work"
    before = identify([folder], work)
    for name in ("prepared/images.npy", "runs/a/config.json", "notebooks/a/01_explore.ipynb"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("ours")
    assert identify([folder], work) == before
    film = next(path for path in folder.rglob("*.jpg") if "work" not in path.parts)
    about = film.stat()
    os.utime(film, ns=(about.st_atime_ns, about.st_mtime_ns + 10**9))  # of equal size
    assert identify([folder], work) != before
