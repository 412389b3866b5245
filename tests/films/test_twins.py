"""Near-equal films of two patients are found however the copy was made, and other films are not."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from fedutils.base.errors import InputError
from fedutils.dataset import read_index
from fedutils.films import twins
from fedutils.films.decode import decode_films, write_index
from fedutils.films.phantom.cases import FINDINGS, phantom_table, to_films
from fedutils.films.phantom.write import draw_batch
from fedutils.films.twins import find_twins, hash_films
from fedutils.settings import read_parameters

DRAWN = [str(film.patient) for film in to_films(phantom_table(60, 0))[:60]]


def about(count, patients=None, split="train"):
    """An index of films, each of its own patient unless told otherwise."""
    index = pd.DataFrame({"row": np.arange(count), "image_index": np.arange(count).astype(str)})
    patients = index["image_index"] if patients is None else patients
    return index.assign(patient_id=patients, split=split)


def store(films, size=64):
    """What notebook 02 makes of films."""
    shape = (size, size), Image.Resampling.BILINEAR
    return np.stack([np.asarray(film.convert("L").resize(*shape)) for film in films])


def packed(film, quality):
    """Save as JPEG and open again."""
    file = io.BytesIO()
    film.save(file, "JPEG", quality=quality)
    return Image.open(file)


def cut(film, left, top, right, bottom):
    """Cut shares of the sides off."""
    w, h = film.size
    return film.crop((left * w, top * h, w - right * w, h - bottom * h))


def stamped(film):
    """Write over a corner."""
    film = film.copy()
    film.paste(255, (0, 0, film.width // 5, film.height // 10))
    return film


COPIES = {
    "packed": lambda film: packed(film, 50),
    "small": lambda film: film.resize((64, 64), Image.Resampling.LANCZOS),
    "other shape": lambda film: film.resize((300, 200), Image.Resampling.BILINEAR),
    "brighter": lambda film: film.point(lambda grey: grey + 30),
    "less contrast": lambda film: film.point(lambda grey: int(grey * 0.6 + 40)),
    "gamma": lambda film: film.point(lambda grey: int(255 * (grey / 255) ** 1.5)),
    "equalised": ImageOps.equalize,
    "turned": lambda film: film.rotate(1, Image.Resampling.BILINEAR),
    "stamped": stamped,
    "cut on all sides": lambda film: cut(film, 0.04, 0.04, 0.04, 0.04),
    "cut on some sides": lambda film: cut(film, 0.01, 0, 0, 0.005),
    "all at once": lambda film: packed(
        cut(film, 0.01, 0.01, 0, 0.005).point(lambda grey: int(grey * 0.9 + 15)), 70
    ),
}


@pytest.fixture(scope="module")
def drawn():
    return [Image.fromarray(film) for film in draw_batch(60, size=256)]


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_found_however_it_was_made_and_nothing_else_is(drawn, how):
    copies = [COPIES[how](film) for film in drawn[:20]]
    found = find_twins(
        store([*drawn, *copies]),
        about(80, [*DRAWN, *"abcdefghijklmnopqrst"], ["train"] * 60 + ["test"] * 20),
    )
    right = set(zip(map(str, range(20)), map(str, range(60, 80)), strict=True))
    pairs = set(zip(found["film"], found["twin"], strict=True))
    assert pairs <= right and len(pairs) >= (16 if how == "all at once" else 19)
    assert found["two_splits"].all()


def test_different_films_and_films_of_one_patient_are_not_named(drawn):
    films = store(drawn)
    assert find_twins(films, about(60, DRAWN)).empty
    assert find_twins(films.repeat(2, axis=0), about(120, np.repeat(DRAWN, 2))).empty
    assert find_twins(films, about(60)[:0]).empty


def test_an_id_stands_for_two_patients_in_two_sources(drawn):
    films = store(drawn[:20]).repeat(2, axis=0)
    index = about(40, np.repeat(np.arange(20), 2))
    assert find_twins(films, index).empty
    assert len(find_twins(films, index.assign(source=["ours", "theirs"] * 20))) == 20


def test_flat_films_are_like_no_other():
    blank = np.full((3, 64, 64), 128, np.uint8)
    blank[1:, 50:60, 50:60] = 255  # the same small stamp
    assert find_twins(blank, about(3)).empty
    assert not hash_films(blank)[0].any()


@pytest.mark.parametrize("size", [32, 50, 224])
def test_films_are_found_in_a_store_of_any_size_and_in_any_blocks(drawn, monkeypatch, size):
    copies = [COPIES["packed"](film) for film in drawn[:20]]
    films = store([*drawn, *copies], size)
    index = about(80, [*DRAWN, *"abcdefghijklmnopqrst"])
    whole = find_twins(films, index)
    assert len(whole) == 20 and not whole["two_splits"].any()
    monkeypatch.setattr(twins, "COMPARED", 7)
    assert find_twins(films, index).equals(whole)


def test_the_report_names_twins_and_drop_leaves_them_out(tmp_path, drawn):
    copies = [*drawn[:6], packed(drawn[0], 60), drawn[1].resize((90, 90))]
    patients = [*"abcdefgh"]
    for patient, film in zip(patients, copies, strict=True):
        film.convert("L").save(tmp_path / f"{patient}.png")
    names = [f"{patient}.png" for patient in patients]
    table = pd.DataFrame(
        {"image_index": names, "path": names, "source": "", "patient_id": patients}
    )
    table[["follow_up", "age", "sex", "view", "scanner"]] = [0, 50.0, "F", "PA", "0.143"]
    table = table.assign(
        **dict.fromkeys(FINDINGS, np.float32(0)),
        split=["train", "train", "train", "train", "val", "test", "train", "test"],
    )
    boxes = pd.DataFrame(columns=["image_index", "finding", *"xywh"])
    seen = {}
    for what in ("keep", "drop"):
        films = decode_films(table, tmp_path, tmp_path / what, 64)
        told = {"image_size": 64, "twins": what}
        seen[what] = write_index(table, films, boxes, tmp_path / what, told)
    pairs = [["a.png", "g.png", False], ["b.png", "h.png", True]]
    assert seen["keep"]["near_equal"] == seen["drop"]["near_equal"] == pairs
    assert seen["keep"]["duplicates"] == [] and seen["keep"]["films"] == 8
    assert read_index(tmp_path / "drop")["image_index"].tolist() == names[2:6]
    assert seen["keep"]["fingerprint"] != seen["drop"]["fingerprint"]


def test_only_keep_and_drop_are_allowed():
    assert read_parameters({"profile": "demo"}).twins == "keep"
    with pytest.raises(InputError, match="twins='some': allowed are keep, drop"):
        read_parameters({"profile": "demo", "twins": "some"})


def test_of_690_real_films_none_is_near_another_patients_and_each_copy_is_found(nih_test_data):
    table = pd.read_csv(nih_test_data / "nih64/Data_Entry_2017_v2020.csv", dtype=str)
    films = [Image.open(nih_test_data / "nih64/images" / name) for name in table["Image Index"]]
    films, patients = [film.convert("L") for film in films], table["Patient ID"].tolist()
    assert find_twins(store(films), about(690, patients=patients)).empty
    for how, least in {"packed": 688, "brighter": 688, "cut on some sides": 680}.items():
        copies = [COPIES[how](film) for film in films]
        both = about(1380, patients=patients + [f"{patient}, again" for patient in patients])
        found = find_twins(store([*films, *copies]), both)
        exact = found["film"].astype(int) + 690 == found["twin"].astype(int)
        assert exact.sum() >= least, how
        others = found[~exact]  # copies of two films of one patient
        ids = [np.array(patients)[others[name].astype(int) % 690] for name in ("film", "twin")]
        assert (ids[0] == ids[1]).all(), how
