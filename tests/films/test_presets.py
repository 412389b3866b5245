"""Public data sets as they are downloaded: each is recognised, and its labels are those that
TorchXRayVision reads from the same tables, but where we differ on purpose."""

import dataclasses
import gzip
import re
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedutils.base.errors import InputError
from fedutils.base.findings import findings_of
from fedutils.films.check import check_table
from fedutils.films.find import find_data
from fedutils.films.mapping import PRESETS, presets
from fedutils.films.read import read_folder
from fedutils.films.split import split_patients

PADCHEST = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
GOOGLE = "google2019_nih-chest-xray-labels.csv.gz"
# Where we differ from TorchXRayVision on purpose: it looks for a finding's name anywhere in PadChest's
# words, and takes "unchanged", "exclude", "suboptimal study" and no word at all for the absence of all.
LEFT_OPEN = {"unchanged", "exclude", "suboptimal study", ""}
ON_PURPOSE = {
    "Effusion": {"pericardial effusion"},  # no pleural one
    "Infiltration": {"consolidation", "air bronchogram"},  # a finding of its own
    "Mass": {"mediastinal mass", "soft tissue mass", "breast mass", "pleural mass"},  # no lung's
    "Nodule": {"pseudonodule"},  # the word for what is none
    "Emphysema": {"subcutaneous emphysema"},  # air under the skin
}


@pytest.fixture(scope="module")
def oracle():
    """TorchXRayVision, with the whole tables in its package."""
    return pytest.importorskip("torchxrayvision", reason="the oracle torchxrayvision is missing")


def copy_table(folder, source, name):
    """A data folder with one table of the oracle's package, or of `tables/`."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".zip":
        zipfile.ZipFile(source).extract(name, folder)
    else:
        shutil.copy(source, folder / name)
    return folder


def tables_of(oracle):
    return Path(oracle.__file__).parent / "data"


def whole(preset):
    """A preset that keeps all rows, laterals too."""
    given = {key: value for key, value in presets()[preset].given.items() if key != "keep"}
    return dataclasses.replace(presets()[preset], given=given)


def differing(data, theirs, names, words=()):
    """The cells that differ from the oracle's labels: `image_index, finding, ours, theirs`."""
    expected = pd.DataFrame(theirs.labels, np.asarray(names), list(theirs.pathologies))
    assert expected.index.isin(data.table["image_index"]).all()
    ours = data.table.set_index("image_index").loc[expected.index]
    found = []
    for finding in findings_of(data.table):
        a, b = ours[finding].to_numpy(), expected[dict(words).get(finding, finding)].to_numpy()
        differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        rows = zip(expected.index[differ], a[differ], b[differ], strict=True)
        found += [(name, finding, x, y) for name, x, y in rows]
    return found


# --- label by label, on whole real tables


def test_no_cell_of_chexpert_differs(oracle, nih_test_data, tmp_path):
    source = nih_test_data / "tables/chexpert_train.csv.gz"
    folder = copy_table(tmp_path, source, "train.csv.gz")
    data = read_folder(folder, mapping=whole("chexpert"))
    theirs = oracle.datasets.CheX_Dataset(".", str(source), views=["*"], unique_patients=False)
    assert len(data.table) == len(theirs.labels) == 223_414
    names = theirs.csv["Path"].str.removeprefix("CheXpert-v1.0-small/")
    assert not differing(data, theirs, names)
    patients = dict(zip(names, "patient" + theirs.csv["patientid"], strict=True))
    assert (data.table["image_index"].map(patients) == data.table["patient_id"]).all()


