"""Films of one's own: what the page in data/README.md shows is what runs, and gaps stay gaps."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
from ownfilms import MARKS, MARKS_TABLE, WORDS, WORDS_TABLE, rows_of, write, write_films
from tiny import tiny_settings

from fedutils.__main__ import main
from fedutils.base.errors import InputError
from fedutils.base.findings import findings_of, format_labels, no_finding
from fedutils.batch.run import identify
from fedutils.client import masked_loss
from fedutils.dataset import read_index
from fedutils.evidence.metrics import evaluate_models
from fedutils.evidence.predict import predict_films
from fedutils.evidence.tables import over_seeds, tabulate
from fedutils.films.check import check_table, summary
from fedutils.films.decode import decode_films, example_films, write_index
from fedutils.films.find import find_data
from fedutils.films.partition import label_skew, partition_patients, partition_report
from fedutils.films.read import read_folder
from fedutils.films.sources import open_data
from fedutils.films.split import split_patients
from fedutils.run import read_films
from fedutils.training.training import Training

KNOWN = ["Effusion", "Cardiomegaly", "Pneumothorax", "Edema", "Mass", "Infiltration"]


def prepare(folder, work, image_size=32):
    """Do what notebook 02 does; return the data and the report."""
    data = open_data(str(folder), work)
    table = data.table.assign(split=split_patients(data.table, 0))
    films = decode_films(table, data.folder, work / "prepared", image_size)
    about = {"release": data.release, "image_size": image_size}
    return data, write_index(table, films, data.boxes, work / "prepared", about)


# --- the page in data/README.md


def test_the_example_with_columns_reads_as_the_page_says(tmp_path):
    films = [line.split(";")[0] for line in MARKS_TABLE.splitlines()[1:]]
    data = read_folder(write(tmp_path, films=films))
    table = data.table
    assert data.release == "own" and data.table_file == "table.csv"
    assert table["image_index"].tolist() == table["path"].tolist() == films
    assert table["patient_id"].tolist() == ["A-17", "A-17", "B-02"]
    assert table["view"].tolist() == ["PA", "AP", "PA"] and table["age"].tolist() == [61, 61, 34]
    assert table["scanner"].tolist() == ["Room-1", "Ward", "Room-1"]
    assert table["follow_up"].tolist() == [1, 2, 1]
    expected = [[1, 0, 0, np.nan, 0, 0], [1, 1, 0, 1, 0, np.nan], [0] * 6]
    np.testing.assert_array_equal(table[KNOWN], expected)
    assert findings_of(table) == KNOWN and set(table[KNOWN].dtypes) == {np.dtype("f4")}
    assert summary(data)["missing"] == ["split lists", "boxes"]
    assert check_table(data)["count"].sum() == 0


def test_the_example_with_words_reads_as_the_page_says(tmp_path):
    data = read_folder(write(tmp_path, WORDS, WORDS_TABLE, ["a.png", "b.jpg", "deep/c.jpg"]))
    assert data.table["path"].tolist() == ["a.png", "b.jpg", "deep/c.jpg"]
    labels = data.table[["Effusion", "Cardiomegaly"]]
    np.testing.assert_array_equal(labels, [[1, 0], [0, 0], [np.nan, np.nan]])
    assert findings_of(data.table) == list(labels) and labels.notna().sum().sum() == 4
    assert {"ages", "sexes", "views", "scanners"} < {*summary(data)["missing"]}


# --- the same pipeline as NIH's films


def test_own_films_are_read_decoded_split_trained_and_evaluated_with_masks(tmp_path):
    folder, settings = (
        write_films(tmp_path / "own"),
        tiny_settings(tmp_path / "work", num_clients=2),
    )
    data, report = prepare(folder, tmp_path / "work")
    assert data.films_present == report["films"] == 80 and report["quarantined"] == {}
    assert report["modes"] == {"RGB": 60, "L": 20}
    index = read_index(settings.prepared)
    gaps = data.table[KNOWN].isna().sum().sum()
    assert gaps > 20 and index[KNOWN].isna().sum().sum() == gaps
    clients = partition_patients(index, "scanner", 2, 0.5, 0)
    assert set(clients["client"]) == {"scanner-Room-0", "scanner-Room-1"}
    shares = partition_report(index, clients)
    assert findings_of(shares) == KNOWN and shares[KNOWN].notna().all(axis=None)
    assert 0 <= label_skew(index, clients) <= 1
    settings.run.mkdir(parents=True)
    clients.to_csv(settings.run / "clients.csv", index=False)
    films = read_films(settings)
    history = Training(settings, films).train()
    assert history["status"].eq("ok").all() and history["round"].max() == 2
    rows = history[history["client"] == ""]
    assert np.isfinite(rows[["train_loss", "val_loss", "val_auroc"]]).all(axis=None)
    metrics = evaluate_models(predict_films(settings, films, "test"), films, 0).metrics
    auroc = over_seeds(metrics).query("metric == 'auroc'").set_index("finding")
    test = index[index["split"] == "test"]
    assert auroc.loc[KNOWN, "n"].tolist() == test[KNOWN].notna().sum().tolist()
    assert auroc.loc[KNOWN, "positives"].tolist() == test[KNOWN].sum().tolist()
    # Too few test patients for any verdict, and for a mean; the single values stand.
    assert auroc.loc["mean", "positives"] == 0 and np.isnan(auroc.loc["mean", "value"])
    assert auroc.loc[KNOWN, "value"].notna().any() and auroc["ci_low"].isna().all()
    assert list(tabulate(metrics).index) == ["mean of 0", *KNOWN]


def test_an_unknown_label_moves_neither_loss_nor_gradient():
    import torch

    labels = torch.tensor([[1.0] + [float("nan")] * 13, [0.0, 1.0] + [float("nan")] * 12])
    for scores in (0.0, 50.0):
        logits = torch.full((2, 14), scores)
        logits[:, :2] = 0.3
        logits.requires_grad_()
        masked_loss(logits, labels).backward()
        assert (logits.grad[:, 2:] == 0).all() and logits.grad[0, 1] == 0
        assert (logits.grad[[0, 1, 1], [0, 0, 1]] != 0).all()


def test_examples_and_titles_never_call_a_gap_no_finding(tmp_path):
    data = open_data(str(write_films(tmp_path / "own", patients=8)), tmp_path)
    films, boxes = example_films(data, 32)
    assert list(films) == KNOWN and not any(boxes.values())
    gap = dict.fromkeys([*KNOWN, "Hernia"], np.nan)
    assert format_labels(gap) == "not labelled"
    gap |= dict.fromkeys(KNOWN, 0)
    assert format_labels(gap) == "none of 6 known"
    labels = pd.DataFrame([gap, gap, gap])
    labels.iloc[1, 0], labels.iloc[2, 0] = 1, np.nan
    np.testing.assert_array_equal(no_finding(labels), [1, 0, np.nan])


def test_jpeg_films_and_the_mapping_belong_to_the_identity_of_the_data(tmp_path):
    folder = write(tmp_path / "own")
    seen = {identify([folder], folder.parent / "work")}
    (folder / "films.toml").write_text(MARKS + "# another word\n")
    seen.add(identify([folder], folder.parent / "work"))
    (folder / "new.jpg").touch()
    assert len(seen | {identify([folder], folder.parent / "work")}) == 3


def test_own_films_are_found_by_folder_and_a_folder_too_high_is_told(tmp_path):
    inner = write(tmp_path / "hospital" / "own")
    assert find_data(str(inner)) == inner
    assert find_data("", kaggle=tmp_path) == inner
    with pytest.raises(InputError, match=f"there is one in {inner}: give that folder"):
        find_data(str(tmp_path))


def test_a_phantom_under_a_mapping_stays_a_phantom(tmp_path):
    (write(tmp_path) / "PHANTOM.json").write_text("{}")
    assert read_folder(tmp_path).release == "phantom"


def test_equal_names_in_different_folders_are_different_films_when_named_by_path(tmp_path):
    table = MARKS_TABLE.replace("pictures/A-17/first.png", "pictures\\A-17\\film.jpg")
    films = ["pictures/A-17/film.jpg", "pictures/B-02/film.jpg", "pictures/A-17/other.jpg"]
    data = read_folder(write(tmp_path, table=table, films=films))
    counts = check_table(data).set_index("check")["count"]
    assert data.table["path"].tolist() == ["pictures/A-17/film.jpg", "", films[1]]
    assert counts["films in two folders"] == 0 and counts["orphaned films"] == 1


def test_duplicate_rows_that_differ_in_a_gap_are_counted(tmp_path):
    first = MARKS_TABLE.splitlines()[1]
    data = read_folder(
        write(tmp_path, table=f"{MARKS_TABLE}{first}\n{first.replace(';;', ';1;')}\n")
    )
    counts = check_table(data).set_index("check")["count"]
    assert counts["duplicate rows"] == 2 and counts["duplicate rows that disagree"] == 1
    assert len(data.table) == 3 and np.isnan(data.table.loc[0, "Edema"])


@pytest.mark.parametrize("again", ["1.png", "./1.png", "pics/..//1.png", ".\\1.png"])
def test_a_name_that_two_patients_share_is_refused_and_paths_are_right(tmp_path, again):
    files = ["pics/P1/1.png", "pics/P2/1.png"]
    folder = write(tmp_path, table=rows_of(("1.png", "P1"), (again, "P2")), films=files)
    said = "line 3: '1.png' is a film of patient 'P2', and above one of 'P1'; name films by their"
    with pytest.raises(InputError, match=re.escape(said)):
        read_folder(folder)
    (folder / "table.csv").write_text(rows_of((files[0], "P1"), (files[1], "P2")))
    table = read_folder(folder).table
    assert table["path"].tolist() == files and table["patient_id"].tolist() == ["P1", "P2"]


def test_a_film_of_several_rows_is_of_one_patient(tmp_path):
    folder = write(tmp_path, "several = true\n" + MARKS, rows_of(("1.png", "P1"), ("1.png", "P2")))
    with pytest.raises(InputError, match=r"line 3: '1\.png' is a film of patient 'P2'"):
        read_folder(folder)


@pytest.mark.parametrize("patient", ["P1", "P2"])
def test_a_name_that_lies_in_two_folders_is_refused_even_if_one_row_has_it(tmp_path, patient):
    films = ["visit 1/00000001_000.png", "visit 2/00000001_000.png"]
    folder = write(tmp_path, table=rows_of(("00000001_000.png", patient)), films=films)
    with pytest.raises(InputError, match=r"line 2: '0000.*' lies in more than one folder; name"):
        read_folder(folder)


def test_split_lists_that_name_films_otherwise_than_the_table_are_refused(tmp_path):
    films = ["P1/1.png", "P2/1.png"]
    folder = write(tmp_path, table=rows_of((films[0], "P1"), (films[1], "P2")), films=films)
    for split in ("train", "test"):
        (folder / f"{split}_list.txt").write_text("1.png\n")
    with pytest.raises(
        InputError, match=r"none of the 1 films in the split lists, such as '1\.png'"
    ):
        read_folder(folder)


@pytest.mark.parametrize(("one", "other", "id"), [
    ("12", "12.0", "12"), ("012", "12", "12"), ("12,00", "0012.", "12"), ("0", "0.0", "0"),
    ("p-7", "P-7", "P-7"), ("Jose\u0301", "JOS\u00c9", "JOS\u00c9"), ("A 1", "A\u00a0 1", "A 1"),
    ("A1\u200b", "A1", "A1"), ("\uff11\uff12", "12", "12"),
])  # fmt: skip
def test_two_spellings_of_a_patient_are_one_patient_and_are_counted(tmp_path, one, other, id):
    for rows in ((one, other), (other, one)):
        table = rows_of(*zip(["a.png", "b.png", "c.png"], [*rows, "120"], strict=True))
        data = read_folder(write(tmp_path, table=table))
        assert data.table["patient_id"].tolist() == [id, id, "120"]
        check = check_table(data).set_index("check").loc["patients in several spellings"]
        assert check["count"] == 1 and " = " in check["examples"]


@pytest.mark.parametrize("id", ["1,23E+11", "1.23e+11", "2E+12"])
def test_a_patients_id_that_a_spreadsheet_rounded_is_refused(tmp_path, id):
    said = f"table.csv, line 3: a spreadsheet has rounded the patient's id to {id!r}; export"
    with pytest.raises(InputError, match=re.escape(said)):
        read_folder(write(tmp_path, table=rows_of(("1.png", "1E5"), ("2.png", id))))


def test_a_film_is_found_however_unicode_composes_its_name(tmp_path):
    data = read_folder(write(tmp_path, table=rows_of(("e\u0301.png", "1")), films=["\u00e9.png"]))
    assert data.films_present == 1 and data.table["path"].tolist() == ["\u00e9.png"]


@pytest.mark.parametrize(("named", "file"), [
    ("a.png", "a.PNG"), ("b.JPG", "b.jpg"), ("in/c.jpeg", "in/c.JPG"), ("d.jpg", "d.jpeg"),
    ("e.TIF", "e.tiff"), ("f.dcm", "f.DICOM"),
])  # fmt: skip
def test_a_film_is_found_however_its_ending_is_written(tmp_path, named, file):
    """In the table and in the split lists; the table's spelling is the film's name."""
    table = rows_of((named, "1"), ("in/z.png" if "/" in named else "z.png", "2"))
    folder = write(tmp_path, table=table, films=[file, f"deep/._{file.rpartition('/')[2]}"])
    (folder / "train_list.txt").write_text("z.png\nin/z.png")
    (folder / "test_list.txt").write_text(file)
    data = read_folder(folder)
    film = data.table.set_index("image_index").loc[named]
    assert film["path"] == file and film["official_split"] == "test"
    assert data.found["orphaned films"] == []


def test_of_two_endings_the_one_that_the_table_names_is_read(tmp_path):
    data = read_folder(write(tmp_path, table=rows_of(("a.jpg", "1")), films=["a.jpg", "a.png"]))
    assert data.table["path"].tolist() == ["a.jpg"] and data.found["orphaned films"] == ["a.png"]


# --- splits of one's own


def with_splits(folder, *splits):
    """The README's table with a column of splits, and a mapping that names it."""
    header, *rows = MARKS_TABLE.splitlines()
    lines = [f"{header};Part", *(f"{row};{s}" for row, s in zip(rows, splits, strict=True))]
    mapping = MARKS.replace("[findings]", 'split = "Part"\n[findings]')
    return write(folder, mapping, "\n".join(lines))


