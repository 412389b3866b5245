"""Films of any depth and format become the grey that a viewer shows, or are named."""

import builtins
import re
import sys
import time

import numpy as np
import pytest
from ownfilms import MARKS, rows_of, write
from PIL import Image

from fedutils.base.errors import InputError
from fedutils.films.check import check_table
from fedutils.films.decode import decode_film, decode_films
from fedutils.films.formats import dicom_header, find_depth, read_grey
from fedutils.films.read import read_folder

pydicom = pytest.importorskip("pydicom", reason="the extra `dicom` is not installed")
from downloads import write_dicom  # noqa: E402
from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402
from pydicom.pixels import apply_modality_lut, apply_voi_lut  # noqa: E402

RAMP = np.linspace(0, 1, 40 * 50).reshape(40, 50)


def by_pydicom(path):
    """What pydicom says of every pixel, from black to white by all that may be stored."""
    film = pydicom.dcmread(path)
    return apply_voi_lut(apply_modality_lut(film.pixel_array, film), film).astype(float)


def ramp(bits, dtype=np.uint16):
    return np.rint(RAMP * ((1 << bits) - 1)).astype(dtype)


def grey(path):
    return np.asarray(read_grey(path)[0])


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_depth_that_values_have_counts_and_not_the_files(tmp_path, bits):
    Image.fromarray(ramp(bits)).save(tmp_path / "a.png")
    Image.fromarray(ramp(bits)).save(tmp_path / "a.tif")
    write_dicom(tmp_path / "a.dcm", ramp(bits), 16)
    for name in ("a.png", "a.tif", "a.dcm"):
        film, mode = read_grey(tmp_path / name)
        assert mode.endswith(f" of {bits} bits")
        assert np.abs(np.asarray(film) - RAMP * 255).max() <= 1, name


def test_the_depth_is_the_least_that_detectors_have():
    assert [find_depth(0, most) for most in (255, 256, 1023, 1024, 65535)] == [8, 10, 10, 12, 16]
    assert find_depth(-512, 511, signed=True) == 10 and find_depth(-513, 0, signed=True) == 12
    for least, most in ((0, 65536), (-1, 5)):
        with pytest.raises(ValueError, match="at most 16 bits"):
            find_depth(least, most)


def test_of_8_bits_the_grey_is_what_is_stored(tmp_path):
    pixels = ramp(8, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    write_dicom(tmp_path / "a.dcm", pixels, 8)
    assert np.array_equal(grey(tmp_path / "a.tif"), pixels)
    assert np.array_equal(grey(tmp_path / "a.dcm"), pixels)


def test_a_tiff_whose_white_is_zero_and_one_of_several_pictures(tmp_path):
    film = Image.fromarray(ramp(12))
    film.save(tmp_path / "white.tif", tiffinfo={262: 0})
    assert np.abs(grey(tmp_path / "white.tif") - (1 - RAMP) * 255).max() <= 1
    film.save(tmp_path / "two.tif", save_all=True, append_images=[film])
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "float.tif")
    for name, said in {"two": "has 2 pictures", "float": "mode F of .*: make it a grey"}.items():
        none, about = decode_film(tmp_path / f"{name}.tif", 16)
        assert none is None and re.search(said, about["problem"])


@pytest.mark.parametrize("kind", ["PNG", "MPO", "GIF", "WEBP", "gain map"])
def test_a_file_of_several_pictures_is_left_out_by_name(tmp_path, kind):
    film, path = Image.fromarray(ramp(8, np.uint8)), tmp_path / "a.png"
    several = {"save_all": True, "append_images": [film.rotate(180)]}
    film.save(path, "MPO" if kind == "gain map" else kind, **several)
    if kind == "gain map":  # as phones say it, in a segment behind the first two bytes
        said = b'http://ns.adobe.com/xap/1.0/\0 hdrgm:Version="1.0"'
        raw = path.read_bytes()
        path.write_bytes(raw[:2] + b"\xff\xe1" + (len(said) + 2).to_bytes(2) + said + raw[2:])
        with Image.open(path) as opened:
            assert opened.format == "JPEG"
    none, about = decode_film(path, 16)
    assert none is None and "has 2 pictures; give each" in about["problem"]
    film.save(path, "JPEG")
    assert decode_film(path, 16)[1]["problem"] == ""


