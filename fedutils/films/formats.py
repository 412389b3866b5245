"""A film's file, PNG, JPEG, TIFF or DICOM, as one grey picture of 8 bits, upright.

A film of more bits is scaled by the depth that its values really have: 10 bits in a file of 16 are
no dark film. DICOM is shown as its header says (DICOM PS3.3 C.11: modality LUT, then VOI LUT or
window, MONOCHROME1 inverted), each stored value once and not each pixel; without a window the
depth that is really there counts, too.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..base.errors import InputError

DICOM_ENDINGS = (".dcm", ".dicom")
FILM_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", *DICOM_ENDINGS)
DEPTHS = (8, 10, 12, 14, 16)  # bits that detectors have, whatever the file reserves
INTERPRETATION, WHITE_IS_ZERO = 262, 0  # a tag of TIFF, which Pillow heeds at 8 bits alone


def is_film(path: str) -> bool:
    """Tell whether a file is a film: by its ending, or a DICOM without one, or named by its UID."""
    if path.lower().endswith(FILM_ENDINGS):
        return True
    plain = re.search(r"/[^/.]+$|\.\d+$", path) and not path.endswith("/DICOMDIR")
    return bool(plain) and Path(path).is_file() and _begins_as_dicom(Path(path))


def is_dicom(path: Path) -> bool:
    """Tell whether a film is DICOM: by its ending, or its first bytes if that says nothing."""
    end = path.suffix.lower()
    return end in DICOM_ENDINGS or (end not in FILM_ENDINGS and _begins_as_dicom(path))


def _begins_as_dicom(path: Path) -> bool:
    """Tell whether a file begins with DICOM's preamble, or lacks it and begins with its tags."""
    with path.open("rb") as file:
        head = file.read(132)
    return head[128:] == b"DICM" or head[:2] in (b"\x02\0", b"\x08\0")


def read_grey(path: Path) -> tuple[Image.Image, str]:
    """Read one film as a picture of mode L, and tell its mode: Pillow's or DICOM's, and bits.

    It is upright where EXIF says how it was turned. Raises whatever Pillow or pydicom raise, and
    ValueError or InputError where the file holds no single grey film or pydicom is missing.
    """
    if is_dicom(path):
        return _read_dicom(path)
    with Image.open(path) as film:
        # Pillow calls a phone's JPEG with a gain map one picture; its index of pictures tells.
        if (frames := getattr(film, "n_frames", 1 + ("mp" in film.info))) > 1:
            raise ValueError(f"has {frames} pictures; give each film a file of its own")
        raw = str([tile[3] for tile in film.tile])
        ImageOps.exif_transpose(film, in_place=True)
        # Of 16 bits a channel Pillow keeps the upper 8 and calls it RGB; only the tile tells.
        if film.mode.startswith(("I", "F")) or "16" in raw:
            return _read_deep(path, film, raw)
        clear = "transparency" in film.info or film.mode.endswith(("A", "a"))
        if clear and film.convert("RGBA").getextrema()[3][0] < 255:
            said = "viewers show them differently; flatten it first"
            raise ValueError(f"mode {film.mode}: has transparent pixels, and {said}")
        return film.convert("L"), film.mode


def _read_deep(path: Path, film: Image.Image, raw: str) -> tuple[Image.Image, str]:
    """Scale an opened film of more than 8 bits, which the file keeps as `raw`."""
    if raw == "['RGB;16B']":  # a PNG
        values = np.asarray(film) * np.uint16(256) + _lower_bytes(path)
    elif film.mode.startswith("I") and "transparency" not in film.info:
        values = np.asarray(film)
    else:
        raise ValueError(f"mode {film.mode} of {raw}: make it a grey film of 8 or 16 bits first")
    depth = find_depth(int(values.min()), int(values.max()))
    table = np.rint(np.linspace(0, 255, 1 << depth)).astype(np.uint8)
    if film.format == "TIFF" and film.tag_v2.get(INTERPRETATION) == WHITE_IS_ZERO:
        table = 255 - table
    return Image.fromarray(table[values]).convert("L"), f"{film.mode} of {depth} bits"


