"""Several folders as several hospitals: no patient in two, each with findings of its own."""

import shutil

import numpy as np
import pandas as pd
import pytest
from ownfilms import write_films

from fedutils.__main__ import build_parser, read_values
from fedutils.base.errors import InputError
from fedutils.base.findings import findings_of, spelled_twice
from fedutils.batch.run import identify
from fedutils.films.check import check_table
from fedutils.films.decode import decode_films, write_index
from fedutils.films.mapping import presets
from fedutils.films.partition import partition_patients
from fedutils.films.read import read_folder
from fedutils.films.sources import compare_sources, open_data, split_folders
from fedutils.films.split import split_patients
from fedutils.run import read_films
from fedutils.settings import read_parameters
from fedutils.training.training import Training


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of the same ids: `north` looks for all six findings, `south` for two of them."""
    work = tmp_path_factory.mktemp("sources")
    north, south = write_films(work / "north"), write_films(work / "south", patients=30)
    mapping = (south / "films.toml").read_text()
    for line in mapping.splitlines():
        if line.startswith(("Effusion", "Pneumothorax", "Edema", "Infiltration")):
            mapping = mapping.replace(line + "\n", "")
    (south / "films.toml").write_text(mapping + 'Fracture = "Effusion"\n')
    return north, south


def both(folders):
    return ";".join(map(str, folders))


def test_each_folder_is_a_source_and_no_patient_is_in_two(folders, tmp_path):
    table = open_data(both(folders), tmp_path).table
    alone = [open_data(str(folder), tmp_path).table for folder in folders]
    assert len(table) == sum(map(len, alone)) and table["image_index"].is_unique
    sources = table.groupby("patient_id")["source"].nunique()
    assert (sources == 1).all() and set(table["source"]) == {"north", "south"}
    assert set(alone[0]["patient_id"]) & set(alone[1]["patient_id"])  # the ids were the same
    assert findings_of(table) == [*findings_of(alone[0]), "Fracture"]
    south = table[table["source"] == "south"]
    assert south[["Effusion", "Edema"]].isna().all(axis=None) and south["Fracture"].notna().any()


def test_a_hospital_splits_its_patients_as_it_does_alone(folders, tmp_path):
    table = open_data(both(folders), tmp_path).table
    split = split_patients(table, 0)
    for folder in folders:
        alone = open_data(str(folder), tmp_path).table
        here = split[(table["source"] == folder.name).to_numpy()].to_numpy()
        assert (here == split_patients(alone, 0).to_numpy()).all()


def test_only_where_a_source_has_lists_can_a_row_be_in_none(folders, tmp_path):
    north = tmp_path / "listed"
    shutil.copytree(folders[0], north)
    names = open_data(str(north), tmp_path).table["image_index"]
    (north / "train_val_list.txt").write_text("\n".join(names[5:]))
    (north / "test_list.txt").write_text("\n".join(names[2:5]))
    data = open_data(both((north, folders[1])), tmp_path)
    row = check_table(data).set_index("check").loc["rows in no list"]
    assert row["count"] == 2 and all("listed" in name for name in row["examples"].split(", "))


def test_lists_are_kept_where_a_source_has_them(folders, tmp_path):
    north, south = (open_data(str(folder), tmp_path).table for folder in folders)
    table = pd.concat([
        north.assign(source="n", patient_id="n/" + north["patient_id"], official_split="train_val"),
        south.assign(source="s", patient_id="s/" + south["patient_id"]),
    ], ignore_index=True)  # fmt: skip
    split = split_patients(table, 0)
    assert set(split[table["source"] == "n"]) == {"train", "val"}
    assert set(split[table["source"] == "s"]) == {"train", "val", "test"}


def test_sources_are_hospitals_and_are_laid_side_by_side(folders, tmp_path):
    table = open_data(both(folders), tmp_path).table
    table = table.assign(split=split_patients(table, 0))
    clients = partition_patients(table, "source", 4, 0.5, 0)
    assert set(clients["client"]) == {"north", "south"}
    assert (clients["patient_id"].str.partition("/")[0] == clients["client"]).all()
    report = compare_sources(table)
    assert report["films"].tolist() == [80, 60] and report["patients"].tolist() == [40, 30]
    assert np.isnan(report.loc["south", "Effusion"]) and np.isnan(report.loc["north", "Fracture"])
    for other in ("iid", "scanner"):
        assert len(set(partition_patients(table, other, 2, 0.5, 0)["client"])) == 2
    with pytest.raises(InputError, match="give --data for each"):
        partition_patients(table.assign(source=""), "source", 4, 0.5, 0)


def test_data_may_be_given_several_times(folders, tmp_path, monkeypatch):
    monkeypatch.delenv("NIH_DATA_DIR", raising=False)
    north, south = map(str, folders)
    options = build_parser().parse_args(["run", "--data", north, "--data", south])
    values = read_values(options) | {"work_dir": str(tmp_path), "profile": "demo"}
    settings = read_parameters(values)
    assert settings.data_dir == both(folders)
    assert settings.identity()["data_dir"] == "north;south"
    with pytest.raises(InputError, match="names a folder twice"):
        read_parameters(values | {"data_dir": f"{north};{north}/"})
    with pytest.raises(InputError, match="num_clients=3 means nothing with partition='source'"):
        read_parameters(values | {"partition": "source", "num_clients": 3})
    before = identify(folders, tmp_path)
    (folders[1] / "more.txt").write_text("")
    assert identify(folders, tmp_path) != before


def test_a_folder_may_have_a_semicolon_in_its_path(tmp_path, monkeypatch):
    monkeypatch.delenv("NIH_DATA_DIR", raising=False)
    one = write_films(tmp_path / "a;b" / "c;d", patients=4)
    two = write_films(tmp_path / "e", patients=4)
    assert split_folders(f"{one};{two};") == split_folders(f" {one} ; {two}") == [one, two]
    assert split_folders(f"{two};{one}") == [two, one] and split_folders(" ; ") == []
    assert set(open_data(f"{one};{two}", tmp_path).table["source"]) == {"c-d", "e"}
    settings = read_parameters({"data_dir": str(one), "work_dir": str(tmp_path)})
    assert settings.data_dir == str(one) and settings.identity()["data_dir"] == "c;d"


def test_what_is_wrong_with_several_folders_is_said_of_all(tmp_path, monkeypatch):
    monkeypatch.delenv("NIH_DATA_DIR", raising=False)
    wrong = [write_films(tmp_path / name, patients=2) for name in ("one", "two")]
    for folder in wrong:
        (folder / "table.csv").write_text("File;Patient")
    with pytest.raises(InputError, match=r"one/table\.csv: .*; and .*two/table\.csv: has no rows"):
        open_data(";".join(map(str, wrong)), tmp_path)
    with pytest.raises(InputError, match=r"folder .*x cannot be read.*; and .*folder .*y cannot"):
        read_parameters({"data_dir": f"{tmp_path}/x;{tmp_path}/y", "work_dir": str(tmp_path)})


def test_a_folder_that_is_given_again_by_a_link_is_refused(folders, tmp_path, monkeypatch):
    monkeypatch.delenv("NIH_DATA_DIR", raising=False)
    link, inner = tmp_path / "link", tmp_path / "inner"
    link.symlink_to(folders[0])
    said = r"the film .*0\.PNG is in both north and link, maybe by a link; give each folder once"
    with pytest.raises(InputError, match=said):
        open_data(both((folders[0], link)), tmp_path)
    with pytest.raises(InputError, match="names a folder twice, maybe by a link"):
        read_parameters({"data_dir": both((folders[0], link)), "work_dir": str(tmp_path)})
    shutil.copytree(folders[1], inner / "below")  # one whose table names the films of another
    shutil.copy(inner / "below/films.toml", inner)
    table = (inner / "below/table.csv").read_text().replace("pictures/", "below/pictures/")
    (inner / "table.csv").write_text(table)
    mapping = (inner / "films.toml").read_text()
    (inner / "films.toml").write_text(f"depth = 4\n{mapping}")
    with pytest.raises(InputError, match=r"0\.PNG is in both inner and below"):
        open_data(both((inner, inner / "below")), tmp_path)


def test_a_folder_that_lies_in_another_by_a_link_is_refused(folders, tmp_path):
    """As the page on adjudicated labels has it: a link to the films beside another table."""
    around = tmp_path / "around"
    around.mkdir()
    (around / "north").symlink_to(folders[0])
    table = (folders[0] / "table.csv").read_text().replace("pictures/", "north/pictures/")
    (around / "table.csv").write_text(table)
    mapping = (folders[0] / "films.toml").read_text()
    (around / "films.toml").write_text(f"depth = 4\n{mapping}")
    with pytest.raises(InputError, match=r"0\.PNG is in both north and around, maybe by a link"):
        open_data(both((folders[0], around)), tmp_path)


def test_ids_that_two_sources_have_are_counted(folders, tmp_path):
    """Read as two patients: nobody knows whether they are one."""
    south = tmp_path / "other"
    shutil.copytree(folders[1], south)
    table = (south / "table.csv").read_text()
    ids = open_data(str(folders[0]), tmp_path).table["patient_id"]
    theirs = read_folder(south).table["patient_id"]
    (south / "table.csv").write_text(table.replace(theirs[0], ids[0].lower()))
    data = open_data(both((folders[0], south)), tmp_path)
    counted = check_table(data).set_index("check").loc["ids in two sources"]
    expected = {*ids.str.lower()} & {*read_folder(south).table["patient_id"].str.lower()}
    assert counted["count"] == len(expected) and ids[0].lower() in expected


@pytest.mark.parametrize("other", ["edema", "EDEMA", "E_dema", "E-dema"])
def test_a_finding_of_two_sources_in_two_spellings_is_named(folders, tmp_path, other):
    south = tmp_path / "south"
    shutil.copytree(folders[1], south)
    mapping = (south / "films.toml").read_text().replace("Fracture =", f'"{other}" =')
    (south / "films.toml").write_text(mapping)
    said = (
        f"'Edema' of .*north and '{other}' of .*south are one finding; for the second "
        r'write `Edema = "Effusion"` under `\[findings\]` in .*south/films\.toml, and nothing for'
    )
    with pytest.raises(InputError, match=said):
        open_data(both((folders[0], south)), tmp_path)


def test_presets_spell_a_finding_alike():
    names = [name for preset in presets().values() for name in preset.findings]
    assert spelled_twice(names) == []
    assert spelled_twice(["Mass", "Pleural Effusion", "pleural_effusion"])[0] == "Pleural Effusion"


def test_a_source_without_films_is_refused(folders, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in folders[0].glob("*.*"):
        (empty / path.name).write_bytes(path.read_bytes())
    with pytest.raises(
        InputError, match="empty: none of the 80 films of the table is there; it holds no"
    ):
        open_data(both([folders[1], empty]), tmp_path)


def test_hospitals_with_findings_of_their_own_train_one_model(folders, tmp_path):
    settings = read_parameters({
        "data_dir": both(folders), "work_dir": str(tmp_path), "profile": "demo", "image_size": 32,
        "partition": "source", "rounds": 1, "tracked": "fc", "weights": "none", "name": "run",
    })  # fmt: skip
    data = open_data(settings.data_dir, settings.work_dir)
    table = data.table.assign(split=split_patients(data.table, 0))
    films = decode_films(table, data.folder, settings.prepared, 32)
    about = data.about() | {"image_size": 32}
    report = write_index(table, films, data.boxes, settings.prepared, about)
    assert report["films"] == 140 and not report["quarantined"]
    clients = partition_patients(table, "source", 2, 0.5, 0)
    settings.run.mkdir(parents=True)
    clients.to_csv(settings.run / "clients.csv", index=False)
    history = Training(settings, read_films(settings)).train()
    assert history["client"].tolist() == ["north", "south", ""]
    assert (history["status"] == "ok").all()
    assert report["release"] == "own"
    alone = {folder.name: open_data(str(folder), tmp_path).table for folder in folders}
    assert report["declared"] == {name: findings_of(table) for name, table in alone.items()}