WINDOW = {"WindowCenter": 1500, "WindowWidth": 1000}
RESCALED = {"RescaleSlope": 2, "RescaleIntercept": -1000}
LUT = Dataset()
LUT.LUTDescriptor, LUT.LUTData = [1024, 100, 12], np.arange(0, 4096, 4, np.uint16).tobytes()


@pytest.mark.parametrize("tags", [
    WINDOW, WINDOW | RESCALED, WINDOW | {"VOILUTFunction": "SIGMOID"},
    WINDOW | {"VOILUTFunction": "LINEAR_EXACT"}, RESCALED,
    {"WindowCenter": [1500, 300], "WindowWidth": [1000, 50]}, {"VOILUTSequence": [LUT]},
])  # fmt: skip
@pytest.mark.parametrize("inverted", [False, True])
def test_a_header_is_heeded_as_pydicom_does(tmp_path, tags, inverted):
    kind = {"PhotometricInterpretation": f"MONOCHROME{1 if inverted else 2}"}
    path = write_dicom(tmp_path / "a.dcm", ramp(12), 12, **tags | kind)
    shown = by_pydicom(path)  # the ramp has each of the darkest and the brightest values
    expected = (shown - shown.min()) / (shown.max() - shown.min()) * 255
    assert np.abs(grey(path) - (255 - expected if inverted else expected)).max() <= 0.51


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_under_a_window_greys_rise_with_what_a_falling_slope_makes_of_values(
    tmp_path, function, inverted
):
    kind = {"PhotometricInterpretation": f"MONOCHROME{1 if inverted else 2}"}
    window = {"WindowCenter": 2048, "WindowWidth": 4096, "VOILUTFunction": function} | kind
    falling = {"RescaleSlope": -1, "RescaleIntercept": 4095}
    plain = grey(write_dicom(tmp_path / "a.dcm", ramp(12)[::-1, ::-1], 12, **window))
    turned = grey(write_dicom(tmp_path / "b.dcm", ramp(12), 12, **window | falling))
    assert np.array_equal(turned, plain) and (plain[0, 0] > plain[-1, -1]) != inverted


@pytest.mark.parametrize("tags", [{}, {"WindowCenter": 2048, "WindowWidth": 4096}])
def test_values_beyond_bits_stored_leave_a_film_out_and_an_overlay_above_them_does_not(
    tmp_path, tags
):
    plain = grey(write_dicom(tmp_path / "a.dcm", ramp(12), 12, **tags))
    over = ramp(12)
    over[10:20, 5:30:3] |= 1 << 12
    over[30:, 40:] |= 1 << 15
    assert np.array_equal(grey(write_dicom(tmp_path / "b.dcm", over, 12, **tags)), plain)
    signed = (ramp(12).astype(int) - 2048).astype(np.int16)
    bare = grey(write_dicom(tmp_path / "c.dcm", signed, 12, **tags))
    unextended = write_dicom(tmp_path / "d.dcm", signed & 0xFFF, 12, **tags)
    assert np.array_equal(grey(unextended), bare)
    noise = np.random.default_rng(0).normal(0, 60, RAMP.shape)
    for values, more in (
        (ramp(12) * 4, {}), (np.full((9, 9), 5000, np.uint16), {}), (signed * 2, {}),
        ((RAMP * 4500 + noise).clip(0).astype(np.uint16), {}), (ramp(12) << 4, {"HighBit": 15}),
    ):  # fmt: skip
        path = write_dicom(tmp_path / "e.dcm", values, 12, **tags | more)
        none, about = decode_film(path, 16)
        said = "HighBit 15 with BitsStored 12" if more else "values beyond its BitsStored of 12"
        assert none is None and said in about["problem"]


