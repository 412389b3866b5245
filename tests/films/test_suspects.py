"""Films that look wrong are named, and hardly any other."""

import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedutils.base.errors import InputError
from fedutils.dataset import read_index
from fedutils.films.decode import decode_films, write_index
from fedutils.films.phantom.cases import FINDINGS
from fedutils.films.phantom.write import draw_batch
from fedutils.films.suspects import find_suspects, mean_films
from fedutils.settings import read_parameters

CHANGES = {
    "inverted": lambda films: 255 - films,
    "turned by 90 degrees": lambda films: np.rot90(films, 1, (1, 2)),
    "turned by 180 degrees": lambda films: np.rot90(films, 2, (1, 2)),
    "turned by 270 degrees": lambda films: np.rot90(films, 3, (1, 2)),
    "inverted and turned by 90 degrees": lambda films: 255 - np.rot90(films, 1, (1, 2)),
    "mirrored": lambda films: films[:, :, ::-1],
    "blank": lambda films: films // 128,
    "unlike a frontal chest film": lambda films: films[:, 32:, 32:].repeat(2, 1).repeat(2, 2),
}


@pytest.fixture(scope="module")
def drawn():
    return draw_batch(200, size=64)


@pytest.fixture(scope="module")
def real(nih_test_data):
    """NIH's 690 films at 64 pixels, and whose they are."""
    table = pd.read_csv(nih_test_data / "nih64/Data_Entry_2017_v2020.csv", dtype=str)
    folder = nih_test_data / "nih64/images"
    films = [np.asarray(Image.open(folder / name).convert("L")) for name in table["Image Index"]]
    return np.stack(films), table["Patient ID"].to_numpy()


def about(patients):
    count = len(patients)
    index = {"row": np.arange(count), "image_index": np.arange(count), "patient_id": patients}
    return pd.DataFrame(index)


def words(films, patients=None):
    """What is said of each film."""
    patients = np.arange(len(films)) if patients is None else patients
    found = find_suspects(films, about(patients)).set_index("film")["suspect"]
    return found.reindex(range(len(films)), fill_value="").to_numpy()


def planted(films, how, share, seed):
    """Change a share of films; return all, and which were changed."""
    chosen = np.zeros(len(films), bool)
    chosen[np.random.default_rng(seed).permutation(len(films))[: int(share * len(films))]] = True
    changed = films.copy()
    changed[chosen] = CHANGES[how](films[chosen])
    return changed, chosen


@pytest.mark.parametrize("how", list(CHANGES)[:-1])
def test_what_is_planted_is_named_and_nothing_else(drawn, how):
    films, chosen = planted(drawn, how, 0.1, 0)
    said = words(films)
    assert np.mean(said[chosen] == how) >= (0.85 if how == "mirrored" else 1)
    assert not said[~chosen].any()


def test_untouched_films_are_not_named_whatever_their_size(drawn):
    assert not words(drawn).any()
    large = np.stack([np.asarray(Image.fromarray(film).resize((100, 100))) for film in drawn])
    assert not words(large).any()
    assert (words(255 - large) == "inverted").all()


def test_a_set_that_lies_on_its_side_as_a_whole_is_named(drawn):
    for how in list(CHANGES)[:5]:
        assert (words(CHANGES[how](drawn)) == how).all()


def test_of_few_films_blank_ones_alone_are_named(drawn):
    films, _ = planted(drawn[:20], "inverted", 0.5, 0)
    films[3] = 7
    assert words(films).tolist() == [""] * 3 + ["blank"] + [""] * 16
    assert find_suspects(films, about([])).empty
    assert set(words(np.zeros_like(drawn))) == {"blank"}


def test_the_mean_film_of_each_scanner_or_source(drawn):
    index = about(np.arange(200)).assign(scanner=["a"] * 150 + [""] * 50)
    means = mean_films(drawn, index)
    assert list(means) == ["a: 150 films", "unknown: 50 films"]
    assert np.abs(means["a: 150 films"] - drawn[:150].mean(axis=0)).max() <= 0.5
    index["source"] = ["first"] * 40 + ["second"] * 160
    assert list(mean_films(drawn, index)) == ["second: 160 films", "first: 40 films"]