def test_chexperts_rows_are_read_checked_and_split_in_20_times_what_pandas_takes(
    nih_test_data, tmp_path
):
    """Which is 5 s on two cores of 2.5 GHz; other machines, busy ones too, take their share."""
    folder = copy_table(tmp_path, nih_test_data / "tables/chexpert_train.csv.gz", "train.csv.gz")
    began = time.process_time()
    pd.read_csv(folder / "train.csv.gz", dtype=str)
    bare = time.process_time() - began
    began = time.process_time()
    data = read_folder(folder)
    checks = check_table(data).set_index("check")["count"]
    split_patients(data.table, 0)
    assert time.process_time() - began < 20 * bare
    assert data.release == "chexpert" and len(data.table) == 191_027
    assert checks["rows left out"] == 32_387 and set(data.table["view"]) >= {"PA", "AP"}


def test_no_cell_of_vinbigdata_differs(oracle, nih_test_data, tmp_path):
    source = nih_test_data / "tables/vinbigdata-train.csv.gz"
    data = read_folder(copy_table(tmp_path, source, "train.csv.gz"))
    theirs = oracle.datasets.VinDr_Dataset(".", str(source))
    words = {"Other lesion": "Other Lesion", "Fibrosis": "Pulmonary Fibrosis"}
    names = theirs.csv.reset_index()["image_id"] + ".dicom"
    assert data.release == "vinbigdata" and not differing(data, theirs, names, words)
    assert int(data.table[findings_of(data.table)].sum().sum()) == int(theirs.labels.sum()) > 15_000


def test_no_cell_of_rsna_siim_and_the_adjudicated_labels_differs(oracle, tmp_path):
    sets, tables = oracle.datasets, tables_of(oracle)
    source = tables / "kaggle_stage_2_train_labels.csv.zip"
    data = read_folder(copy_table(tmp_path / "r", source, "stage_2_train_labels.csv"))
    theirs = sets.RSNA_Pneumonia_Dataset(".", views=["*"])
    assert data.release == "rsna" and len(data.table) == len(theirs.labels) == 26_684
    assert not differing(data, theirs, theirs.csv["patientId"] + ".dcm")
    name = "siim-pneumothorax-train-rle.csv.gz"
    data = read_folder(copy_table(tmp_path / "s", tables / name, name))
    theirs = sets.SIIM_Pneumothorax_Dataset(str(tmp_path / "s"))
    assert data.release == "siim" and len(data.table) == theirs.csv["ImageId"].nunique()
    assert not differing(data, theirs, theirs.csv["ImageId"] + ".dcm")
    data = read_folder(copy_table(tmp_path / "g", tables / GOOGLE, GOOGLE))
    theirs = sets.NIH_Google_Dataset(".", views=["*"], unique_patients=False)
    assert data.release == "google2019" and len(data.table) == len(theirs.labels) == 4376
    assert not differing(data, theirs, theirs.csv["Image Index"])


def test_padchest_differs_where_it_is_meant_to_and_nowhere_else(oracle, tmp_path):
    data = read_folder(copy_table(tmp_path, tables_of(oracle) / PADCHEST, PADCHEST))
    theirs = oracle.datasets.PC_Dataset(".", views=["PA", "AP", "AP Supine"], unique_patients=False)
    texts = theirs.csv.set_index("ImageID")["Labels"]
    cells = differing(data, theirs, theirs.csv["ImageID"])
    assert len(theirs.labels) > 100_000 and 0 < len({name for name, *_ in cells}) < 16_000
    for name, finding, ours, _ in cells:
        words = {word.strip(" '") for word in texts[name].strip("[]").split(",")}
        if np.isnan(ours):
            assert words & LEFT_OPEN, (name, words)
        else:
            assert words & ON_PURPOSE.get(finding, set()), (name, finding, words)


# --- small tables in the exact form of the others