def test_a_window_holds_for_a_film_that_is_too_dark_for_it(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", ramp(10), 12, WindowCenter=2048, WindowWidth=4096)
    assert grey(path).max() == 64
    assert grey(write_dicom(tmp_path / "b.dcm", ramp(10), 12)).max() == 255


def test_signed_values_are_shown_from_the_lowest_on(tmp_path):
    values = (ramp(12).astype(int) - 2048).astype(np.int16)
    for tags in ({}, {"WindowCenter": 0, "WindowWidth": 4096}):
        path = write_dicom(tmp_path / "a.dcm", values, 12, **tags)
        assert np.abs(grey(path) - RAMP * 255).max() <= 1


@pytest.mark.parametrize("kind", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(("bits", "dtype", "tags"), [
    (16, np.uint16, {"PixelPaddingValue": 65535}),
    (16, np.uint16, {"PixelPaddingValue": 60000, "PixelPaddingRangeLimit": 65535}),
    (16, np.uint16, {"PixelPaddingValue": 65535, "PixelPaddingRangeLimit": 60000}),
    (16, np.int16, {"PixelPaddingValue": -2000}),
])  # fmt: skip
def test_what_only_fills_a_picture_up_does_not_set_its_window_and_is_black(
    tmp_path, bits, dtype, tags, kind
):
    values = ramp(10).astype(dtype) - (512 if dtype == np.int16 else 0)
    bare = grey(write_dicom(tmp_path / "a.dcm", values, bits, PhotometricInterpretation=kind))
    values[:5, :7] = tags["PixelPaddingValue"]
    path = write_dicom(tmp_path / "b.dcm", values, bits, PhotometricInterpretation=kind, **tags)
    seen, mode = read_grey(path)
    assert mode.endswith(" of 10 bits") and not np.asarray(seen)[:5, :7].any()
    assert np.array_equal(np.asarray(seen)[5:], bare[5:])


def test_padding_of_8_bits_and_a_film_of_nothing_else(tmp_path):
    values = ramp(8, np.uint8)
    values[:3] = 255
    path = write_dicom(tmp_path / "a.dcm", values, 8, PixelPaddingValue=255)
    assert not grey(path)[values == 255].any() and np.array_equal(grey(path)[3:-1], values[3:-1])
    values[:] = 255
    assert not grey(write_dicom(tmp_path / "b.dcm", values, 8, PixelPaddingValue=255)).any()
    empty = write_dicom(tmp_path / "c.dcm", ramp(8, np.uint8), 8, PixelPaddingValue=None)
    assert np.array_equal(grey(empty), ramp(8, np.uint8))


@pytest.mark.parametrize("tags", [
    {"WindowWidth": 0}, {"WindowWidth": 1}, {"WindowWidth": [1, 1]}, {"WindowWidth": -5},
    {"WindowWidth": 0, "VOILUTFunction": "SIGMOID"}, {"WindowWidth": ""},
    {"WindowWidth": 0, "VOILUTFunction": "LINEAR_EXACT"}, {"WindowWidth": 1, "VOILUTFunction": ""},
    {"RescaleSlope": 0, "RescaleIntercept": 0}, {"RescaleSlope": "", "RescaleIntercept": ""},
])  # fmt: skip
def test_a_window_or_slope_that_was_never_filled_in_leaves_the_film_as_without(tmp_path, tags):
    bare = grey(write_dicom(tmp_path / "a.dcm", ramp(12), 12))
    if "WindowWidth" in tags:
        tags = {"WindowCenter": [0] * np.size(tags["WindowWidth"])} | tags
    assert np.array_equal(grey(write_dicom(tmp_path / "b.dcm", ramp(12), 12, **tags)), bare)


@pytest.mark.parametrize("left", ["preamble", "preamble and file meta", "file meta"])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_a_film_without_the_preamble_or_its_meta_information_is_read(tmp_path, left, syntax):
    path = write_dicom(tmp_path / "a.dcm", ramp(12), 12, PatientAge="061Y", **WINDOW)
    whole, film = grey(path), pydicom.dcmread(path)
    film.file_meta.TransferSyntaxUID = syntax
    film.save_as(path, implicit_vr=syntax == uid.ImplicitVRLittleEndian)
    raw = path.read_bytes()
    body = raw.index(b"\x08\0\x16\0")  # SOPClassUID, which the data set begins with
    rest = {"preamble": raw[132:], "file meta": raw[:132] + raw[body:]}.get(left, raw[body:])
    for name in ("b.dcm", "IM0001", "1.2.840.10008.7"):
        (tmp_path / name).write_bytes(rest)
        assert np.array_equal(grey(tmp_path / name), whole)
        assert dicom_header(tmp_path / name, ["PatientAge"]) == {"PatientAge": "061Y"}


def test_a_film_whose_header_cannot_name_its_patient_is_named_and_the_others_are_read(tmp_path):
    whole = write_dicom(tmp_path / "a.dcm", ramp(12), 12, PatientID="7", PatientSex="F")
    (tmp_path / "short.dcm").write_bytes(whole.read_bytes()[:200])
    (tmp_path / "text.dcm").write_text("no film")
    films = ["a.dcm", "gone.dcm", "short.dcm", "text.dcm"]
    (tmp_path / "t.csv").write_text("film,x\n" + "".join(f"{film},1\n" for film in films))
    (tmp_path / "films.toml").write_text(HEADERS)
    table = read_folder(tmp_path).table
    assert table["image_index"].tolist() == films and table["patient_id"].nunique() == 4
    seen = decode_films(table, tmp_path, tmp_path / "prepared", 32)
    assert (seen["problem"] == "").tolist() == [True, False, False, False]
    write_dicom(tmp_path / "text.dcm", ramp(12), 12)  # a film that can be read has a patient
    with pytest.raises(InputError, match="line 5: no image index or no patient id"):
        read_folder(tmp_path)


def test_films_without_an_ending_are_those_of_a_table(tmp_path):
    path = write_dicom(tmp_path / "in.dcm", ramp(8, np.uint8), 8, PatientID="7", PatientSex="F")
    path.rename(tmp_path / "IM0001")
    for name in ("README", "DICOMDIR", "._IM0001"):
        (tmp_path / name).write_bytes(
            b"no film" if name == "README" else (tmp_path / "IM0001").read_bytes()
        )
    (tmp_path / "t.csv").write_text("film,x\nIM0001,1\n")
    (tmp_path / "films.toml").write_text(HEADERS)
    data = read_folder(tmp_path)
    row = data.table.iloc[0]
    assert (row["path"], row["patient_id"], row["sex"]) == ("IM0001", "7", "F")
    assert data.found["orphaned films"] == []


@pytest.mark.parametrize(
    "syntax", [uid.RLELossless, uid.JPEG2000Lossless, uid.DeflatedExplicitVRLittleEndian]
)
def test_compressed_films_are_what_they_were(tmp_path, syntax):
    whole = write_dicom(tmp_path / "a.dcm", ramp(12), 12, **WINDOW)
    deflated = syntax == uid.DeflatedExplicitVRLittleEndian
    packed = write_dicom(tmp_path / "b.dicom", ramp(12), 12, None if deflated else syntax, **WINDOW)
    if deflated:
        film = pydicom.dcmread(packed)
        film.file_meta.TransferSyntaxUID = syntax
        film.save_as(packed)
    assert pydicom.dcmread(packed).file_meta.TransferSyntaxUID == syntax
    assert np.array_equal(grey(whole), grey(packed))


def test_a_colour_film_is_read_as_its_grey_and_what_is_no_film_is_named(tmp_path):
    colour = np.repeat(ramp(8, np.uint8)[..., None], 3, axis=2)
    rgb = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB"}
    assert np.array_equal(
        grey(write_dicom(tmp_path / "rgb.dcm", colour, 8, **rgb)), ramp(8, np.uint8)
    )
    frames = np.stack([ramp(8, np.uint8)] * 2)
    write_dicom(tmp_path / "two.dcm", frames, 8, NumberOfFrames=2, Rows=40, Columns=50)
    palette = {"PhotometricInterpretation": "PALETTE COLOR"}
    write_dicom(tmp_path / "palette.dcm", ramp(8, np.uint8), 8, **palette)
    whole = write_dicom(tmp_path / "cut.dcm", ramp(12), 12).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "png.dcm").write_bytes(b"\x89PNG")
    for name, said in {
        "two": "has 2 pictures; give each film a file", "palette": "PALETTE COLOR of uint8",
        "cut": "", "png": "DICOM",
    }.items():  # fmt: skip
        film, about = decode_film(tmp_path / f"{name}.dcm", 16)
        assert film is None and said in about["problem"] and about["problem"], name


def test_tags_of_a_header_come_as_text(tmp_path):
    path = write_dicom(
        tmp_path / "a.dcm", ramp(8, np.uint8), 8, PatientAge="061Y", PatientSex="F",
        PixelSpacing=[0.168, 0.169], ImageType=["ORIGINAL", "PRIMARY"], PatientName="A^B",
        ViewPosition="", SeriesDescription=" view: PA ",
    )  # fmt: skip
    asked = {
        "PatientAge": "061Y", "PatientSex": "F", "PixelSpacing": "0.168", "PatientName": "A^B",
        "ImageType": "ORIGINAL\\PRIMARY", "ViewPosition": "", "SeriesDescription": "view: PA",
        "BodyPartExamined": "",
    }  # fmt: skip
    assert dicom_header(path, list(asked)) == asked
    with pytest.raises(InputError, match=r"dicom:PatientsAge: .* near it: PatientAge"):
        dicom_header(path, ["PatientsAge"])
    (tmp_path / "b.dcm").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"b.dcm: its DICOM header cannot be read"):
        dicom_header(tmp_path / "b.dcm", ["PatientAge"])


