"""Drawn films in the exact layout of five downloads: NIH, CheXpert, VinBigData, RSNA and PadChest.

Each set speaks of the drawn findings in its own words, and of no others; what it does not look for, it
does not say. Columns, names of files, kinds of pixels and quirks are those of the real sets.
"""

import io
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from fedutils.base.device import count_cores
from fedutils.base.rng import generator
from fedutils.films.phantom.cases import Film, phantom_table, to_films
from fedutils.films.phantom.signs import draw_film
from fedutils.films.phantom.write import NIH_COLUMNS

SIZE = 64  # pixels
OPACITIES = ("Atelectasis", "Infiltration", "Pneumonia", "Consolidation", "Edema")
# What is said of a drawn finding, set by set: a word, and what it means. The order is the table's.
CHEXPERT = {
    "Enlarged Cardiomediastinum": ("Cardiomegaly",), "Cardiomegaly": ("Cardiomegaly",),
    "Lung Opacity": OPACITIES, "Lung Lesion": ("Mass", "Nodule"), "Edema": ("Edema",),
    "Consolidation": ("Consolidation",), "Pneumonia": ("Pneumonia",),
    "Atelectasis": ("Atelectasis",), "Pneumothorax": ("Pneumothorax",),
    "Pleural Effusion": ("Effusion",), "Pleural Other": ("Pleural_Thickening",), "Fracture": (),
    "Support Devices": (),
}  # fmt: skip
VINBIGDATA = {
    "Aortic enlargement": (), "Atelectasis": ("Atelectasis",), "Calcification": (),
    "Cardiomegaly": ("Cardiomegaly",), "Consolidation": ("Consolidation",), "ILD": (),
    "Infiltration": ("Infiltration",), "Lung Opacity": OPACITIES, "Nodule/Mass": ("Nodule", "Mass"),
    "Other lesion": (), "Pleural effusion": ("Effusion",),
    "Pleural thickening": ("Pleural_Thickening",), "Pneumothorax": ("Pneumothorax",),
    "Pulmonary fibrosis": ("Fibrosis",),
}  # fmt: skip
PADCHEST = {
    "laminar atelectasis": "Atelectasis", "cardiomegaly": "Cardiomegaly",
    "pleural effusion": "Effusion", "infiltrates": "Infiltration", "pulmonary mass": "Mass",
    "nodule": "Nodule", "pneumonia": "Pneumonia", "pneumothorax": "Pneumothorax",
    "consolidation": "Consolidation", "pulmonary edema": "Edema", "emphysema": "Emphysema",
    "pulmonary fibrosis": "Fibrosis", "apical pleural thickening": "Pleural_Thickening",
    "hiatal hernia": "Hernia",
}  # fmt: skip
PADCHEST_COLUMNS = [
    "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth",
    "PatientSex_DICOM", "ViewPosition_DICOM", "Projection", "MethodProjection", "Pediatric",
    "Modality_DICOM", "Manufacturer_DICOM", "PhotometricInterpretation_DICOM",
    "PixelRepresentation_DICOM", "PixelAspectRatio_DICOM", "SpatialResolution_DICOM",
    "BitsStored_DICOM", "WindowCenter_DICOM", "WindowWidth_DICOM", "Rows_DICOM",
    "Columns_DICOM", "XRayTubeCurrent_DICOM", "Exposure_DICOM", "ExposureInuAs_DICOM",
    "ExposureTime", "RelativeXRayExposure_DICOM", "ReportID", "Report", "MethodLabel", "Labels",
    "Localizations", "LabelsLocalizationsBySentence", "labelCUIS", "LocalizationsCUIS",
]  # fmt: skip


class Drawn(NamedTuple):
    """One film: its row in the phantom's table, its findings, its pixels and boxes."""

    row: Any
    film: Film
    pixels: np.ndarray
    boxes: dict[str, tuple]

    def says(self, meanings: Sequence[str]) -> bool:
        """Tell whether a word with these meanings is true of this film."""
        return bool({*meanings} & {*self.film.findings})


def draw(patients: int, seed: int, one_each: bool = False) -> list[Drawn]:
    """Draw the films of a hospital; `one_each` keeps each patient's first."""
    table = phantom_table(patients, seed)
    table = table[table["Follow-up #"] == 0] if one_each else table
    films = to_films(table)
    with ThreadPoolExecutor(count_cores()) as pool:
        drawn = list(pool.map(lambda film: draw_film(film, SIZE, seed), films))
    rows = table.rename(columns=lambda name: name.replace(" ", "_")).itertuples()
    return [Drawn(row, film, *one) for row, film, one in zip(rows, films, drawn, strict=True)]