def test_mimic_joins_labels_and_splits_to_films_as_the_oracle_does(oracle, tmp_path):
    findings = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum",
                "Fracture", "Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion",
                "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices"]  # fmt: skip
    rng = np.random.default_rng(0)
    films, labels = [], []
    for k in range(60):
        subject, study = 10_000_032 + k // 2, 50_414_267 + k
        marks = rng.choice(["1.0", "0.0", "-1.0", ""], 14, p=[0.2, 0.2, 0.1, 0.5])
        marks[8] = ""
        if k % 7 == 0:
            marks[:], marks[8] = "", "1.0"
        labels.append([subject, study, *marks])
        films += [[f"{k:08x}-{n}", subject, study, view, 2500, 3056, 21_800_506]
                  for n, view in enumerate(["PA", "LATERAL"] if k % 2 else ["AP"])]  # fmt: skip
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns", "StudyDate"]
    meta, table = pd.DataFrame(films, columns=columns), pd.DataFrame(labels)
    table.columns = ["subject_id", "study_id", *findings]
    split = meta[columns[:3]].assign(
        split=np.array(["train", "validate", "test"])[(meta["subject_id"] % 3).to_numpy()]
    )
    parts = {"metadata": meta, "chexpert": table, "split": split}
    for name, part in parts.items():
        part.to_csv(tmp_path / f"mimic-cxr-2.0.0-{name}.csv.gz", index=False)
    film = tmp_path / "files/p10/p10000032/s50414267/00000000-0.jpg"
    film.parent.mkdir(parents=True)
    film.touch()
    data = read_folder(tmp_path)
    assert data.release == "mimic-cxr" and len(data.table) == 60 and data.films_present == 1
    assert set(data.table["official_split"]) == {"train", "val", "test"}
    files = [str(tmp_path / f"mimic-cxr-2.0.0-{name}.csv.gz") for name in ("chexpert", "metadata")]
    theirs = oracle.datasets.MIMIC_Dataset(".", *files, views=["PA", "AP"], unique_patients=False)
    cells = differing(data, theirs, theirs.csv["dicom_id"] + ".jpg")
    # On purpose: "No Finding" says nothing of devices, whose presence the oracle denies by it.
    assert {finding for _, finding, *_ in cells} == {"Support Devices"}
    clear = set(theirs.csv["dicom_id"][theirs.csv["No Finding"] == 1] + ".jpg")
    assert {name for name, *_ in cells} <= clear and all(cell[3] == 0 for cell in cells)
    split.loc[0, "dicom_id"] = split.loc[2, "dicom_id"]
    split.loc[0, ["subject_id", "study_id"]] = split.loc[2, ["subject_id", "study_id"]]
    split.to_csv(tmp_path / "mimic-cxr-2.0.0-split.csv.gz", index=False)
    with pytest.raises(InputError, match=r"split.csv.gz, line 4: a second row of .*; remove one"):
        read_folder(tmp_path)


VINDR = ["Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture",
         "Consolidation", "Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration",
         "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift", "Nodule/Mass",
         "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis",
         "Rib fracture", "Other lesion", "COPD", "Lung tumor", "Pneumonia", "Tuberculosis",
         "Other diseases", "No finding"]  # fmt: skip


def write_vindr(folder):
    """Three readers of two films, of whom 1, 2 and 3 see something; and a test film's consensus."""
    rows = [["a", f"R{k}", *([0] * 28)] for k in range(3)]
    rows += [["b", f"R{k}", *([0] * 28)] for k in range(3)]
    for reader, finding in ((0, 1), (0, 3), (1, 3), (0, 16), (1, 16), (2, 16)):
        rows[reader][2 + finding] = 1
    (folder / "annotations").mkdir(parents=True)
    train, test = folder / "annotations/image_labels_train.csv", [["c", *([0] * 28)]]
    pd.DataFrame(rows, columns=["image_id", "rad_id", *VINDR]).to_csv(train, index=False)
    columns = ["image_id", *VINDR]
    pd.DataFrame(test, columns=columns).to_csv(
        folder / "annotations/image_labels_test.csv", index=False
    )
    for film in ("train/a.dicom", "train/b.dicom", "test/c.dicom"):
        (folder / film).parent.mkdir(exist_ok=True)
        (folder / film).touch()
    return folder