def test_the_report_names_suspects_and_drop_leaves_them_out(tmp_path, drawn):
    films, names = drawn[:60].copy(), [f"{film:02d}.png" for film in range(60)]
    films[7] = 255 - films[7]
    for name, film in zip(names, films, strict=True):
        Image.fromarray(film).save(tmp_path / name)
    table = pd.DataFrame({"image_index": names, "path": names, "source": "", "patient_id": names})
    table[["follow_up", "age", "sex", "view", "scanner"]] = [0, 50.0, "F", "PA", "0.143"]
    table = table.assign(**dict.fromkeys(FINDINGS, np.float32(0)))
    table["split"] = ["train"] * 40 + ["val"] * 10 + ["test"] * 10
    boxes, seen = pd.DataFrame(columns=["image_index", "finding", *"xywh"]), {}
    for what in ("report", "drop"):
        told = {"image_size": 64, "suspects": what}
        decoded = decode_films(table, tmp_path, tmp_path / what, 64)
        seen[what] = write_index(table, decoded, boxes, tmp_path / what, told)
        assert seen[what]["look_wrong"] == [["07.png", "inverted"]]
        assert seen[what]["suspects"] == what
    kept = read_index(tmp_path / "drop")["image_index"].tolist()
    assert kept == names[:7] + names[8:] and seen["report"]["films"] == 60
    assert seen["report"]["fingerprint"] != seen["drop"]["fingerprint"]
    table["split"] = ["val"] * 7 + ["train"] + ["test"] * 52
    with pytest.raises(InputError, match=r"suspects=drop left out suspect films; .* to train"):
        write_index(table, decoded, boxes, tmp_path / "drop", told)


def test_only_report_and_drop_are_allowed():
    assert read_parameters({"profile": "demo"}).suspects == "report"
    with pytest.raises(InputError, match="suspects='some': allowed are report, drop"):
        read_parameters({"profile": "demo", "suspects": "some"})


FOUND = {"mirrored": 0.6, "unlike a frontal chest film": 0.8}  # at least; all others 0.97


@pytest.mark.parametrize("how", CHANGES)
def test_in_real_films_as_many_are_found_as_is_written(real, how):
    films, patients = real
    found, false = [], []
    for seed in range(2):
        changed, chosen = planted(films, how, 0.05, seed)
        said = words(changed, patients) != ""
        found.append(said[chosen].mean())
        false.append(said[~chosen].mean())
    assert np.mean(found) >= FOUND.get(how, 0.97) and np.mean(false) <= 0.01


def test_of_untouched_real_films_at_most_one_in_a_hundred_is_named(real, nih_test_data):
    films, patients = real
    assert np.mean(words(films, patients) != "") <= 0.01
    paths = sorted((nih_test_data / "nih_sample").glob("images_*/images/*.png"))
    large = [np.asarray(Image.open(path).convert("L").resize((64, 64))) for path in paths]
    assert len(large) == 80 and np.sum(words(np.stack(large)) != "") <= 1


def test_each_source_is_judged_by_its_own_films(real):
    """Most films of one hospital are inverted: the other one's are not thereby odd."""
    films, patients = real
    where = np.where(pd.factorize(patients)[0] % 2, "north", "south")
    films = np.where((where == "north")[:, None, None], 255 - films, films)
    found = find_suspects(films, about(patients).assign(source=where))["film"]
    assert np.mean(np.isin(np.flatnonzero(where == "south"), found)) < 0.02
    assert np.mean(np.isin(np.flatnonzero(where == "north"), found)) > 0.95


@pytest.mark.slow
def test_looking_at_films_takes_a_few_times_what_transforming_them_does(drawn):
    """About twice that: three seconds of a core for 5,000, nothing beside decoding them."""
    films, took = drawn.repeat(25, axis=0), []
    for work in (words, lambda films: np.fft.rfft2(films.astype(np.float32))):
        begun = time.process_time()
        work(films)
        took.append(time.process_time() - begun)
    assert took[0] < 5 * took[1], took