def _lower_bytes(path: Path) -> np.ndarray:
    """Return the lower bytes of a PNG of three 16-bit channels, of which Pillow gives the upper."""
    with Image.open(path) as film:
        film.tile = [tile._replace(args="RGB;16L") for tile in film.tile]
        ImageOps.exif_transpose(film, in_place=True)
        return np.asarray(film)


def find_depth(least: int, most: int, signed: bool = False) -> int:
    """Return the number of bits, one of DEPTHS, that values from `least` to `most` need."""
    for depth in DEPTHS:
        low = -(1 << depth - 1) if signed else 0
        if low <= least and most < low + (1 << depth):
            return depth
    raise ValueError(f"values from {least} to {most}; films have at most 16 bits, from 0 on")


def _read_dicom(path: Path) -> tuple[Image.Image, str]:
    """Read a DICOM film as `read_grey` does."""
    pydicom, film, options = _pydicom(), _open(path), {"correct_unused_bits": False}
    if film.file_meta.TransferSyntaxUID == pydicom.uid.JPEGBaseline8Bit:
        options["decoding_plugin"] = "pillow"  # three times as fast as pylibjpeg
    film.pixel_array_options(**options)
    pixels, mode = film.pixel_array, str(film.PhotometricInterpretation)
    if (frames := int(film.get("NumberOfFrames") or 1)) > 1:
        raise ValueError(f"has {frames} pictures; give each film a file of its own")
    if film.SamplesPerPixel == 3 and pixels.dtype == np.uint8:  # pydicom makes RGB of it
        return Image.fromarray(pixels).convert("L"), "RGB"
    if mode not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"{mode} of {pixels.dtype}; films are grey, or RGB of 8 bits")
    pixels = _within(film, pixels)
    signed, padded = bool(film.PixelRepresentation), _padding(film, pixels)
    if padded.any() and not padded.all():
        pixels = np.where(padded, pixels[~padded].min(), pixels)
    depth = find_depth(int(pixels.min()), int(pixels.max()), signed)
    low = -(1 << depth - 1) if signed else 0
    table, mode = _shown(film, depth, signed), f"{mode} of {depth} bits"
    if pixels.dtype == np.uint8:  # the same, four times as fast
        grey = Image.fromarray(pixels).point(list(table))
    else:
        grey = Image.fromarray(table[pixels - low if low else pixels])
    if padded.any():
        grey.paste(0, mask=Image.fromarray(padded))
    return grey, mode


def _within(film: Any, pixels: np.ndarray) -> np.ndarray:
    """Return what the stored bits of pixels say; ValueError where there are values beyond them.

    The bits above may hold an overlay, too: without it a film is the smoother, while values that
    are cut off wrap around. An overlay over the whole film cannot be told, and is refused.
    """
    stored, last = int(film.BitsStored), film.get("HighBit")
    if last not in (None, "", stored - 1):
        raise ValueError(f"HighBit {last} with BitsStored {stored}; films have them side by side")
    unused = 8 * pixels.dtype.itemsize - stored
    within = pixels << unused >> unused if unused else pixels
    low = -(1 << stored - 1) if film.PixelRepresentation else 0
    if unused and (pixels.min() < low or pixels.max() >= 1 << stored):
        rough = [sum(np.abs(np.diff(seen.astype(float), axis=axis)).sum() for axis in (0, 1))
                 for seen in (within, pixels)]  # fmt: skip
        if rough[0] >= rough[1]:
            raise ValueError(f"values beyond its BitsStored of {stored}; correct its header")
    return within


def _open(path: Path, **limits: object) -> Any:
    """Open a DICOM file, also one that lacks the preamble; ValueError where it is none."""
    if not _begins_as_dicom(path):
        raise ValueError("is no DICOM, whatever its ending says; name it as what it is")
    pydicom = _pydicom()
    film = pydicom.dcmread(path, force=True, **limits)
    if "TransferSyntaxUID" not in film.file_meta:
        uids = pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian
        film.file_meta.TransferSyntaxUID = uids[film.original_encoding[0]]
    return film