@pytest.mark.parametrize(
    ("rule", "seen"), [("any", [1, 1, 1]), ("majority", [0, 1, 1]), ("all", [0, 0, 1])]
)
def test_readers_are_united_by_any_majority_or_all(tmp_path, rule, seen):
    folder = write_vindr(tmp_path)
    (folder / "films.toml").write_text(f'preset = "vindr-cxr"\nreaders = "{rule}"\n')
    data = read_folder(folder)
    assert data.release == "vindr-cxr" and data.films_present == 3
    table = data.table.set_index("image_index")
    assert table.loc["a.dicom", ["Atelectasis", "Cardiomegaly", "Effusion"]].tolist() == seen
    assert table.loc["b.dicom", findings_of(table)].eq(0).all()
    assert table["official_split"].tolist() == ["train_val", "train_val", "test"]


def test_folders_are_classes(tmp_path):
    for film in ("train/NORMAL/IM-0115-0001.jpeg", "train/PNEUMONIA/person12_bacteria_45.jpeg",
                 "test/PNEUMONIA/person12_virus_6.jpeg", "val/NORMAL/NORMAL2-IM-0115-0001.jpeg"):  # fmt: skip
        (tmp_path / film).parent.mkdir(parents=True)
        (tmp_path / film).touch()
    data = read_folder(tmp_path)
    table = data.table.set_index("image_index")
    assert data.release == "kermany" and data.films_present == 4
    assert table["Pneumonia"].to_dict() == {
        name: float("PNEUMONIA" in name) for name in table.index
    }
    assert sorted(table["patient_id"]) == ["IM-0115", "NORMAL2-IM-0115", "person12", "person12"]


def touch(folder, *films):
    for film in films:
        (folder / film).parent.mkdir(parents=True, exist_ok=True)
        (folder / film).touch()


KERMANY = {
    "train/NORMAL/NORMAL-1003233-0001.jpeg": "1003233", "train/NORMAL/IM-0115-0001.jpeg": "IM-0115",
    "train/PNEUMONIA/BACTERIA-1008087-0001.jpeg": "1008087",
    "train/PNEUMONIA/BACTERIA-1008087-0002.jpeg": "1008087",
    "test/PNEUMONIA/VIRUS-4567-0001.jpeg": "4567", "test/PNEUMONIA/person1_virus_6.jpeg": "person1",
}  # fmt: skip


@pytest.mark.parametrize("places", [
    [""], ["chest_xray/"], ["", "chest_xray/"], ["chest_xray/", "chest_xray/chest_xray/"],
    ["CellData/chest_xray/"],
])  # fmt: skip
def test_folders_as_classes_are_read_as_their_archives_unpack_and_each_film_once(tmp_path, places):
    touch(tmp_path, *(place + film for place in places for film in KERMANY))
    touch(tmp_path, *(f"__MACOSX/{place}train/NORMAL/._IM-0115-0001.jpeg" for place in places),
          f"{places[0]}train/NORMAL/._IM-0115-0001.jpeg", f"{places[0]}train/NORMAL/.DS_Store",
          "CellData/OCT/train/NORMAL/NORMAL-12494-1.jpeg")  # fmt: skip
    data = read_folder(tmp_path)
    table = data.table.set_index("image_index")
    assert data.release == "kermany" and table["patient_id"].to_dict() == KERMANY
    assert table["Pneumonia"].to_dict() == {name: float("PNEUMONIA" in name) for name in KERMANY}
    for name, path in table["path"].items():
        assert path.removesuffix(name) in places
    orphans = check_table(data).set_index("check").loc["orphaned films"]
    assert orphans["count"] == 1 + (len(places) - 1) * len(KERMANY)


CHEXPERT = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding," + ",".join(
    "Pleural Effusion" if name == "Effusion" else name for name in presets()["chexpert"].findings
)


def chexpert_rows(*films):
    rows = [f"CheXpert-v1.0/{film},Female,68,Frontal,AP{',' * 14}" for film in films]
    return "\n".join([CHEXPERT, *rows, ""])