def test_a_column_of_splits_is_followed(tmp_path):
    table = read_folder(with_splits(tmp_path, "train", "train", "test")).table
    assert table["official_split"].tolist() == ["train_val", "train_val", "test"]
    assert set(split_patients(table, 0)) <= {"train", "val", "test"}
    table = table.assign(official_split=["train", "val", "test"], patient_id=list("abc"))
    assert split_patients(table, 0).tolist() == ["train", "val", "test"]


@pytest.mark.parametrize("several", ["", "several = true\n"])
@pytest.mark.parametrize("stacked", [True, False])
def test_a_film_for_training_and_test_is_counted_and_tested_also_of_several_rows(
    tmp_path, several, stacked
):
    tables = {"train": "1.png,1,1\n2.png,2,0\n", "test": "2.png,2,1\n3.png,3,0\n"}
    source = '[tables]\n"train.csv" = "train"\n"test.csv" = "test"\n'
    if not stacked:
        lines = [f"{row},{name}" for name, rows in tables.items() for row in rows.split()]
        tables, source = {"t": "\n".join(lines)}, 'table = "t.csv"\n'
    columns = '[columns]\nimage = "film"\npatient = "who"\n' + 'split = "for"\n' * (not stacked)
    folder = write(tmp_path, f'{several}{source}{columns}[findings]\nMass = "m"\n')
    for name, rows in tables.items():
        (folder / f"{name}.csv").write_text("film,who,m" + ",for" * (not stacked) + "\n" + rows)
    data = read_folder(folder)
    assert data.table["official_split"].tolist() == ["train_val", "test", "test"]
    assert data.found["rows in both lists"] == ["2.png"]