HEADERS = """table = "t.csv"
[columns]
image = "film"
patient = "dicom:PatientID"
age = "dicom:PatientAge"
[optional]
sex = "dicom:PatientSex"
view = "dicom:ViewPosition"
born = "dicom:PatientBirthDate"
date = "dicom:StudyDate"
spacing = "dicom:PixelSpacing"
[extract]
patient = "([0-9]+)$"
[findings]
X = "x"
"""


def test_a_mapping_takes_columns_from_the_headers(tmp_path):
    """What a header lacks is empty; a file without one too, and notebook 02 names it."""
    about = {
        "PatientID": "ID-7",
        "PatientSex": "F",
        "ViewPosition": "AP",
        "PixelSpacing": [0.2, 0.2],
    }
    (tmp_path / "in").mkdir()
    write_dicom(tmp_path / "in/a.dcm", ramp(8, np.uint8), 8, **about, PatientAge="061Y")
    about |= {"PatientID": "ID-8", "PatientBirthDate": "19500102", "StudyDate": "20150304"}
    write_dicom(tmp_path / "b.DCM", ramp(8, np.uint8), 8, **about)
    (tmp_path / "t.csv").write_text("film,x\na.dcm,1\nb.DCM,0\n")
    (tmp_path / "films.toml").write_text(HEADERS)
    table = read_folder(tmp_path).table
    assert table["patient_id"].tolist() == ["7", "8"] and table["age"].tolist() == [61, 65]
    assert set(table["sex"]) == {"F"} and set(table["view"]) == {"AP"}
    assert set(table["spacing"]) == {0.2} and set(table["scanner"]) == {"0.200"}
    (tmp_path / "b.DCM").write_bytes(b"hello")
    assert read_folder(tmp_path).table["sex"].tolist() == ["F", ""]
    (tmp_path / "films.toml").write_text(HEADERS.replace("PatientSex", "PatientsSex"))
    with pytest.raises(InputError, match="dicom:PatientsSex: DICOM has no such keyword"):
        read_folder(tmp_path)
    (tmp_path / "films.toml").write_text(HEADERS.replace('"film"', '"dicom:SOPInstanceUID"'))
    with pytest.raises(InputError, match=r"image = 'dicom:.*; no header names films \(line 3\)"):
        read_folder(tmp_path)