def _padding(film: Any, pixels: np.ndarray) -> np.ndarray:
    """Tell which pixels only fill the picture up (DICOM PS3.3 C.7.5.1.1.2), and so are black."""
    first = film.get("PixelPaddingValue")
    if first in (None, ""):
        return np.zeros((), bool)
    last = film.get("PixelPaddingRangeLimit", first)
    low, high = sorted(np.array([first, last]).astype(pixels.dtype))
    return (pixels >= low) & (pixels <= high)


def _shown(film: Any, depth: int, signed: bool) -> np.ndarray:
    """Return the grey, uint8, that a DICOM film's header gives each value of `depth` bits."""
    pixels = _pydicom().pixels
    # A window that leaves no greys, or a slope of 0, was never filled in.
    linear = (film.get("VOILUTFunction") or "LINEAR") == "LINEAR"
    if film.get("WindowCenter") is None or np.ravel(film.get("WindowWidth") or 0)[0] <= linear:
        film.WindowWidth = None
    if not film.get("RescaleSlope") or film.get("RescaleIntercept") is None:
        film.pop("RescaleSlope", None)
    # A window or LUT is chosen for all values that there may be: a film too dark for it is dark.
    fixed = film.get("VOILUTSequence") or film.WindowWidth is not None
    bits = max(depth, int(film.BitsStored) if fixed else 0)
    if bits > DEPTHS[-1]:
        raise ValueError(f"BitsStored {bits}; films have at most 16 bits")
    low = -(1 << bits - 1) if signed else 0
    values = pixels.apply_modality_lut(np.arange(low, low + (1 << bits)), film)
    film.pop("RescaleSlope", None)  # pydicom would turn a window's greys where the slope falls
    shown = pixels.apply_voi_lut(values, film).astype(float)
    dark, bright = shown.min(), shown.max()
    grey = (shown - dark) * (255 / max(bright - dark, 1e-9))
    grey = 255 - grey if film.PhotometricInterpretation == "MONOCHROME1" else grey
    first = -(1 << depth - 1) - low if signed else 0
    return np.rint(grey).astype(np.uint8)[first : first + (1 << depth)]


def check_tags(tags: Iterable[str]) -> None:
    """Raise InputError for a keyword that DICOM does not know, or where pydicom is missing."""
    words = _pydicom().datadict
    for tag in tags:
        if words.tag_for_keyword(tag) is None:
            near = ", ".join(difflib.get_close_matches(tag, words.keyword_dict))
            raise InputError(f"dicom:{tag}: DICOM has no such keyword; near it: {near}")


def dicom_header(path: Path, tags: Sequence[str]) -> dict[str, str]:
    """Return the values of a DICOM file's header, as text, by DICOM's keywords such as PatientAge.

    "" where the header has none; of several numbers the first, of several words all, with a
    backslash between them as in DICOM. No pixel is read. Raises InputError for a keyword that DICOM
    does not know, a file that is no DICOM, and where pydicom is missing.
    """
    pydicom = _pydicom()
    check_tags(tags)
    try:
        header = _open(path, stop_before_pixels=True, specific_tags=list(tags))
        given = {tag: header[tag] for tag in tags if tag in header}
        values = {tag: one.value for tag, one in given.items() if one.value is not None}
    except Exception as error:  # whatever pydicom raises here is this file's fault
        raise InputError(f"{path}: its DICOM header cannot be read ({error}); mend it") from None
    several = pydicom.multival.MultiValue
    for tag, value in values.items():
        if isinstance(value, several):
            first = given[tag].VR in ("DS", "IS", "US", "FL", "FD")
            values[tag] = value[0] if first and value else "\\".join(map(str, value))
    return {tag: str(values.get(tag, "")).strip() for tag in tags}


def _pydicom() -> ModuleType:
    """Return pydicom, or raise InputError that says what to install."""
    try:
        import pydicom.pixels
    except ImportError:
        todo = "pip install pydicom 'pylibjpeg[all]', which is fedutils' extra `dicom`"
        raise InputError(f"to read DICOM, pydicom 3 is needed: {todo}") from None
    return pydicom