def test_own_lists_are_followed_and_a_film_in_none_is_left_out(tmp_path):
    folder = write(tmp_path)
    (folder / "train_list.txt").write_text("pictures\\A-17\\first.png\r\n")
    (folder / "val_list.txt").write_text("")
    (folder / "test_list.txt").write_text("pictures/B-02/film.jpg")
    data = read_folder(folder)
    assert split_patients(data.table, 0).tolist() == ["train", "", "test"]
    assert data.lists == ("train", "val", "test")


def test_a_patient_in_two_own_splits_is_refused(tmp_path):
    data = read_folder(with_splits(tmp_path, "train", "test", "test"))
    assert check_table(data).set_index("check")["count"]["patients in both lists"] == 1
    with pytest.raises(InputError, match="more than one split, such as A-17"):
        split_patients(data.table, 0)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (("train", "Train", "test"), "table.csv, line 3: split 'Train'; write train, val or test"),
        (("train", "train", ""), "name train_val alone; name films for train and for test"),
        (("", "", "test"), "name test alone; name films for train and for test"),
    ],
)
def test_unusable_own_splits_are_named(tmp_path, splits, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read_folder(with_splits(tmp_path, *splits))


# --- errors name the file, the row and what was found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (";0;0;0;0;0;0", ";0;yes;0;0;0;0", "table.csv, line 4 (pictures/B-02/film.jpg): column"
         " 'Big heart' (Cardiomegaly) holds 'yes'; write 1 for present, 0 for absent, or leave it"),
        (";0;0;0;0;0;0", ";0;-1;0;0;0;0", "line 4 (pictures/B-02/film.jpg): column 'Big heart'"),
        (";0;0;0;0;0;0", ";0;0;0;0;0", "table.csv, line 4: 12 cells, but the header has 13"),
        (";0;0;0;0;0;0", ";0;0;0;0;0;0;0", "table.csv, line 4: 14 cells, but the header has 13"),
        ("film.jpg;B-02", "film.jpg;", "table.csv, line 4: no image index or no patient id"),
        ("Lump", "File", "table.csv has 2 columns 'File'; rename all but one there (line 4)"),
        ("61;F", '61;"F', "table.csv, line 2: is no CSV"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_read_is_named_with_its_row(tmp_path, old, new, message):
    assert old in MARKS_TABLE
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_folder(write(tmp_path, table=MARKS_TABLE.replace(old, new)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("effusoin", "words.csv, line 3 (b.jpg): column 'Diagnosis' holds the unknown word 'eff"),
        ('"normal, effusion"', "line 3 (b.jpg): a word for no finding stands beside a finding"),
    ],
)
def test_an_unknown_or_contradicting_word_is_named_with_its_row(tmp_path, word, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read_folder(write(tmp_path, WORDS, WORDS_TABLE.replace("normal", word)))


def test_a_quoted_line_break_does_not_shift_the_row_number(tmp_path):
    table = WORDS_TABLE.replace('"Pleural effusion, pacemaker"', '"Pleural effusion,\n\npacemaker"')
    with pytest.raises(InputError, match=r"line 5 \(b.jpg\): .*'broken'"):
        read_folder(write(tmp_path, WORDS, table.replace("normal", "broken")))


def test_films_that_are_named_otherwise_than_the_files_are_an_error_that_shows_both(tmp_path):
    with pytest.raises(InputError, match=r"line 2: 'a.png' is no film.*films there are x.png;"):
        read_folder(write(tmp_path, WORDS, WORDS_TABLE, ["x.png"]))
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    assert read_folder(write(tmp_path / "none", WORDS, WORDS_TABLE)).films_present == 0


@pytest.mark.parametrize(
    ("mapping", "old", "new", "message"),
    [
        (MARKS, "Edema =", "split =", "[findings] 'split': no name for a finding"),
        (MARKS, "Edema =", '"<b>" =', "[findings] '<b>': no name for a finding"),
        *((MARKS, "Edema =", f'"{odd}" =', "no name for a finding; choose another, of at most 60")
          for odd in (" Edema", "Edema ", "Ede\\nma", "Ede|ma", "Ede,ma", "E" * 61, "&amp;", "")),
        *((MARKS, "Edema =", f'"{odd}" =', f"'Effusion' and '{odd}' are one finding; name it once")
          for odd in ("effusion", "Eff_usion", "Eff-usion")),
        (MARKS, "sex =", "gender =", "unknown 'gender' in [columns]; known: image, patient, view"),
        (MARKS, "[findings]", "[finding]", "unknown 'finding'; known: table, columns, findings"),
        (MARKS, 'table = "table.csv"', "", 'no table; add table = "..."'),
        (MARKS, 'image = "File"', "", '[columns] has no image; add image = "..."'),
        (MARKS, '"Projection"', "3", 'view = 3; give a text, such as view = "..."'),
        (MARKS, '"Lump"', '["Lump", "File"]', "Mass = ['Lump', 'File']; give one column's name"),
        (MARKS, '"Lump"', '"Shadow"', "'Shadow' stands for two things; name it once"),
        (MARKS, 'table = "table.csv"', 'table = "../t.csv"', "table = '../t.csv'; give the name"),
        (MARKS, 'table = "table.csv"', 'table = "t.csv"', "'t.csv' is not there; tables beside it:"),
        (MARKS, 'table = "table.csv"', "table = table.csv", "films.toml: cannot be read (Invalid"),
        (WORDS, 'separator = ","', "", '[labels] has no separator; add separator = "..."'),
        (WORDS, 'separator = ","', "separator = 1", "separator = 1; give a text"),
        (WORDS, '"pacemaker"', '"Effusion"', "'effusion' stands for two things"),
        (WORDS, '"pacemaker"', "5", "ignore = ['rib fracture', 5]; give a text, or a list such as"),
    ],
)  # fmt: skip
def test_a_mapping_that_cannot_be_used_says_what_to_write(tmp_path, mapping, old, new, message):
    assert old in mapping
    write(tmp_path, mapping)
    (tmp_path / "films.toml").write_text(mapping.replace(old, new))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_folder(tmp_path)
    assert "films.toml: " in str(caught.value) and "\n" not in str(caught.value)


SMALL = """table = "t.csv"
[columns]
image = "f"
patient = "p"
{columns}
[findings]
X = "x"
"""
ROWS = "f,p,x\na.png,1,1\nb.png,2,0\n"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (SMALL + '[extract]\npatinet = "(p)"', "'patinet' in [extract] is none of those in"),
        (SMALL + '[values]\nview = {{ a = "PA" }}', "'view' in [values] is none of those in"),
        (SMALL + '[extract]\npatient = "p"', "patient = 'p'; give an expression with brackets round"),
        (SMALL + "[extract]\npatient = '(?:p)'", "patient = '(?:p)'; give an expression with brackets"),
        (SMALL + "[extract]\npatient = '\\(p'", "patient = '\\\\(p'; give an expression with brackets"),
        (SMALL + "[paths]\n'(' = 'p'", "paths = '('; give expressions, such as"),
        (SMALL + "[paths]\n'p' = 1", "p = 1; give a text"),
        (SMALL + "[tables]\n'../t.csv' = ''", "tables = '../t.csv'; give tables in the data's folder"),
        (SMALL + '[marks]\nspared = "Zed"', "spared = 'Zed', which is none of [findings]"),
        (SMALL + '[marks]\npresent = "1"\nabsent = ["0", "1"]', "'1' is present and absent; give"),
        (SMALL + '[aliases]\nxx = "Y"', "xx = 'Y', which is none of [findings]"),
        (SMALL + '[tables]\n"t.csv" = ""', "table and [tables]; give one of them"),
        (SMALL + '[join]\n"/l.csv" = "p"', "join = '/l.csv'; give tables in the data's folder"),
        ("readers = \"any\"\n" + SMALL, "readers wants the column of the reader"),
        (SMALL.replace("{columns}", 'reader = "r"'), "reader wants several = true"),
        (SMALL.replace("{columns}", 'born = "b"'), "born gives no age without date"),
        (SMALL.replace('"f"', "[]"), "image = []; give a text"),
        (SMALL.replace('table = "t.csv"', "[tables]"), "tables = {}; give tables, such as"),
        (SMALL.replace('table = "t.csv"', '[tables]\n"t.csv" = "training"'), "give \"\", train, val"),
    ],
)  # fmt: skip
def test_what_a_mapping_says_that_nothing_would_heed_is_an_error_with_its_line(
    tmp_path, mapping, message
):
    (tmp_path / "t.csv").write_text(ROWS)
    (tmp_path / "films.toml").write_text(mapping.format(columns=""))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_folder(tmp_path)
    assert re.search(r"films\.toml: .* \(line \d+\)$", str(caught.value))