def write_nih(folder: Path, patients: int, seed: int) -> None:
    """Write NIH's set of 2020: one table with `A|B` as labels, two lists, 8-bit PNG."""
    films, table = draw(patients, seed), phantom_table(patients, seed)
    (folder / "images").mkdir(parents=True)
    for one in films:
        Image.fromarray(one.pixels).save(folder / "images" / one.film.name)
    body = table[NIH_COLUMNS].assign(repeated=table["Spacing"])
    head = ",".join(NIH_COLUMNS[:7]) + ",OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    text = f"{head}\n" + body.to_csv(index=False, header=False)
    (folder / "Data_Entry_2017_v2020.csv").write_text(text)
    for split, names in table["Image Index"].groupby(table["split"]):
        (folder / f"{split}_list.txt").write_text("\n".join(names) + "\n")


def write_chexpert(folder: Path, patients: int, seed: int) -> None:
    """Write CheXpert-small: the patient in the path, four marks, radiologists' valid.csv, JPEG."""
    rng, tables = generator(seed, "chexpert's reports"), {"train": [], "valid": []}
    for one in draw(patients, seed):
        split = "valid" if one.row.split == "test" else "train"
        place = f"{split}/patient{one.film.patient:05d}/study{one.film.follow_up + 1}"
        (folder / place).mkdir(parents=True)
        marks = {word: _mark(one.says(means), split, rng) for word, means in CHEXPERT.items()}
        healthy = not one.film.findings
        marks = {"No Finding": "1.0" if healthy else "0.0" if split == "valid" else ""} | marks
        if healthy and split == "train":
            marks |= dict.fromkeys(CHEXPERT, "")  # what the labeler writes beside No Finding
        sex = {"M": "Male", "F": "Female"}[one.film.sex]
        for view, projection in ("frontal", one.film.view), ("lateral", ""):
            if view == "lateral" and one.film.patient % 5:
                continue
            name = f"{place}/view{1 + (view == 'lateral')}_{view}.jpg"
            Image.fromarray(one.pixels).save(folder / name, quality=95)
            about = [f"CheXpert-v1.0-small/{name}", sex, min(90, one.row.Patient_Age)]
            tables[split].append([*about, view.capitalize(), projection, *marks.values()])
    columns = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", *CHEXPERT]
    for split, rows in tables.items():
        pd.DataFrame(rows, columns=columns).to_csv(folder / f"{split}.csv", index=False)


def _mark(present: bool, split: str, rng: np.random.Generator) -> str:
    """Mark a word as the labeler does, which is silent or unsure at times; radiologists are not."""
    if split == "valid":
        return "1.0" if present else "0.0"
    if rng.random() < 0.05:
        return "-1.0"
    return "1.0" if present else str(rng.choice(["0.0", ""]))


def write_vinbigdata(folder: Path, patients: int, seed: int) -> None:
    """Write VinBigData: a row a box and reader, of whom not all see all; 12 bits, MONOCHROME1 too."""
    rng, rows = generator(seed, "readers"), []
    (folder / "train").mkdir(parents=True)
    classes = [*VINBIGDATA, "No finding"]
    for number, one in enumerate(draw(patients, seed, one_each=True)):
        name = uuid.UUID(int=(seed << 64) + number).hex
        values, mode = one.pixels.astype(np.uint16) * 16 + 7, "MONOCHROME2"
        if number % 2:
            values, mode = 4095 - values, "MONOCHROME1"
        tags = {"PhotometricInterpretation": mode}
        write_dicom(folder / "train" / f"{name}.dicom", values, 12, **tags)
        said = [
            (w, b) for w, means in VINBIGDATA.items() if one.says(means) for b in _box(one, means)
        ]
        seen = rng.random((3, len(said))) < 0.8
        seen[0] |= ~seen.any(axis=0)
        for reader, mine in zip(("R8", "R9", "R10"), seen, strict=True):
            words = [found for found, yes in zip(said, mine, strict=True) if yes]
            for word, box in words or [("No finding", ("",) * 4)]:
                x, y, w, h = box
                corners = box if word == "No finding" else (x, y, x + w, y + h)
                rows.append([name, word, classes.index(word), reader, *corners])
    columns = ["image_id", "class_name", "class_id", "rad_id", "x_min", "y_min", "x_max", "y_max"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "train.csv", index=False)


def _box(one: Drawn, meanings: Sequence[str]) -> Iterator[tuple]:
    """Give the boxes of what a word means on this film."""
    return (one.boxes[finding] for finding in meanings if finding in one.boxes)