@pytest.mark.parametrize("there", [[2, 3, 4], [3], []])
def test_chexpert_is_read_in_the_batches_that_stanford_hands_out(tmp_path, there):
    train = [f"patient{k:05d}/study1/view1_frontal.jpg" for k in (1, 30_000, 60_000)]
    valid = "valid/patient64541/study1/view1_frontal.jpg"
    first = "CheXpert-v1.0 batch 1 (validate & csv)"
    touch(tmp_path, f"{first}/{valid}")
    names = {
        k: f"CheXpert-v1.0 batch {k} (train {k - 1})/{film}" for k, film in enumerate(train, 2)
    }
    touch(tmp_path, *(names[k] for k in there))
    table = chexpert_rows(*(f"train/{film}" for film in train))
    (tmp_path / first / "train.csv").write_text(table)
    (tmp_path / first / "valid.csv").write_text(chexpert_rows(valid))
    assert find_data(str(tmp_path)) == tmp_path == find_data(kaggle=tmp_path)
    data = read_folder(tmp_path)
    found = {k: names[k] if k in there else "" for k in names}
    assert data.release == "chexpert"
    assert data.table["path"].tolist() == [*found.values(), f"{first}/{valid}"]
    assert data.table["official_split"].tolist() == ["train_val"] * 3 + ["test"]
    checks = check_table(data).set_index("check")["count"]
    assert checks["missing films"] == 3 - len(there) and checks["orphaned films"] == 0


@pytest.mark.parametrize("ending", [".DICOM", ".dcm", ".PNG", ".Jpg", ".JPEG"])
def test_a_template_finds_films_however_their_endings_are_written(tmp_path, ending):
    folder = write_vindr(tmp_path)
    for film in folder.rglob("*.dicom"):
        film.rename(film.with_suffix(ending))
    data = read_folder(folder)
    assert data.table["path"].tolist() == [
        f"{name}{ending}" for name in ("train/a", "train/b", "test/c")
    ]
    assert check_table(data).set_index("check")["count"]["orphaned films"] == 0


# --- which data set a folder is


def test_two_data_sets_in_one_folder_are_said_and_a_line_chooses(tmp_path):
    lines = ["Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
             "View Position,Fracture,Pneumothorax,Airspace opacity,Nodule or mass",
             "00000013_000.png,Mass,0,13,60,M,PA,NO,YES,NO,YES"]  # fmt: skip
    for name in ("Data_Entry_2017.csv", "google2019_labels.csv"):
        (tmp_path / name).write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"may be those of google2019 or nih; write films.toml"):
        read_folder(tmp_path)
    (tmp_path / "films.toml").write_text('preset = "google2019"')
    table = read_folder(tmp_path).table
    assert findings_of(table) == ["Fracture", "Pneumothorax", "Lung Opacity", "Nodule/Mass"]
    assert table[findings_of(table)].iloc[0].tolist() == [0, 1, 0, 1]
    (tmp_path / "google2019_labels.csv").unlink()  # the two tables as Google has them
    (tmp_path / "four_findings_expert_labels").mkdir()
    for number, part in enumerate(("test", "validation"), 13):
        text = "\n".join(lines).replace("13", str(number))
        (tmp_path / f"four_findings_expert_labels/{part}_labels.csv").write_text(text)
    assert read_folder(tmp_path).table["patient_id"].tolist() == ["13", "14"]
    (tmp_path / "films.toml").write_text('preset = "googel"')
    with pytest.raises(InputError, match=r"preset = 'googel'; known: chexpert, .* \(line 1\)"):
        read_folder(tmp_path)


