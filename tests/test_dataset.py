"""Decoding once: what is read, what is quarantined, what survives a kill; the Dataset."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import tiny_films

from fedutils.base.errors import InputError
from fedutils.dataset import ChestXrayDataset, draw_motion, normalise, read_index
from fedutils.films import decode
from fedutils.films.decode import decode_film, decode_films, write_index
from fedutils.films.phantom.cases import FINDINGS
from fedutils.films.split import choose_films


def write_film(path, seed=0, size=40):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def make_table(folder, films, **changes):
    for i in range(films):
        write_film(folder / f"{i:08d}_000.png", i)
    names = sorted(path.name for path in folder.glob("*.png"))
    table = pd.DataFrame({"image_index": names, "path": names})
    table["patient_id"] = table["image_index"].str[:8]
    table[["follow_up", "age", "sex", "view", "scanner", "split"]] = [
        0,
        50.0,
        "F",
        "PA",
        "0.143",
        "train",
    ]
    return table.assign(**dict.fromkeys(FINDINGS, np.float32(0)), **changes)


def test_rgba_equals_grey(tmp_path):
    write_film(tmp_path / "grey.png")
    grey = Image.open(tmp_path / "grey.png")
    for mode in ("RGB", "RGBA", "LA"):
        grey.convert(mode).save(tmp_path / f"{mode}.png")
    grey.convert("RGB").quantize(256).save(tmp_path / "P.png")
    expected, about = decode_film(tmp_path / "grey.png", 20)
    for mode in ("RGB", "RGBA", "LA", "P"):
        film, seen = decode_film(tmp_path / f"{mode}.png", 20)
        assert np.array_equal(film, expected) and seen["mode"] == mode
        assert seen["pixels"] == about["pixels"]  # equal pixels are found whatever the format


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_turned_film_is_stored_as_every_viewer_shows_it(tmp_path, orientation, ending):
    pixels = np.tile(np.arange(0, 240, 8, dtype=np.uint8), (20, 1))
    pixels[:5] = 250  # no way to turn or mirror it gives the same film
    film, exif = Image.fromarray(pixels), Image.Exif()
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes it
    exif[0x0112] = orientation
    stored = film.transpose(Image.Transpose(turned[orientation])) if orientation > 1 else film
    stored.save(tmp_path / f"turned.{ending}", exif=exif, quality=95)
    film.save(tmp_path / "upright.png")
    seen, about = decode_film(tmp_path / f"turned.{ending}", 16)
    expected, _ = decode_film(tmp_path / "upright.png", 16)
    assert np.abs(seen.astype(int) - expected).max() < 6
    assert (about["width"], about["height"]) == (30, 20)


def write_16_bit(path, colour_type, channels):
    """Write a PNG of 12 bits in 16, which Pillow can read but not write."""

    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    row = b"\0" + np.repeat(np.arange(0, 4096, 128, dtype=">u2"), channels).tobytes()
    header = struct.pack(">IIBBBBB", 32, 32, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 32)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3)])
def test_12_bits_in_16_are_12_bits_grey_or_in_colour(tmp_path, colour_type, channels):
    write_16_bit(tmp_path / "a.png", colour_type, channels)
    film, about = decode_film(tmp_path / "a.png", 32)
    assert np.abs(film - np.arange(0, 256, 8.0)).max() <= 1  # 0 to 248 of 255, a column each
    assert about["mode"] == ("I;16 of 12 bits" if channels == 1 else "RGB of 12 bits")


@pytest.mark.parametrize(("colour_type", "channels"), [(4, 2), (6, 4)])
def test_16_bits_with_transparency_are_named(tmp_path, colour_type, channels):
    write_16_bit(tmp_path / "a.png", colour_type, channels)
    film, about = decode_film(tmp_path / "a.png", 16)
    assert film is None and "make it a grey film of 8 or 16 bits" in about["problem"]


@pytest.mark.parametrize("how", ["RGBA", "LA", "P", "L"])
def test_transparent_pixels_are_named_since_what_they_show_is_unclear(tmp_path, how):
    pixels = write_film(tmp_path / "grey.png")
    film = Image.fromarray(pixels).convert(how if how.endswith("A") else "L").convert(how)
    if how.endswith("A"):
        film.putalpha(Image.fromarray(pixels))
        film.save(tmp_path / "a.png")
    else:
        film.save(tmp_path / "a.png", transparency=int(np.asarray(film)[0, 0]))
    film, about = decode_film(tmp_path / "a.png", 16)
    assert film is None and "has transparent pixels" in about["problem"]


def test_inks_and_few_bits_are_read_as_the_grey_they_show(tmp_path):
    pixels = np.tile(np.arange(0, 256, 17, dtype=np.uint8), (16, 1))  # all that 4 bits can hold
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "inks.jpg", quality=95)
    levels = Image.fromarray(pixels // 17).convert("P")
    levels.putpalette([grey for level in range(16) for grey in [17 * level] * 3])
    levels.save(tmp_path / "four.png", bits=4)
    for name in ("inks.jpg", "four.png"):
        assert np.abs(decode_film(tmp_path / name, 16)[0].astype(int) - pixels).max() < 9, name


def break_film(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "float":
        Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(path, "TIFF")
    else:
        path.write_bytes(
            {"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[how]
        )


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", "truncated"),
        ("empty", "empty file"),
        ("text", "cannot identify"),
        ("missing", "No such file"),
        ("float", "make it a grey film of 8 or 16 bits"),
    ],
)
def test_a_broken_film_is_quarantined_and_named(tmp_path, how, reason):
    table, out = make_table(tmp_path, 3), tmp_path / "prepared"
    break_film(tmp_path / "00000001_000.png", how)
    films = decode_films(table, tmp_path, out, 16)
    report = write_index(table, films, NO_BOXES, out, {"image_size": 16})
    assert list(report["quarantined"]) == ["00000001_000.png"]
    assert reason in report["quarantined"]["00000001_000.png"]
    index = read_index(out)
    assert list(index["image_index"]) == ["00000000_000.png", "00000002_000.png"]
    dataset = ChestXrayDataset(out)
    expected, _ = decode_film(tmp_path / "00000002_000.png", 16)
    assert np.array_equal(dataset[1][0][0], expected)


NO_BOXES = pd.DataFrame({c: [] for c in ["image_index", "finding", *"xywh"]}).astype(
    {"image_index": str}
)


def test_duplicates_modes_and_sizes_are_named_and_kept(tmp_path):
    table, out = make_table(tmp_path, 3), tmp_path / "prepared"
    Image.open(tmp_path / "00000000_000.png").convert("RGBA").save(tmp_path / "00000001_000.png")
    write_film(tmp_path / "00000002_000.png", size=50)
    report = write_index(
        table, decode_films(table, tmp_path, out, 16), NO_BOXES, out, {"image_size": 16}
    )
    assert report["duplicates"] == [["00000000_000.png", "00000001_000.png"]]
    assert report["modes"] == {"L": 2, "RGBA": 1} and report["sizes"] == {"40x40": 2, "50x50": 1}
    assert report["films"] == 3


def test_boxes_follow_the_resize_as_fractions(tmp_path):
    table, out = make_table(tmp_path, 1), tmp_path / "prepared"
    boxes = pd.DataFrame(
        [["00000000_000.png", "Mass", 10.0, 20.0, 4.0, 8.0]], columns=NO_BOXES.columns
    )
    write_index(table, decode_films(table, tmp_path, out, 16), boxes, out, {"image_size": 16})
    box = pd.read_csv(out / "boxes.csv").loc[0, list("xywh")].tolist()
    assert box == [10 / 40, 20 / 40, 4 / 40, 8 / 40]


def test_fingerprint_follows_pixels_labels_split_and_size(tmp_path):
    table, out = make_table(tmp_path, 3), tmp_path / "prepared"

    def fingerprint(table, size=16):
        films = decode_films(table, tmp_path, out, size)
        return write_index(table, films, NO_BOXES, out, {"image_size": size})["fingerprint"]

    first = fingerprint(table)
    assert fingerprint(table) == first
    assert fingerprint(table.assign(Mass=np.float32(1))) != first
    assert fingerprint(table.assign(split="val")) != first
    assert fingerprint(table, 20) != first
    write_film(tmp_path / "00000001_000.png", seed=99, size=41)  # a film that changed is seen
    assert fingerprint(table) != first


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_dataset import make_table
folder = Path(sys.argv[1])
from fedutils.films import decode
decode.FILMS_A_CHUNK = 4
slow = decode.decode_film
def decode_slowly(path, size):
    time.sleep(0.01)
    return slow(path, size)
decode.decode_film = decode_slowly
names = sorted(path.name for path in folder.glob("*.png"))
import pandas as pd
table = pd.DataFrame({"image_index": names, "path": names})
decode.decode_films(table, folder, folder / "prepared", 16, lambda d, t: print(d, flush=True))
"""


