import gzip
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedutils.base.errors import InputError
from fedutils.base.findings import format_labels
from fedutils.films.cells import one_spelling
from fedutils.films.check import check_table, summary
from fedutils.films.decode import decode_film
from fedutils.films.find import describe_files, find_data
from fedutils.films.phantom.cases import FINDINGS
from fedutils.films.read import read_folder
from fedutils.films.sources import open_data

UNQUOTED = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
SAMPLE = UNQUOTED.replace("[Width,Height]", "Width,OriginalImageHeight").replace(
    "Spacing[x,y]", "Spacing_x,OriginalImagePixelSpacing_y"
)
QUOTED = UNQUOTED.replace("OriginalImage[Width,Height]", '"OriginalImage[Width,Height]"')
FIRST = "00000013_000.png,Effusion|Mass,0,13,060Y,M,PA,2500,2048,0.14300000000000002,0.143"
SECOND = "00000002_000.png,No Finding,1,00002,61,F,AP,3056,2544,0.194311,0.194311"


def write(folder, header=UNQUOTED, rows=(FIRST, SECOND), name="Data_Entry_2017_v2020.csv"):
    """Write a small data folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return folder


def add_film(folder, path):
    """Put an empty file where a film belongs."""
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).touch()


def count(data, check):
    """How often a check hit."""
    return check_table(data).set_index("check").loc[check, "count"]


@pytest.fixture(autouse=True)
def no_data_dir_from_outside(monkeypatch):
    monkeypatch.delenv("NIH_DATA_DIR", raising=False)


# --- reading every variant


@pytest.mark.parametrize("header", [UNQUOTED, SAMPLE, QUOTED, UNQUOTED.replace("Gender", "Sex")])
def test_every_header_form_gives_the_same_table(tmp_path, header):
    table = read_folder(write(tmp_path, header)).table
    assert list(table["image_index"]) == ["00000002_000.png", "00000013_000.png"]
    assert list(table["patient_id"]) == ["2", "13"]
    assert list(table["follow_up"]) == [1, 0]
    assert list(table["age"]) == [61.0, 60.0]
    assert list(table["sex"]) == ["F", "M"]
    assert list(table["view"]) == ["AP", "PA"]
    assert list(table["width"]) == [3056, 2500]
    assert list(table["height"]) == [2544, 2048]
    assert list(table["scanner"]) == ["0.194", "0.143"]
    assert table["Effusion"].tolist() == [0, 1] and table["Mass"].tolist() == [0, 1]
    assert table[list(FINDINGS)].to_numpy().sum() == 2
    assert set(table[list(FINDINGS)].dtypes) == {np.dtype("float32")}


@pytest.mark.filterwarnings("ignore:Length of header")  # pandas drops the empty last column
@pytest.mark.parametrize("comma", ["", ","])
@pytest.mark.parametrize("header_comma", ["", ","])
def test_a_comma_at_the_end_of_a_line_moves_no_column(tmp_path, comma, header_comma):
    rows = (FIRST + comma, SECOND + comma)
    table = read_folder(write(tmp_path, UNQUOTED + header_comma, rows)).table
    assert list(table["patient_id"]) == ["2", "13"]
    assert list(table["scanner"]) == ["0.194", "0.143"]


@pytest.mark.parametrize("header_comma", ["", ","])
@pytest.mark.parametrize(("old", "new"), [
    ("Effusion|Mass", '"Effusion, Mass"'), (",0.143", ',"0,143"'), ("M,PA", "M,x,PA"),
])  # fmt: skip
def test_a_cell_too_many_is_named_with_its_line_and_shifts_nothing(
    tmp_path, old, new, header_comma
):
    folder = write(tmp_path, UNQUOTED + header_comma, (SECOND, FIRST.replace(old, new)))
    with pytest.raises(InputError, match=r"v2020\.csv, line 3: 1[23] cells, but the header has 11"):
        read_folder(folder)


def test_windows_line_ends_a_byte_order_mark_and_blank_lines_are_read(tmp_path):
    text = "\r\n".join(["\ufeff" + UNQUOTED, FIRST, "", SECOND, "", ""])
    (tmp_path / "Data_Entry_2017.csv").write_text(text, newline="")
    assert list(read_folder(tmp_path).table["sex"]) == ["F", "M"]


def test_a_gzipped_table_reads_like_the_plain_one(tmp_path):
    plain = write(tmp_path / "plain")
    packed = gzip.compress((plain / "Data_Entry_2017_v2020.csv").read_bytes())
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "Data_Entry_2017_v2020.csv.gz").write_bytes(packed)
    assert read_folder(tmp_path / "packed").table.equals(read_folder(plain).table)


@pytest.mark.parametrize(
    ("text", "years"), [("060Y", 60), ("018M", 1.5), ("007D", 7 / 365.25), ("58", 58), ("414", 414)]
)
def test_ages_become_years(tmp_path, text, years):
    table = read_folder(write(tmp_path, rows=[FIRST.replace("060Y", text)])).table
    assert table["age"].item() == pytest.approx(years)


@pytest.mark.parametrize(
    ("spacing", "scanner"),
    [
        ("0.14300000000000002", "0.143"),
        ("0.193754", "0.194"),
        ("0.19431099999999998", "0.194"),
        ("0.171001", "0.171"),
        ("0.2", "0.200"),
        ("", ""),
    ],
)
def test_the_scanner_is_named_after_the_pixel_spacing(tmp_path, spacing, scanner):
    row = FIRST.replace("0.14300000000000002", spacing)
    assert read_folder(write(tmp_path, rows=[row])).table["scanner"].item() == scanner


def test_a_table_without_pixel_spacing_has_no_scanners(tmp_path):
    header = UNQUOTED.replace(",OriginalImagePixelSpacing[x,y]", "")
    rows = [",".join(FIRST.split(",")[:-2])]
    data = read_folder(write(tmp_path, header, rows))
    assert data.table["scanner"].item() == "" and np.isnan(data.table["spacing"].item())
    assert "pixel spacing" in summary(data)["missing"]


def test_other_hospitals_patient_ids_stay_text(tmp_path):
    rows = [FIRST.replace(",13,", ",00A7,"), SECOND]
    assert sorted(read_folder(write(tmp_path, rows=rows)).table["patient_id"]) == ["00A7", "2"]


@settings(max_examples=20, deadline=None)
@given(present=st.lists(st.booleans(), min_size=14, max_size=14))
def test_a_label_string_survives_the_round_trip(tmp_path_factory, present):
    said = format_labels(dict(zip(FINDINGS, present, strict=True)))
    folder = write(tmp_path_factory.mktemp("a"), rows=[FIRST.replace("Effusion|Mass", said)])
    assert read_folder(folder).table[list(FINDINGS)].iloc[0].tolist() == present


@settings(max_examples=20, deadline=None)
@given(rows=st.permutations(range(6)))
def test_the_order_of_the_rows_does_not_matter(tmp_path_factory, rows):
    lines = [FIRST.replace("00000013_000", f"00000013_00{i}") for i in range(6)]
    straight = write(tmp_path_factory.mktemp("a"), rows=lines)
    mixed = write(tmp_path_factory.mktemp("b"), rows=[lines[i] for i in rows])
    assert read_folder(straight).table.equals(read_folder(mixed).table)


# --- films, lists, boxes, release


@pytest.mark.parametrize(
    "path",
    [
        "images_001/images/00000013_000.png",
        "images/00000013_000.png",
        "images_001/00000013_000.png",
        "sample/images/00000013_000.png",
        "00000013_000.png",
    ],
)
def test_films_are_found_in_every_folder_layout(tmp_path, path):
    add_film(write(tmp_path), path)
    data = read_folder(tmp_path)
    assert list(data.table["path"]) == ["", path]
    assert data.films_present == 1
    assert count(data, "missing films") == 1


def test_orphaned_and_double_films_are_counted(tmp_path):
    write(tmp_path)
    for path in ("images/x.png", "images_001/images/00000013_000.png", "images/00000013_000.png"):
        add_film(tmp_path, path)
    data = read_folder(tmp_path)
    assert count(data, "orphaned films") == 1 and count(data, "films in two folders") == 1
    assert data.table["path"].iloc[1] == "images/00000013_000.png"


@pytest.mark.parametrize("work", [".", "work"])
def test_figures_of_runs_in_the_data_folder_are_no_films(tmp_path, work):
    write(tmp_path)
    add_film(tmp_path, "images/x.png")
    add_film(tmp_path, f"{work}/runs/A/evaluation/auroc.png")
    data = open_data(str(tmp_path), tmp_path / work)
    assert data.found["orphaned films"] == ["x.png"]
    said = describe_files(tmp_path, tmp_path / work)
    assert said.startswith("it holds 1 x .png such as images/x.png;")


def test_a_name_that_is_not_nihs_and_lies_twice_is_refused(tmp_path):
    write(tmp_path, rows=[FIRST.replace("00000013_000", "1")])
    for path in ("images/7/1.png", "images/8/1.png"):
        add_film(tmp_path, path)
    with pytest.raises(InputError, match=r"line 2: '1\.png' lies in more than one folder"):
        read_folder(tmp_path)


def test_the_same_number_as_a_fraction_is_the_same_patient(tmp_path):
    data = read_folder(write(tmp_path, rows=[FIRST, SECOND.replace(",00002,", ",13.0,")]))
    assert set(data.table["patient_id"]) == {"13"}
    assert count(data, "patients in several spellings") == 1


def test_split_lists_are_read_without_their_last_newline(tmp_path):
    write(tmp_path)
    (tmp_path / "train_val_list.txt").write_text("00000013_000.png\nunknown.png\n")
    (tmp_path / "test_list.txt").write_text("00000002_000.png")
    data = read_folder(tmp_path)
    assert list(data.table["official_split"]) == ["test", "train_val"]
    assert count(data, "list names without row") == 1
    assert count(data, "rows in no list") == 0


def test_a_film_in_both_lists_is_never_trained_on(tmp_path):
    write(tmp_path)
    for name in ("train_val_list.txt", "test_list.txt"):
        (tmp_path / name).write_text("00000013_000.png\n")
    data = read_folder(tmp_path)
    assert list(data.table["official_split"]) == ["", "test"]
    assert count(data, "rows in both lists") == 1 and count(data, "rows in no list") == 1


def test_without_lists_no_row_is_reported_as_unlisted(tmp_path):
    assert count(read_folder(write(tmp_path)), "rows in no list") == 0


def test_boxes_say_infiltration_whatever_the_file_says(tmp_path):
    write(tmp_path)
    lines = ["Image Index,Finding Label,Bbox [x,y,w,h],,,", "a.png,Infiltrate,1.5,2,3,4,,,"]
    (tmp_path / "BBox_List_2017.csv").write_text("\n".join(lines))
    data = read_folder(tmp_path)
    assert data.boxes.to_dict("records") == [
        {"image_index": "a.png", "finding": "Infiltration", "x": 1.5, "y": 2, "w": 3, "h": 4}
    ]
    assert count(data, "boxes without row") == 1


def test_a_box_without_four_numbers_is_an_error_that_names_the_line(tmp_path):
    write(tmp_path)
    (tmp_path / "BBox_List_2017.csv").write_text(
        "i,f,x,y,w,h\na.png,Mass,1,2,3,4\nb.png,Mass,1,2,,4"
    )
    with pytest.raises(InputError, match=r"BBox_List_2017.csv, line 3"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "header", "release"),
    [
        ("Data_Entry_2017_v2020.csv", UNQUOTED, "2020"),
        ("Data_Entry_2017.csv", UNQUOTED + ",", "2017"),
        ("Data_Entry_2017.csv", UNQUOTED, "unknown"),
        ("Data_Entry_mine.csv", UNQUOTED, "unknown"),
        ("sample_labels.csv", SAMPLE, "sample"),
    ],
)
def test_the_label_release_is_named_or_called_unknown(tmp_path, name, header, release):
    assert read_folder(write(tmp_path, header, name=name)).release == release


def test_a_phantom_is_never_taken_for_patients(tmp_path):
    (write(tmp_path) / "PHANTOM.json").write_text("{}")
    assert read_folder(tmp_path).release == "phantom"


def test_the_newer_table_is_read_and_the_other_one_named(tmp_path):
    write(tmp_path)
    write(tmp_path, name="Data_Entry_2017.csv", rows=[FIRST])
    data = read_folder(tmp_path)
    assert data.table_file == "Data_Entry_2017_v2020.csv" and count(data, "other tables") == 1


# --- checks


def test_duplicate_rows_keep_the_first_and_say_whether_they_disagree(tmp_path):
    again = FIRST.replace("Effusion|Mass", "Hernia")
    data = read_folder(write(tmp_path, rows=[FIRST, SECOND, SECOND, again]))
    assert data.table["image_index"].is_unique and data.table["Hernia"].sum() == 0
    assert count(data, "duplicate rows") == 2
    assert count(data, "duplicate rows that disagree") == 1


def test_impossible_ages_and_two_sexes_are_counted(tmp_path):
    rows = [
        SECOND,
        SECOND.replace("_000", "_001").replace(",F,", ",M,").replace(",61,", ",414,"),
        SECOND.replace("_000", "_002").replace(",61,", ",0,"),
        SECOND.replace("_000", "_003").replace(",61,", ",old,"),
    ]
    data = read_folder(write(tmp_path, rows=rows))
    assert count(data, "ages out of range") == 2 and count(data, "ages unreadable") == 1
    assert count(data, "patients with two sexes") == 1


def test_other_spellings_are_read_and_counted(tmp_path):
    rows = [FIRST.replace("Effusion|Mass", "Mass|Effusion"), SECOND.replace("No F", "No_F")]
    data = read_folder(write(tmp_path, rows=rows))
    assert data.table["Mass"].sum() == 1
    assert count(data, "labels in another spelling") == 1


def test_the_summary_tells_what_is_there_and_what_is_missing(tmp_path):
    told = summary(read_folder(write(tmp_path)))
    assert (told["films"], told["films_present"], told["patients"]) == (2, 0, 2)
    assert told["views"] == {"PA": 1, "AP": 1} and told["release"] == "2020"
    assert told["missing"] == ["films", "split lists", "boxes"]


# --- errors name the file, the row and what was found


@pytest.mark.parametrize("column", ["Finding Labels", "Patient ID", "Patient Age", "View Position"])
def test_a_missing_column_is_named_beside_those_found(tmp_path, column):
    at = UNQUOTED.split(",").index(column)
    header, row = (
        ",".join(text.split(",")[:at] + text.split(",")[at + 1 :]) for text in (UNQUOTED, FIRST)
    )
    said = rf"nih.toml: \w+ = '{column}', but .*v2020.csv has no such column; it has Image .*\(line"
    with pytest.raises(InputError, match=said):
        read_folder(write(tmp_path, header, [row]))


@pytest.mark.parametrize("wrong", ["Pleural thickening", "Effusions", "Mass;Nodule"])
def test_an_unknown_finding_is_an_error_that_names_the_row(tmp_path, wrong):
    rows = [SECOND, FIRST.replace("Effusion|Mass", wrong)]
    with pytest.raises(InputError, match=r"v2020.csv, line 3 \(00000013_000.png\): .*unknown word"):
        read_folder(write(tmp_path, rows=rows))


def test_blank_lines_do_not_shift_the_row_number(tmp_path):
    rows = [SECOND, "", FIRST.replace("Mass", "Moss")]
    with pytest.raises(InputError, match="line 4 "):
        read_folder(write(tmp_path, rows=rows))


def test_no_finding_beside_a_finding_is_an_error(tmp_path):
    rows = [FIRST.replace("Mass", "No Finding")]
    with pytest.raises(InputError, match=r"line 2 .*stands beside a finding"):
        read_folder(write(tmp_path, rows=rows))


def test_a_row_without_a_patient_is_an_error(tmp_path):
    with pytest.raises(InputError, match="line 3: no image index or no patient id"):
        read_folder(write(tmp_path, rows=[FIRST, "00000002_000.png,No Finding"]))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n\xff\x00", UNQUOTED.encode() + b"\n"])
def test_a_file_that_is_no_table_is_named(tmp_path, content):
    (tmp_path / "Data_Entry_2017.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"Data_Entry_2017.csv") as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


# --- finding the data


def test_without_any_data_the_phantom_is_used(tmp_path):
    assert find_data("", kaggle=tmp_path / "none") is None


def test_the_argument_comes_before_the_environment_and_that_before_kaggle(tmp_path, monkeypatch):
    given, environment = write(tmp_path / "given"), write(tmp_path / "environment")
    mount = write(tmp_path / "input" / "data")
    kaggle = tmp_path / "input"
    assert find_data("", kaggle) == mount
    monkeypatch.setenv("NIH_DATA_DIR", str(environment))
    assert find_data("", kaggle) == environment
    assert find_data(str(given), kaggle) == given


@pytest.mark.parametrize(
    "mount",
    ["data", "datasets/nih-chest-xrays/data", "datasets/organizations/nih-chest-xrays/data"],
)
def test_every_kaggle_mount_is_found_without_entering_image_folders(tmp_path, mount):
    folder = write(tmp_path / mount)
    write(tmp_path / "images_001")
    write(tmp_path / "sample", SAMPLE, name="sample_labels.csv")
    (write(tmp_path / "earlier-output") / "PHANTOM.json").write_text("{}")
    assert find_data("", tmp_path) == folder


def test_the_mount_is_not_searched_without_bound(tmp_path):
    write(tmp_path / "a/b/c/d/e/f")
    assert find_data("", tmp_path) is None


@pytest.mark.parametrize("how", ["missing", "empty", "file", "no table"])
def test_a_folder_that_cannot_be_used_is_an_error_that_says_why(tmp_path, how):
    folder = tmp_path / "given"
    if how == "file":
        folder.write_text("")
    elif how != "missing":
        folder.mkdir()
    if how == "no table":
        (folder / "notes.txt").touch()
    said = {"empty": "is empty", "no table": "has no table; it holds notes.txt"}
    with pytest.raises(InputError, match=f"data_dir: .*{said.get(how, 'cannot be read')}.*; give"):
        find_data(str(folder))


def test_an_error_about_the_environment_names_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("NIH_DATA_DIR", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"NIH_DATA_DIR: .*gone"):
        find_data()


def test_a_folder_one_level_too_high_is_told_where_the_table_is(tmp_path):
    inner = write(tmp_path / "download" / "nih")
    with pytest.raises(InputError, match=f"there is one in {inner}: give that folder"):
        find_data(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
@pytest.mark.parametrize("locked", ["folder", "table"])
def test_without_permission_to_read_the_error_says_so(tmp_path, locked):
    write(tmp_path / "given")
    path = tmp_path / "given" / ("" if locked == "folder" else "Data_Entry_2017_v2020.csv")
    path.chmod(0)
    try:
        with pytest.raises(InputError, match=r"cannot be read.*Permission denied"):
            read_folder(tmp_path / "given")
    finally:
        path.chmod(0o700)


# --- real files


def test_the_whole_table_is_read_and_checked_in_30_times_what_pandas_takes(nih_test_data: Path):
    file = read_folder(nih_test_data / "nih_meta").table_file
    start = time.process_time()
    pd.read_csv(nih_test_data / "nih_meta" / file, dtype=str, index_col=False)
    bare = time.process_time() - start
    start = time.process_time()
    data = read_folder(nih_test_data / "nih_meta")
    checks = check_table(data).set_index("check")["count"]
    told = summary(data)
    assert time.process_time() - start < 30 * bare
    assert (told["films"], told["patients"], told["boxes"]) == (112_120, 30_805, 984)
    assert data.table["Pneumonia"].sum() == 1_431 and data.table["Hernia"].sum() == 227
    assert told["release"] == "2020" and checks["missing films"] == 112_120


def test_the_real_2017_sample_reads_with_lists_boxes_and_two_image_folders(nih_test_data: Path):
    data = read_folder(nih_test_data / "nih_sample")
    assert summary(data)["lists"] == {"train_val": 64, "test": 16}
    assert data.release == "2017" and data.films_present == 80 and len(data.boxes) == 19
    assert set(data.boxes["finding"]) <= set(FINDINGS)
    assert check_table(data)["count"].sum() == 0


def test_the_real_64_pixel_set_reads_without_lists(nih_test_data: Path):
    data = read_folder(nih_test_data / "nih64")
    assert data.films_present == len(data.table) == 690
    assert data.table["patient_id"].nunique() == 249
    assert (data.table[list(FINDINGS)].sum() > 0).all()
    assert summary(data)["missing"] == ["split lists", "boxes"]


def test_numbers_that_may_be_thousands_and_letters_that_differ_stay_apart():
    ids = pd.Series(
        ["1", "1.0", "1.00", "01", "1,0", "1,000", "1.000", "x2", "x²", "Weiß", "Weiss", "A", "a "]
    )
    assert one_spelling(ids).tolist() == [
        "1", "1", "1", "1", "1", "1,000", "1.000", "x2", "x²", "Weiß", "Weiss", "A", "A"
    ]  # fmt: skip


@pytest.mark.parametrize("sign", ["\u200b", "\u2060\u200b"])
def test_an_id_of_nothing_visible_is_none(tmp_path, sign):
    write(tmp_path, rows=[FIRST.replace(",13,", f",{sign},")])
    with pytest.raises(InputError, match="line 2: no image index or no patient id"):
        read_folder(tmp_path)


def test_a_split_list_names_a_film_a_line(tmp_path):
    write(tmp_path, rows=[FIRST.replace("00000013_000", "film 13"), SECOND])
    (tmp_path / "test_list.txt").write_text("film 13.png\r\n\n")
    (tmp_path / "train_val_list.txt").write_text(" 00000002_000.png \n")
    assert read_folder(tmp_path).table["official_split"].tolist() == ["train_val", "test"]


def test_nihs_name_at_two_sites_with_rows_that_disagree_is_refused(tmp_path):
    write(tmp_path, rows=[FIRST, FIRST.replace("Effusion|Mass", "Hernia")])
    for site in "ab":
        add_film(tmp_path, f"{site}/00000013_000.png")
    with pytest.raises(InputError, match="lies in more than one folder, and its rows disagree"):
        read_folder(tmp_path)


def test_links_that_lead_back_end_and_a_pipe_is_no_film(tmp_path):
    write(tmp_path)
    add_film(tmp_path, "images/00000013_000.png")
    for name in ("a", "b", "images/c"):
        (tmp_path / name).symlink_to(tmp_path)
    os.mkfifo(tmp_path / "images/00000002_000.png")
    began = time.monotonic()
    data = read_folder(tmp_path, tmp_path / "work")
    assert describe_files(tmp_path, None).startswith("it holds 2 x .png")
    assert data.found["films in two folders"] == []
    pixels, seen = decode_film(tmp_path / "images/00000002_000.png", 32)
    assert pixels is None and "no film" in seen["problem"] and time.monotonic() - began < 10


def test_a_name_that_is_no_text_is_written_out(tmp_path):
    write(tmp_path)
    (tmp_path / os.fsdecode(b"orph\xe4n.png")).touch()
    (name,) = read_folder(tmp_path).found["orphaned films"]
    assert name.encode() == b"orph\\udce4n.png"


def test_a_number_of_visits_that_none_has_is_unreadable(tmp_path):
    write(tmp_path, rows=[FIRST.replace(",0,13,", ",1e30,13,")])
    assert read_folder(tmp_path).table["follow_up"].tolist() == [-1]