def test_without_pydicom_a_film_is_named_with_what_to_install(tmp_path, monkeypatch):
    path = write_dicom(tmp_path / "a.dcm", ramp(8, np.uint8), 8)
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("pydicom"):
            raise ImportError(name)
        return real(name, *args)

    for name in [name for name in sys.modules if name.startswith("pydicom")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    film, about = decode_film(path, 16)
    assert film is None and "pip install pydicom" in about["problem"]
    with pytest.raises(InputError, match="pip install pydicom"):
        dicom_header(path, ["PatientAge"])


def test_real_films_are_read_and_monochrome1_is_inverted(nih_test_data):
    folder = nih_test_data / "dicom"
    one = grey(folder / "siim_850819.dcm").astype(int)
    assert np.abs(one - by_pydicom(folder / "siim_850819.dcm")).max() <= 1  # by pylibjpeg
    assert np.array_equal(255 - one, grey(folder / "fake_monochrome1.dcm"))
    asked = {"PatientAge": "62", "PatientSex": "M", "ViewPosition": "PA", "PixelSpacing": "0.168"}
    assert dicom_header(folder / "siim_850819.dcm", list(asked)) == asked


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 12])
def test_a_film_is_prepared_as_fast_as_pydicom_alone_reads_it(nih_test_data, tmp_path, bits):
    path, times = nih_test_data / "dicom/siim_850819.dcm", {}
    if bits == 12:
        values = pydicom.dcmread(path).pixel_array.astype(np.uint16) * 16
        path = write_dicom(tmp_path / "a.dcm", values, 12, **WINDOW)
    for read in (by_pydicom, lambda path: decode_film(path, 224)) * 2:
        begun = time.process_time()
        for _ in range(20):
            read(path)
        times.setdefault(read, []).append(time.process_time() - begun)
    alone, ours = map(min, times.values())
    assert alone / ours >= 0.8