def test_decoding_goes_on_after_a_kill_at_any_moment(tmp_path, monkeypatch):
    make_table(tmp_path, 60)
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(Path(__file__).parent)]
    landed = 0
    for wait in (0.02, 0.11, 0.05):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        landed += child.returncode == -signal.SIGKILL
    assert landed == 3 and not (tmp_path / "prepared" / "images.npy").exists()
    rest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(rest[0]) > 0, "the films of the killed runs were decoded again"
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    store = np.load(tmp_path / "prepared" / "images.npy")
    for row, name in enumerate(names):
        assert np.array_equal(store[row], decode_film(tmp_path / name, 16)[0]), name
    journal = pd.read_csv(tmp_path / "prepared" / "films.csv")
    assert list(journal["image_index"]) == names
    assert not list((tmp_path / "prepared").glob("decoding-*"))


def test_a_half_written_journal_line_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "FILMS_A_CHUNK", 2)
    table, out = make_table(tmp_path, 6), tmp_path / "prepared"

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_films(table, tmp_path, out, 16, stop)
    journal = next(out.glob("decoding-*/films.csv"))
    with journal.open("a") as file:
        file.write("00000004_000.png,,L,40")
    seen = []
    decode_films(table, tmp_path, out, 16, lambda done, total: seen.append(done))
    assert seen == [4, 6] and len(pd.read_csv(out / "films.csv")) == 6