@pytest.mark.parametrize(
    ("mapping", "told"),
    [
        (MARKS.replace('"Big heart"', '"Heart"'), "Cardiomegaly = 'Heart', but "),
        (SMALL.replace("{columns}", 'view = ["v", "w"]'), "view = 'v', but "),
        (SMALL.replace("{columns}", 'age = "{b}-{p}"'), "age = 'b', but "),
        (SMALL.replace('"f"', '"g"').replace("{columns}", ""), "image = 'g', but "),
        (SMALL.replace("{columns}", "") + '[keep]\nView = "PA"', "View = 'View', but "),
        (SMALL.replace("{columns}", "") + '[marks]\nnone = "n"', "none = 'n', but "),
        (SMALL.replace("{columns}", "") + '[labels]\nseparator = "|"\ncolumn = "l"', "column = 'l'"),
        ('table = "t.csv"\nfindings = ["X", "Y"]\ncolumns = { image = "f", patient = "p" }', "X = 'X', but "),
    ],
)  # fmt: skip
def test_a_column_that_the_table_lacks_is_named_with_the_mappings_line_and_key(
    tmp_path, mapping, told
):
    write(tmp_path, mapping, MARKS_TABLE if "table.csv" in mapping else ROWS)
    with pytest.raises(InputError, match=re.escape(told)) as caught:
        read_folder(tmp_path)
    found = re.search(r"films\.toml: (\w+) = .* has no such column; it has .*\(line (\d+)\)$",
                      str(caught.value))  # fmt: skip
    line = mapping.splitlines()[int(found[2]) - 1]
    assert found[1] in line or line.startswith("findings = ")


