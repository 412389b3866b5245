"""Where reading a data set stops: seldom, and then with the lines to write, in the file that it is."""

import re

import numpy as np
import pytest
from ownfilms import MARKS, MARKS_TABLE, WORDS, WORDS_TABLE, rows_of, write

from fedutils.base.errors import InputError
from fedutils.base.findings import findings_of
from fedutils.films.mapping import presets
from fedutils.films.read import read_folder

FIRST = MARKS_TABLE.partition("\n")[0]
NIH = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"


# --- tables as spreadsheets save them


@pytest.mark.parametrize("above", [
    "sep=;\n", '"sep=;"\r\n', "SEP=;\r\n",
    "\n\n", ";;;;;;;;;;;;\n", "Films of the ward, of 2020, 2021, 2022, all in all\n",
    "Films;;;;;;;;;;;;\n;;;;;;;;;;;;\nFile;of the ward;;;;;;;;;;;\n",
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_what_stands_above_the_header_and_the_encoding_change_nothing(tmp_path, above, encoding):
    expected = read_folder(write(tmp_path)).table
    (tmp_path / "table.csv").write_bytes((above + MARKS_TABLE).encode(encoding))
    assert read_folder(tmp_path).table.equals(expected)
    (tmp_path / "table.csv").write_bytes((above + MARKS_TABLE + "x.png;P\n").encode(encoding))
    line = (above + MARKS_TABLE).count("\n") + 1
    with pytest.raises(InputError, match=f"table.csv, line {line}: 2 cells, but the header has 13"):
        read_folder(tmp_path)


def test_a_separator_in_quotes_is_none_and_a_quoted_header_may_have_lines(tmp_path):
    expected = read_folder(write(tmp_path)).table
    header = '"Size, cm, of the film, about, by eye";"a, b, c, d, e, f, g, h, i, j";"On\ntop";'
    table = MARKS_TABLE.replace("File;", header + "File;").replace("pictures", "1;2;3;pictures")
    (tmp_path / "table.csv").write_text(table)
    assert read_folder(tmp_path).table.equals(expected)


def test_a_preset_is_recognised_below_a_title_and_whatever_the_separator(tmp_path):
    rows = "patientId,x,y,width,height,Target\na,1,2,3,4,1\nb,,,,,0\n"
    for text in (f"Labels, as of 2018\n{rows}", "sep=;\n" + rows.replace(",", ";")):
        (tmp_path / "stage_2_train_labels.csv").write_text(text)
        data = read_folder(tmp_path)
        assert data.release == "rsna" and data.table["Pneumonia"].tolist() == [1, 0]


def test_a_letter_cut_at_the_end_of_what_is_looked_at_hides_no_header(tmp_path):
    rows = "".join(f"{'Í' * 40}{k},No finding,R1\n" for k in range(1000))
    for shift in range(2):  # one of them cuts a letter; chexpert has a train.csv, too
        (tmp_path / "train.csv").write_text(f"image_id,class_name,rad_id{' ' * shift}\n{rows}")
        assert read_folder(tmp_path).release == "vinbigdata"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_a_mapping_is_read_as_windows_saves_it(tmp_path, encoding):
    (write(tmp_path) / "films.toml").write_bytes((MARKS + "# für uns\n").encode(encoding))
    assert len(read_folder(tmp_path).table) == 3


@pytest.mark.parametrize("content", [b"PK\x03\x04 of today", b"\xd0\xcf\x11\xe0 of old"])
def test_of_a_spreadsheet_it_is_said_to_save_it_as_csv(tmp_path, content):
    folder = write(tmp_path / "own")
    (folder / "table.csv").write_bytes(content)  # named as what it is not
    with pytest.raises(InputError, match=r"table\.csv: is a spreadsheet .* save its sheet as CSV"):
        read_folder(folder)
    (folder / "table.csv").rename(folder / "table.xlsx")
    with pytest.raises(InputError, match=r"tables beside it: none; open table\.xlsx and save its"):
        read_folder(folder)
    mapping = MARKS.replace("table.csv", "table.xlsx", 1)
    (folder / "films.toml").write_text(mapping)
    with pytest.raises(InputError, match=r"films\.toml: table = 'table\.xlsx'; .* save the sheet"):
        read_folder(folder)
    (folder / "films.toml").write_text(
        mapping.replace('table = "table.xlsx"', "[tables]\n'*.xlsx'=''")
    )
    with pytest.raises(InputError, match=r"table\.xlsx: is a spreadsheet .* save its sheet as CSV"):
        read_folder(folder)
    (folder / "films.toml").unlink()
    with pytest.raises(InputError, match=r"has no table; .*; open table\.xlsx and save its sheet"):
        read_folder(folder)


# --- what is written for present and absent


@pytest.mark.parametrize(("yes", "no"), [("Yes", "No"), ("ja", "nein"), ("TRUE", "FALSE")])
def test_of_marks_in_words_the_lines_that_read_them_are_said(tmp_path, yes, no):
    table = MARKS_TABLE.replace(";1;0;0;;0;0", f";{yes};{no};0;;?;0")
    folder = write(tmp_path, table=table)
    with pytest.raises(
        InputError, match=rf"line 2 .* holds '{yes}'; write 1 for present"
    ) as caught:
        read_folder(folder)
    lines = [f'present = ["1", "{yes}"]', f'absent = ["0", "{no}"]', 'uncertain = ["?"]']
    said = " and ".join(f"`{line}`" for line in lines) + f" under `[marks]` in {folder}/films.toml"
    assert str(caught.value).endswith(f"or write {said}")
    (folder / "films.toml").write_text("\n".join([MARKS, "[marks]", *lines]))
    labels = read_folder(folder).table.loc[0, ["Effusion", "Cardiomegaly", "Mass"]]
    np.testing.assert_array_equal(labels.astype(float), [1, 0, np.nan])


def test_of_a_presets_marks_the_file_to_write_is_said_and_odd_ones_are_escaped(tmp_path):
    (tmp_path / "stage_2_train_labels.csv").write_text(
        "patientId,x,y,width,height,Target\na,,,,,yes\nb,,,,,n\n"
    )
    said = 'a films.toml in the data\'s folder, below `preset = "rsna"`'
    with pytest.raises(InputError, match=re.escape(f"under `[marks]` in {said}")):
        read_folder(tmp_path)
    folder = write(tmp_path / "own", table=MARKS_TABLE.replace(";1;0;0;;0;0", ";\x1b[m;0;0;;0;0"))
    with pytest.raises(
        InputError, match=re.escape(r'if it means present, write `present = ["1", "\u001b[m"]`')
    ):
        read_folder(folder)


@pytest.mark.parametrize("word", ["Efusion", "bone age", "section", "a|b", 'a "b"'])
def test_of_an_unknown_word_the_lines_are_said_that_give_it_a_meaning(tmp_path, word):
    quoted = word.replace('"', '""')
    folder = write(tmp_path, WORDS, WORDS_TABLE.replace("normal", f'"{quoted}"'))
    with pytest.raises(InputError, match=r"line 3 .* holds the unknown word") as caught:
        read_folder(folder)
    alias, ignore = re.findall(
        r"write `(.*?)` under `\[(\w+)\]` in [^;]*films\.toml", str(caught.value)
    )
    (folder / "films.toml").write_text(f"{WORDS}[{alias[1]}]\n{alias[0]}\n")
    assert read_folder(folder).table.loc[1, "Effusion"] == 1
    (folder / "films.toml").write_text(re.sub("(?m)^ignore = .*", lambda _: ignore[0], WORDS))
    assert ignore[1] == "labels" and read_folder(folder).table.loc[1, "Effusion"] == 0


def test_of_a_presets_unknown_word_no_file_of_the_package_is_named(tmp_path):
    (tmp_path / "Data_Entry_2017.csv").write_text(NIH + "a.png,Moss,0,1,50,M,PA\n")
    with pytest.raises(InputError, match='`moss = "Mass"` under') as caught:
        read_folder(tmp_path)
    assert (
        str(caught.value).count('a films.toml in the data\'s folder, below `preset = "nih"`') == 2
    )
    assert "nih.toml" not in str(caught.value)


# --- a finding of a preset under a name of one's own


def test_a_finding_of_nih_is_renamed_with_its_boxes_and_other_spellings(tmp_path):
    rows = ["a.png,Effusion|Mass,0,1,50,M,PA", "b.png,Infiltrate,0,2,50,M,PA"]
    (tmp_path / "Data_Entry_2017.csv").write_text(NIH + "\n".join(rows))
    boxes = ["Image Index,Finding Label,Bbox [x,y,w,h],,,", "b.png,Infiltrate,1,2,3,4,,,"]
    (tmp_path / "BBox_List_2017.csv").write_text("\n".join([*boxes, "a.png,Effusion,1,2,3,4,,,"]))
    own = '[findings]\n"Pleural Effusion" = "effusion"\nShadow = "Infiltration"\nMass = ["Mass", "lump"]\n'
    (tmp_path / "films.toml").write_text('preset = "nih"\n' + own)
    data = read_folder(tmp_path)
    names = ["Pleural Effusion" if name == "Effusion" else "Shadow" if name == "Infiltration" else name
             for name in presets()["nih"].findings]  # fmt: skip
    assert findings_of(data.table) == names  # in their places
    table = data.table.set_index("image_index")
    assert table.loc["a.png", ["Pleural Effusion", "Mass"]].tolist() == [1, 1]
    assert table.loc["b.png", ["Shadow", "Mass"]].tolist() == [1, 0]
    assert data.boxes["finding"].tolist() == ["Shadow", "Pleural Effusion"]


@pytest.mark.parametrize("theirs", ["Effusion", "Pleural Effusion"])
def test_a_finding_of_marks_is_renamed_by_its_name_or_its_column(tmp_path, theirs):
    given = presets()["chexpert"].findings
    columns = ["Pleural Effusion" if name == "Effusion" else name for name in given]
    row = ",".join("1" if name == "Pleural Effusion" else "" for name in columns)
    (tmp_path / "train.csv").write_text(
        f"Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,{','.join(columns)}\n"
        f"CheXpert-v1.0/train/patient1/study2/view1_frontal.jpg,Female,68,Frontal,AP,,{row}\n"
    )
    own = f'[findings]\nFluid = "{theirs}"\nTubes = "Support Devices"\n'
    (tmp_path / "films.toml").write_text('preset = "chexpert"\n' + own)
    data = read_folder(tmp_path)
    names = {"Effusion": "Fluid", "Support Devices": "Tubes"}
    assert findings_of(data.table) == [names.get(name, name) for name in given]
    assert data.table["Fluid"].item() == 1 and data.mapping.section("marks")["spared"] == ["Tubes"]


@pytest.mark.parametrize("theirs", ["Airspace opacity", "Lung Opacity"])
def test_a_renamed_finding_of_a_preset_keeps_all_its_words(tmp_path, theirs):
    own = '[findings]\n"Pleural effusion" = "Effusion"\n"Lung mass" = "mass"\n'
    (tmp_path / "films.toml").write_text('preset = "padchest"\n' + own)
    columns = "ImageID,PatientID,Projection,PatientSex_DICOM,PatientBirth,StudyDate_DICOM,Labels"
    words = "\"['loculated fissural effusion', 'pulmonary mass']\""
    name = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
    (tmp_path / name).write_text(f"{columns}\na.png,1,PA,F,1950,20150101,{words}\n")
    assert read_folder(tmp_path).table[["Pleural effusion", "Lung mass"]].iloc[0].tolist() == [1, 1]
    (tmp_path / name).unlink()
    (tmp_path / "films.toml").write_text(
        f'preset = "google2019"\n[findings]\nAirspace = "{theirs}"\n'
    )
    header = NIH.strip().replace("Finding Labels,", "")
    (tmp_path / "google2019.csv").write_text(
        f"{header},Fracture,Pneumothorax,Airspace opacity,Nodule or mass\na.png,0,1,50,M,PA,NO,NO,YES,NO\n"
    )
    assert read_folder(tmp_path).table["Airspace"].tolist() == [1]


def test_words_of_which_some_alone_are_named_are_an_error_of_the_own_file(tmp_path):
    name = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
    (tmp_path / name).write_text("ImageID\n")
    own = 'preset = "padchest"\n[findings]\n"Ground glass" = "ground glass pattern"\n'
    (tmp_path / "films.toml").write_text(own)
    with pytest.raises(
        InputError, match=r"films\.toml: 'ground glass pattern' stands for two .* \(line 3\)"
    ):
        read_folder(tmp_path)


def test_a_choice_among_a_presets_findings_is_sent_to_the_parameter(tmp_path):
    (tmp_path / "Data_Entry_2017.csv").write_text(NIH)
    (tmp_path / "films.toml").write_text('preset = "nih"\nfindings = ["Mass", "Nodule"]\n')
    said = r"films\.toml: findings, without 'Infiltration'; choose some by .* \(line 2\)$"
    with pytest.raises(InputError, match=said):
        read_folder(tmp_path)


# --- names of films


@pytest.mark.parametrize(("named", "file"), [
    ("IMG_1.png", "img_1.PNG"), ("IMG_1.png", "deep/img_1.png"), ("P1/A.JPG", "p1/a.jpeg"),
])  # fmt: skip
def test_case_does_not_count_where_it_tells_no_films_apart(tmp_path, named, file):
    folder = write(
        tmp_path, table=rows_of(named, "z/z.png" if "/" in named else "z.png"), films=[file]
    )
    (folder / "train_list.txt").write_text(file)
    (folder / "test_list.txt").write_text(("z/" if "/" in named else "") + "Z.png")
    if file.startswith("deep"):
        (folder / "train_list.txt").write_text("img_1.png")
    film = read_folder(folder).table.set_index("image_index").loc[named]
    assert film["path"] == file and film["official_split"] == "train_val"


def test_where_case_tells_films_apart_each_is_its_own(tmp_path):
    data = read_folder(write(tmp_path, table=rows_of("a.png", "A.png"), films=["a.png", "A.png"]))
    assert data.table["path"].tolist() == ["A.png", "a.png"]
    other = write(tmp_path / "one", table=rows_of("a.png"), films=["a.png", "a.PNG", "A.png"])
    data = read_folder(other)  # the one that is named letter by letter
    assert data.table["path"].tolist() == ["a.png"]
    assert data.found["orphaned films"] == ["A.png", "a.PNG"]


def test_where_case_leaves_open_which_film_it_is_both_are_named(tmp_path):
    folder = write(tmp_path / "files", table=rows_of("IMG.png"), films=["img.png", "Img.PNG"])
    with pytest.raises(
        InputError, match=r"'Img\.PNG' and 'img\.png' may both be 'IMG\.png' of the"
    ):
        read_folder(folder)
    folder = write(tmp_path / "rows", table=rows_of("IMG.png", "img.png"), films=["Img.png"])
    with pytest.raises(
        InputError, match=r"'Img\.png' may be 'IMG\.png' or 'img\.png' of the table"
    ):
        read_folder(folder)
    folder = write(tmp_path / "lists", table=rows_of("IMG.png", "img.png"))
    (folder / "test_list.txt").write_text("Img.png")
    with pytest.raises(InputError, match=r"test_list\.txt: 'Img\.png' may be 'IMG\.png' or"):
        read_folder(folder)
    films = ["x/img.png", "y/IMG.PNG"]
    with pytest.raises(InputError, match="lies in more than one folder"):
        read_folder(write(tmp_path / "folders", table=rows_of("img.png"), films=films))


def test_a_film_that_keep_leaves_out_is_not_taken_for_one_of_another_case(tmp_path):
    mapping = MARKS + '[keep]\nProjection = "PA"\n'
    table = rows_of("a.png", "b.png") + rows_of("A.png").splitlines()[1].replace(";PA;", ";LL;")
    data = read_folder(write(tmp_path, mapping, table, ["A.png", "b.png"]))
    assert data.table["path"].tolist() == ["", "b.png"]