def test_a_finished_store_is_not_decoded_again(tmp_path, monkeypatch):
    table, out = make_table(tmp_path, 3), tmp_path / "prepared"
    first = decode_films(table, tmp_path, out, 16)
    monkeypatch.setattr(decode, "decode_film", lambda *args: pytest.fail("decoded again"))
    assert decode_films(table, tmp_path, out, 16).equals(first)


def test_a_film_replaced_by_one_of_equal_size_is_decoded_again(tmp_path):
    table, out = make_table(tmp_path, 3), tmp_path / "prepared"
    first, film = decode_films(table, tmp_path, out, 16), tmp_path / "00000001_000.png"
    before, size = film.stat(), film.stat().st_size
    pixels = np.asarray(Image.open(film)).copy()
    pixels[0, :2] = pixels[0, 1::-1]  # PNG packs noise no smaller, whatever it is
    Image.fromarray(pixels).save(film)
    os.utime(film, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert film.stat().st_size == size
    again = decode_films(table, tmp_path, out, 16)
    assert (again["pixels"] != first["pixels"]).tolist() == [False, True, False]
    assert np.array_equal(np.load(out / "images.npy")[1], decode_film(film, 16)[0])


@pytest.mark.parametrize("damage", ["rows of two writers", "too few films", "cut short", "gone"])
def test_a_store_that_is_not_whole_is_decoded_again(tmp_path, damage):
    table, out = make_table(tmp_path, 3), tmp_path / "prepared"
    first = decode_films(table, tmp_path, out, 16)
    content, store = (out / "films.csv").read_bytes(), out / "images.npy"
    pixels = np.load(store)
    if damage == "rows of two writers":
        (out / "films.csv").write_bytes(content + content.partition(b"\n")[2])
    elif damage == "too few films":
        np.save(store, pixels[:2])
    elif damage == "cut short":
        store.write_bytes(store.read_bytes()[:300])
    else:
        store.unlink()
    assert decode_films(table, tmp_path, out, 16).equals(first)
    assert np.array_equal(np.load(store), pixels)


def test_an_index_is_not_read_beside_a_store_of_fewer_films(tmp_path):
    tiny_films(tmp_path)
    store = tmp_path / "prepared" / "images.npy"
    np.save(store, np.load(store)[:50])
    with pytest.raises(InputError, match=r"images.npy: holds 50 films, but index.csv names row 59"):
        ChestXrayDataset(tmp_path / "prepared")
    store.write_bytes(store.read_bytes()[:300])
    with pytest.raises(InputError, match=r"images.npy: .*; run notebook 02_preprocess again"):
        ChestXrayDataset(tmp_path / "prepared")


def test_two_processes_prepare_one_folder_one_after_the_other(tmp_path):
    table, out = make_table(tmp_path, 60), tmp_path / "prepared"
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(Path(__file__).parent)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [child.communicate() for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    decoded = sorted(len(text.splitlines()) for text, _ in said)
    assert decoded[0] <= 1 and decoded[1] >= 16, said  # the second found all films decoded
    films = decode_films(table, tmp_path, out, 16)
    assert list(films["image_index"]) == list(table["image_index"])
    report = write_index(table, films, NO_BOXES, out, {"image_size": 16})
    assert report["films"] == 60 == len(ChestXrayDataset(out))


@pytest.mark.parametrize("other", [(2, 16), (3, 20)])
def test_no_index_is_written_for_films_that_another_process_has_replaced(tmp_path, other):
    table, out = make_table(tmp_path, 3), tmp_path / "prepared"
    films = decode_films(table, tmp_path, out, 16)
    decode_films(table[: other[0]], tmp_path, out, other[1])
    with pytest.raises(InputError, match="another process has stored other films"):
        write_index(table, films, NO_BOXES, out, {"image_size": 16})
    assert not (out / "index.csv").exists()


@pytest.mark.parametrize(("path", "said"), [
    ("a/b/c/d/00000001_000.png", "1 x .png such as a/b/c/d/00000001_000.png"),
    ("images/00000001_000.jpg", "1 x .jpg such as images/00000001_000.jpg"),
    ("images_001.tar.gz", "1 x .gz such as images_001.tar.gz"),
    ("labels.csv", "no other files"),
])  # fmt: skip
def test_without_any_film_one_line_says_what_lies_there_instead(tmp_path, path, said):
    table = make_table(tmp_path, 2)
    for film in tmp_path.glob("*.png"):
        film.unlink()
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    found = f"none of the 2 films of the table is there; it holds {said}; films should be unpacked"
    with pytest.raises(InputError, match=re.escape(found)):
        decode_films(table.assign(path=""), tmp_path, tmp_path / "prepared", 16)


def test_if_no_film_can_be_read_one_line_gives_a_reason_even_the_second_time(tmp_path):
    table = make_table(tmp_path, 3)
    for film in tmp_path.glob("*.png"):
        break_film(film, "float")
    table.loc[1, "path"] = ""
    for _ in range(2):
        said = rf"none of 3 films can be read, such as {tmp_path}/00000000_000.png: .*make it a grey film of 8 or 16 bits first$"
        with pytest.raises(InputError, match=said) as caught:
            decode_films(table, tmp_path, tmp_path / "prepared", 16)
        assert "\n" not in str(caught.value)


def test_choose_films_takes_whole_patients(tmp_path):
    table = pd.DataFrame({"patient_id": np.repeat([str(i) for i in range(40)], 5)})
    table["image_index"] = [f"{i:08d}_000.png" for i in range(200)]
    some = choose_films(table, 52, seed=0)
    assert 40 <= len(some) <= 52 and (some.groupby("patient_id").size() == 5).all()
    assert (
        choose_films(table.sample(frac=1, random_state=1), 52, 0)["image_index"]
        .isin(some["image_index"])
        .all()
    )
    assert len(choose_films(table, 0, 0)) == len(choose_films(table, 500, 0)) == 200


def test_dataset_reads_films_and_labels_by_position(tmp_path):
    films = tiny_films(tmp_path)
    film, labels = films[3]
    assert film.dtype == torch.uint8 and film.shape == (1, 32, 32) and labels.shape == (14,)
    batch, targets = films.batch([3, 5])
    assert torch.equal(batch[0], film) and torch.equal(targets[0], labels)
    part = films.where(films.index["split"] == "val")
    assert len(part) == 12 and set(part.index["split"]) == {"val"}
    assert torch.equal(part[0][0], films[3][0])
    assert len(next(iter(torch.utils.data.DataLoader(films, batch_size=7)))[0]) == 7


def test_normalise_uses_imagenets_statistics_on_three_equal_channels():
    films = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    inputs = normalise(films)
    assert inputs.shape == (2, 3, 8, 8)
    assert inputs[0, 1, 0, 0].item() == pytest.approx((1 - 0.456) / 0.224, rel=1e-6)


def test_augmentation_turns_and_shifts_a_little_and_never_flips():
    film = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    film[..., 28:36, 44:52] = 255  # a mark on the right
    plain = normalise(film)
    for seed in range(20):
        moved = normalise(film, draw_motion(np.random.default_rng(seed), 1))
        assert moved[..., 32:].sum() > moved[..., :32].sum()
        rows, columns = torch.nonzero(moved[0, 0] > moved[0, 0].max() / 2, as_tuple=True)
        assert abs(rows.float().mean() - 31.5) < 8 and abs(columns.float().mean() - 47.5) < 8
    assert not torch.equal(moved, plain)
    again = normalise(film, draw_motion(np.random.default_rng(19), 1))
    assert torch.equal(again, moved)


def test_report_is_readable_json(tmp_path):
    table, out = make_table(tmp_path, 2), tmp_path / "prepared"
    write_index(table, decode_films(table, tmp_path, out, 16), NO_BOXES, out, {"image_size": 16})
    report = json.loads((out / "report.json").read_text())
    assert report["splits"] == {"train": {"films": 2, "patients": 2}}


@pytest.mark.parametrize("name", ["NA", "None", "null", "nan", "N/A", ""])
def test_what_looks_like_missing_is_read_back_as_the_text_it_is(tmp_path, name):
    films = tiny_films(tmp_path)
    path = tmp_path / "prepared" / "index.csv"
    films.index.drop(columns="client").assign(patient_id=name, view=name).to_csv(path, index=False)
    index = read_index(tmp_path / "prepared")
    assert set(index["patient_id"]) == {name} == set(index["view"])
    assert index[list(FINDINGS)].notna().all(axis=None)