def test_a_key_that_stands_in_the_preset_is_named_there(tmp_path):
    (tmp_path / "stage_2_train_labels.csv").write_text("patientId,target\na,1\n")
    (tmp_path / "films.toml").write_text('preset = "rsna"\n[findings]\n')
    with pytest.raises(InputError, match=r"rsna\.toml: Pneumonia = 'Target', but .* \(line 19\)$"):
        read_folder(tmp_path)
    (tmp_path / "films.toml").write_text('preset = "rsna"\n[columns]\npatient = "person"\n')
    with pytest.raises(InputError, match=r"films\.toml: patient = 'person', but .* \(line 3\)$"):
        read_folder(tmp_path)


@pytest.mark.parametrize("preset", ["", 'preset = "google2019"\n'])
def test_a_table_of_an_own_mapping_that_is_not_there_is_named(tmp_path, preset):
    named = '[tables]\n"train.csv" = "train"\n"tests.csv" = "test"\n'
    columns = '[columns]\nimage = "film"\npatient = "film"\n[findings]\nMass = "m"\n'
    folder = write(tmp_path, preset + named + columns)
    for name in ("train", "test"):
        (folder / f"{name}.csv").write_text("film,m\n1.png,1\n")
    said = rf"'tests\.csv' is not there; .* test\.csv, train\.csv \(line {4 if preset else 3}\)"
    with pytest.raises(InputError, match=said):
        read_folder(folder)


