"""What the films on hand show to be impossible is said in a line before anything starts."""

import os

import pandas as pd
import pytest
from ownfilms import write_films

from fedutils.__main__ import main
from fedutils.base.errors import InputError
from fedutils.batch import run as batch
from fedutils.batch.early import check_early
from fedutils.batch.notebook import NOTEBOOKS
from fedutils.batch.run import identify
from fedutils.films.prepared import check_prepared, prepared_with
from fedutils.settings import read_parameters


def settings_of(folder, work, **changes):
    values = {"data_dir": str(folder), "work_dir": str(work), "profile": "demo", "image_size": 32}
    return read_parameters(values | {"num_clients": 2, "weights": "none"} | changes)


@pytest.fixture
def folder(tmp_path):
    return write_films(tmp_path / "own")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"num_clients": 500}, "num_clients|clients"), ({"batch_size": 1}, "batch_size=1"),
     ({"max_films": 4}, "max_films")],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_the_first_notebook(
    tmp_path, folder, monkeypatch, capsys, changes, said
):
    started = []
    monkeypatch.setattr(batch, "execute", lambda *about: started.append(about))
    with pytest.raises(InputError, match=said):
        check_early([settings_of(folder, tmp_path / "work", **changes)], NOTEBOOKS)
    given = [f"-p{name}={value}" for name, value in changes.items()]
    given += ["-pimage_size=32", "--profile", "demo", "-pweights=none"]
    place = ["--data", str(folder), "--work", str(tmp_path / "work")]
    assert main(["run", *place, *given]) == 2 and not started
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_partition_by_scanner_wants_a_scanner_in_the_table(tmp_path, folder):
    mapping = folder / "films.toml"
    lines = [line for line in mapping.read_text().splitlines() if not line.startswith("scanner")]
    mapping.write_text("\n".join(lines) + "\n")
    settings = settings_of(folder, tmp_path / "work", partition="scanner")
    with pytest.raises(InputError, match="partition='scanner'"):
        check_early([settings], NOTEBOOKS)


def test_weights_of_another_network_are_refused_before_the_first_notebook(tmp_path, folder):
    import torch

    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "other.pth")
    settings = settings_of(folder, tmp_path / "work", weights=str(tmp_path / "other.pth"))
    with pytest.raises(InputError, match="no ResNet-34"):
        check_early([settings], NOTEBOOKS)


def test_what_is_possible_passes(tmp_path, folder):
    check_early([settings_of(folder, tmp_path / "work")], NOTEBOOKS)


@pytest.mark.parametrize(
    ("name", "used"),
    [("seed", 7), ("max_films", 10), ("twins", "drop"), ("image_size", 64), ("data_dir", "other")],
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


def test_our_own_output_in_the_data_folder_is_no_input_and_a_film_come_again_is(folder):
    work = folder / "work"
    before = identify(folder, work)
    for name in ("prepared/images.npy", "runs/a/config.json", "notebooks/a/01_explore.ipynb"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("ours")
    assert identify(folder, work) == before
    film = next(path for path in folder.rglob("*.jpg") if "work" not in path.parts)
    about = film.stat()
    os.utime(film, ns=(about.st_atime_ns, about.st_mtime_ns + 10**9))  # of equal size
    assert identify(folder, work) != before