def test_rows_are_kept_by_a_header_and_those_without_one_to_read_are_named(tmp_path):
    mapping = MARKS + '[keep]\n"dicom:ViewPosition" = ["PA", "AP"]\n'
    films = ["pa.dcm", "ll.dcm", "none.dcm", "gone.dcm", "cut.dcm", "x.png"]
    folder = write(tmp_path, mapping, rows_of(*films), ["cut.dcm", "x.png"])
    for name, about in (
        ("pa", {"ViewPosition": "PA"}),
        ("ll", {"ViewPosition": "LL"}),
        ("none", {}),
    ):
        write_dicom(folder / f"{name}.dcm", ramp(8, np.uint8), 8, **about)
    data = read_folder(folder)
    assert data.table["image_index"].tolist() == ["cut.dcm", "gone.dcm", "pa.dcm"]
    assert sorted(data.found["rows left out"]) == ["ll.dcm", "none.dcm", "x.png"]
    assert check_table(data).set_index("check")["count"]["missing films"] == 1


@pytest.mark.parametrize(("tag", "films", "told"), [
    ("Modality", ["x.png"], r"\[keep\] leaves no row of .*table\.csv"),
    ("Modalty", ["a.dcm"], "dicom:Modalty: DICOM has no such keyword; near it: Modality"),
])  # fmt: skip
def test_a_header_that_no_film_has_keeps_no_row(tmp_path, tag, films, told):
    folder = write(tmp_path, MARKS + f'[keep]\n"dicom:{tag}" = "DX"\n', rows_of(*films), films)
    with pytest.raises(InputError, match=told):
        read_folder(folder)