def test_each_of_stacked_tables_has_the_columns(tmp_path):
    tables = '[tables]\n"a.csv" = "train"\n"b.csv" = "test"'
    mapping = SMALL.replace('table = "t.csv"', tables).replace("{columns}", "")
    write(tmp_path, mapping)
    (tmp_path / "a.csv").write_text(ROWS)
    (tmp_path / "b.csv").write_text("f,p\nc.png,3\n")
    with pytest.raises(
        InputError, match=r"X = 'x', but .*b\.csv has no .* has f, p: .* \(line 9\)"
    ):
        read_folder(tmp_path)


JOINED = (
    SMALL.replace('table = "t.csv"', "").replace("{columns}", "")
    + """
[tables]
"t.csv" = ""
[join]
"l.csv" = "p"
"""
)


@pytest.mark.parametrize("written", [("1.0", "002"), ("1", "2.00"), (" 1", "2,0")])
def test_tables_are_joined_by_ids_in_one_spelling(tmp_path, written):
    (tmp_path / "t.csv").write_text("f,p\na.png,1\nb.png,2\nc.png,3\n")
    (tmp_path / "l.csv").write_text("p;x\n" + "".join(f"{p};{k}\n" for k, p in enumerate(written)))
    (tmp_path / "films.toml").write_text(JOINED)
    labels = read_folder(tmp_path).table.set_index("image_index")["X"]
    assert labels["a.png"] == 0 and labels["b.png"] == 1 and np.isnan(labels["c.png"])
    (tmp_path / "l.csv").write_text("p,x\n1,1\n1.0,0\n")
    with pytest.raises(InputError, match=r"l.csv, line 3: a second row of 1.0; remove one"):
        read_folder(tmp_path)
    (tmp_path / "l.csv").write_text("p,x\n8,1\n9,0\n")
    with pytest.raises(InputError, match=r"no row of .*l.csv has the p of a film; .* \(line \d+\)"):
        read_folder(tmp_path)
    (tmp_path / "l.csv").write_text("q,x\n1,1\n")
    with pytest.raises(
        InputError, match=r"l.csv = 'p', but .*l.csv has no such column; it has x: "
    ):
        read_folder(tmp_path)
    (tmp_path / "t.csv").unlink()
    with pytest.raises(InputError, match=r"table 't\.csv' is not there; tables beside it: l\.csv"):
        read_folder(tmp_path)