def test_uncertain_labels_are_what_the_mapping_says(tmp_path):
    header = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding," + ",".join(
        "Effusion" if f == "Pleural Effusion" else f for f in presets()["chexpert"].findings
    )
    row = "CheXpert-v1.0/train/patient1/study2/view1_frontal.jpg,Female,68,Frontal,AP,,-1"
    (tmp_path / "train.csv").write_text(f"{header}\n{row}{',' * 12}\n")
    for said, value in (("unknown", np.nan), ("present", 1), ("absent", 0)):
        mapping = f'preset = "chexpert"\n[marks]\nuncertain_is = "{said}"\n'
        (tmp_path / "films.toml").write_text(mapping)
        table = read_folder(tmp_path).table
        np.testing.assert_equal(table["Enlarged Cardiomediastinum"].item(), value)
        assert table["follow_up"].item() == 2 and table["patient_id"].item() == "patient1"
    (tmp_path / "films.toml").write_text('preset = "chexpert"\n[marks]\nuncertain_is = "maybe"\n')
    with pytest.raises(
        InputError, match=r"uncertain_is = 'maybe'; give unknown, present or absent \(line 3\)"
    ):
        read_folder(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_tables_are_read_as_spreadsheets_save_them(tmp_path, encoding):
    (tmp_path / "films.toml").write_text(
        'table = "t.csv"\n[columns]\nimage = "Bild"\npatient = "Patient"\nage = "Alter"\n'
        '[findings]\nEffusion = "Erguß"\n', "utf-8"
    )  # fmt: skip
    text = "Bild;Patient;Alter;Erguß\nä.png;Müller;61,5;1\n"
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    row = read_folder(tmp_path).table.iloc[0]
    assert (row["patient_id"], row["age"], row["Effusion"]) == ("Müller", 61.5, 1)


@pytest.mark.parametrize(("text", "told"), [
    ("[extract]\npatient = '('\n", r"patient = '\('; give an expression"),
    ("[columns]\nage = 3\n", r"age = 3; give a text, such as age = .* \(line 3\)"),
    ("several = 1\n", r"several = 1; give true or false \(line 2\)"),
    ("depth = 'x'\n", r"depth = 'x'; give a number"),
    ("[keep]\nView = 5\n", r"View = 5; give a text"),
    ("readers = 'most'\n", r"readers = 'most'; give any, majority or all"),
    ("[values]\nview = 'AP'\n", r"view = 'AP'; give a section \[view\]"),
])  # fmt: skip
def test_what_is_wrong_in_a_mapping_is_named_with_its_line(tmp_path, text, told):
    (tmp_path / "films.toml").write_text(f'preset = "vindr-cxr"\n{text}')
    with pytest.raises(InputError, match=r"films\.toml: " + told):
        read_folder(tmp_path)


def test_presets_are_short_and_each_has_its_page():
    """Which says where to get it, its terms, layout and traps, and one command."""
    page = (Path(__file__).parents[2] / "data/README.md").read_text()
    nih, rest = page.partition("\n## Data sets")[::2]
    pages = {part.partition("\n")[0]: part for part in rest.split("\n### ")}
    for preset in presets().values():
        text = pages.get(preset.given["title"], nih)
        assert (preset.name == "nih") == (text is nih), preset.name
        words = ["https://", "Terms", "Layout", "raps", "python -m fedutils"]
        assert all(word in text for word in words), (preset.name, text)
    for path in PRESETS.glob("*.toml"):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(lines) <= 40, path
        assert presets()[path.stem].given["title"] in page and f"`{path.stem}`" in page, path
    assert "ten lines" in page and re.search(r"preset = ", page)


def test_a_gzipped_table_is_recognised_by_its_header_alone(tmp_path):
    (tmp_path / "stage_2_train_labels.csv.gz").write_bytes(
        gzip.compress(b"patientId,x,y,width,height,Target\na,1,2,3,4,1\na,5,6,7,8,1\nb,,,,,0\n")
    )
    data = read_folder(tmp_path)
    assert data.release == "rsna" and data.table["Pneumonia"].tolist() == [1, 0]
    assert check_table(data)["count"].sum() == 3 * 2  # no film is there, no age and no spacing