def write_rsna(folder: Path, patients: int, seed: int) -> None:
    """Write RSNA's challenge: a row a box, or one without, of pneumonia; DICOM with JPEG inside."""
    rows, images = [], folder / "stage_2_train_images"
    images.mkdir(parents=True)
    for number, one in enumerate(draw(patients, seed, one_each=True)):
        name = str(uuid.UUID(int=(seed << 64) + number))
        tags = {"PatientID": name, "PatientSex": one.film.sex, "ViewPosition": one.film.view}
        tags["PatientAge"] = str(one.row.Patient_Age)
        write_dicom(images / f"{name}.dcm", one.pixels, 8, jpeg=True, **tags)
        boxes = list(_box(one, ["Pneumonia"]))
        rows += [[name, *box, 1] for box in boxes] or [[name, "", "", "", "", 0]]
    columns = ["patientId", "x", "y", "width", "height", "Target"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "stage_2_train_labels.csv", index=False)


def write_padchest(folder: Path, patients: int, seed: int) -> None:
    """Write PadChest: 35 columns and an unnamed one, a Python list as text, 16-bit PNG of 12 bits."""
    rows = []
    for one in draw(patients, seed):
        name, part = f"{seed}_{one.film.name}", str(one.film.patient % 3)
        words = [word for word, means in PADCHEST.items() if one.says([means])]
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(one.pixels.astype(np.uint16) * 16 + 7).save(folder / part / name)
        about = {
            "ImageID": name, "ImageDir": part, "StudyDate_DICOM": 20140115 + one.film.follow_up,
            "StudyID": f"{one.film.patient}{one.film.follow_up:04d}",
            "PatientID": f"{one.film.patient:032x}", "PatientBirth": 2014.0 - one.row.Patient_Age,
            "PatientSex_DICOM": one.film.sex, "Modality_DICOM": ["CR", "DX"][one.film.scanner % 2],
            "Projection": {"PA": "PA", "AP": "AP_horizontal"}[one.film.view],
            "Manufacturer_DICOM": ["ImagingDynamicsCompanyLtd", "PhilipsMedicalSystems"]
            [one.film.scanner % 2],
            "MethodLabel": "Physician", "Labels": str(words or ["normal"]),
        }  # fmt: skip
        rows.append(about)
    table = pd.DataFrame(rows).reindex(columns=PADCHEST_COLUMNS)
    table.to_csv(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv")


def write_dicom(
    path: Path, values: np.ndarray, bits: int, syntax: str = "", jpeg: bool = False, **tags: object
) -> Path:
    """Write grey values as a DICOM film, maybe compressed by pydicom (`syntax`) or as a JPEG."""
    from pydicom import config, uid
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    film = Dataset()
    film.file_meta = FileMetaDataset()
    film.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit if jpeg else uid.ExplicitVRLittleEndian
    film.SOPClassUID = uid.ComputedRadiographyImageStorage
    film.SOPInstanceUID = uid.generate_uid(entropy_srcs=[path.name])
    film.Rows, film.Columns = values.shape[:2]
    film.SamplesPerPixel, film.PhotometricInterpretation = 1, "MONOCHROME2"
    film.BitsAllocated = 8 * values.dtype.itemsize
    film.BitsStored, film.HighBit = bits, bits - 1
    film.PixelRepresentation = int(values.dtype.kind == "i")
    film.PixelData = values.tobytes()
    if jpeg:
        Image.fromarray(values).save(packed := io.BytesIO(), "JPEG", quality=95)
        film.PixelData = encapsulate([packed.getvalue()])
    film["PixelData"].VR = "OB" if film.BitsAllocated == 8 else "OW"
    with config.disable_value_validation():  # RSNA's ages lack the Y that DICOM asks for
        for name, value in tags.items():
            setattr(film, name, value)
    if syntax:
        film.compress(syntax)
    film.save_as(path, enforce_file_format=True)
    return path


# By folder, as the download calls it: who writes it, patients, seed.
DOWNLOADS: dict[str, tuple[Callable[[Path, int, int], None], int, int]] = {
    "NIH": (write_nih, 150, 101),
    "CheXpert-v1.0-small": (write_chexpert, 150, 102),
    "VinBigData": (write_vinbigdata, 250, 103),
    "RSNA": (write_rsna, 250, 104),
    "PadChest": (write_padchest, 150, 105),
}


def write_download(name: str, root: Path, patients: int = 0) -> Path:
    """Write one of DOWNLOADS below a folder, unless it is there."""
    folder, (write, usual, seed) = root / name, DOWNLOADS[name]
    if not (folder / ".written").is_file():
        write(folder, patients or usual, seed)
        (folder / ".written").touch()
    return folder