def test_marks_may_have_the_zeros_that_spreadsheets_add(tmp_path):
    marks = '[marks]\nuncertain = "-1"\nuncertain_is = "present"\nnone = "n"'
    (tmp_path / "films.toml").write_text(SMALL.format(columns="") + marks)
    rows = ["1,0;", "1.00;", "-1,0;", "0.000;", ";1,0", ";"]
    lines = [f"{k}.png;{k};{row}" for k, row in enumerate(rows)]
    (tmp_path / "t.csv").write_text("\n".join(["f;p;x;n", *lines]))
    labels = read_folder(tmp_path).table["X"].tolist()
    assert labels[:5] == [1, 1, 1, 0, 0] and np.isnan(labels[5])
    (tmp_path / "t.csv").write_text("f;p;x;n\na.png;1;;yes\n")
    with pytest.raises(InputError, match=r"column 'n' \(none of them\) holds 'yes'"):
        read_folder(tmp_path)


def test_only_what_is_blank_beside_no_finding_is_absent(tmp_path):
    """What is marked uncertain stays unknown."""
    folder = write(tmp_path, films=["a.png", "b.png"])
    lines = ["Film,Patient,Effusion,Mass,Normal", "a.png,1,-1,,1", "b.png,2,,1,0"]
    (folder / "table.csv").write_text("\n".join(lines))
    (folder / "films.toml").write_text("""
        table = "table.csv"
        [columns]
        image = "Film"
        patient = "Patient"
        [marks]
        uncertain = "-1"
        none = "Normal"
        [findings]
        Effusion = "Effusion"
        Mass = "Mass"
    """)
    found = read_folder(folder).table[["Effusion", "Mass"]]
    np.testing.assert_array_equal(found, [[np.nan, 0], [np.nan, 1]])


def test_a_film_without_a_row_in_the_table_of_labels_is_unknown(tmp_path):
    """Also where what is blank is absent."""
    folder = write(tmp_path, films=["a.png", "b.png"])
    (folder / "table.csv").write_text("Film,Patient\na.png,1\nb.png,2")
    (folder / "labels.csv").write_text("Film,Effusion,Mass\na.png,1,")
    (folder / "films.toml").write_text("""
        [tables]
        "table.csv" = ""
        [join]
        "labels.csv" = "Film"
        [columns]
        image = "Film"
        patient = "Patient"
        [marks]
        blank_is = "absent"
        [findings]
        Effusion = "Effusion"
        Mass = "Mass"
    """)
    found = read_folder(folder).table[["Effusion", "Mass"]]
    np.testing.assert_array_equal(found, [[1, 0], [np.nan, np.nan]])


@pytest.mark.parametrize(
    ("word", "sex"),
    [("M", "M"), ("female", "F"), ("Male", "M"), ("O", ""), ("nan", ""), ("Mujer", None)],
)
def test_a_sex_is_told_by_its_word_not_its_first_letter(tmp_path, word, sex):
    folder = write(tmp_path, films=["a.png"])
    (folder / "table.csv").write_text(f"Film,Patient,Sex,View,Mass\na.png,1,{word},Lateral,1")
    (folder / "films.toml").write_text("""
        table = "table.csv"
        [columns]
        image = "Film"
        patient = "Patient"
        sex = "Sex"
        view = "View"
        [findings]
        Mass = "Mass"
    """)
    if sex is None:
        with pytest.raises(
            InputError,
            match=r"line 2: sex 'Mujer'; write M or F.*`Mujer = \"F\"` under `\[values.sex\]`",
        ):
            read_folder(folder)
        return
    data = read_folder(folder)
    assert data.table["sex"].tolist() == [sex]
    assert check_table(data).set_index("check")["count"]["views neither PA nor AP"] == 1


@pytest.mark.parametrize("born", ["1950", "19501231", "1950-12-31", "31.12.1950", "1950.0"])
@pytest.mark.parametrize("date", ["20150301", "2015-03-01", "01/03/2015", "2015"])
def test_an_age_is_told_from_the_years_of_birth_and_film(tmp_path, born, date):
    mapping = SMALL.format(columns='born = "b"\ndate = "d"')
    (tmp_path / "t.csv").write_text(f"f,p,x,b,d\na.png,1,1,{born},{date}\nb.png,2,0,unknown,\n")
    (tmp_path / "films.toml").write_text(mapping)
    ages = read_folder(tmp_path).table["age"]
    assert ages[0] == 65 and np.isnan(ages[1])


def test_an_error_in_a_row_and_too_few_patients_end_with_status_2_before_any_notebook(
    tmp_path, capsys
):
    def run(table):
        films = [line.partition(";")[0] for line in table.splitlines()[1:]]
        data = write(tmp_path / "own", table=table, films=films)
        options = ["--profile", "demo", "--data", str(data), "--work", str(tmp_path / "work")]
        return main(["run", *options]), capsys.readouterr().err

    status, said = run(MARKS_TABLE.replace(";1;0;0;;0;0", ";1;0;2;;0;0"))
    assert status == 2 and said.count("\n") == 1
    assert "table.csv, line 2 (pictures/A-17/first.png): column 'Collapsed lung'" in said
    status, said = run(MARKS_TABLE)
    assert status == 2 and "none of 2 patients falls to " in said and "give more patients" in said
    assert not list((tmp_path / "work").rglob("*.ipynb"))


@pytest.mark.parametrize("sign", ["\n", "\r", "\u2028"])
def test_a_line_end_in_a_films_name_is_refused_and_elsewhere_a_blank(tmp_path, sign):
    lines = MARKS_TABLE.splitlines()
    name = lines[1].split(";")[0]
    folder = write(tmp_path / "name", table=MARKS_TABLE.replace(name, f'"a{sign}b.png"'))
    with pytest.raises(InputError, match=r"line 2: .* another control sign"):
        read_folder(folder)
    view = write(
        tmp_path / "view", table=MARKS_TABLE.replace(";PA;", f';"p{sign}a";', 1), films=[name]
    )
    assert "P A" in set(read_folder(view).table["view"])


def test_two_scanners_that_would_be_one_hospital_are_refused(tmp_path):
    folder = write_films(tmp_path, patients=4)
    table = (folder / "table.csv").read_text().replace("Room 1", "Room/0")
    (folder / "table.csv").write_text(table)
    with pytest.raises(InputError, match="'Room 0' and 'Room/0' would both be 'Room-0'"):
        read_folder(folder)
