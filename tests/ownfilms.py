"""A small folder of films of one's own, PNG and JPEG, with the mapping that data/README.md shows."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from fedutils.films.phantom.write import draw_batch

README = (Path(__file__).parents[1] / "data" / "README.md").read_text()
MARKS, WORDS = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
MARKS_TABLE, WORDS_TABLE = re.findall(r"```csv\n(.*?)```", README, re.DOTALL)


def write(folder, mapping=MARKS, table=MARKS_TABLE, films=()):
    """Write a folder of own films; the films are empty files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "films.toml").write_text(mapping)
    name = re.search(r'table = "(.*?)"', mapping)
    (folder / (name[1] if name else "table.csv")).write_text(table)
    for film in films:
        (folder / film).parent.mkdir(parents=True, exist_ok=True)
        (folder / film).touch()
    return folder


def rows_of(*films):
    """The README's table with these films: (name, patient), or a name, of a patient of its own."""
    header, row, *_ = MARKS_TABLE.splitlines()
    rest = row.removeprefix("pictures/A-17/first.png;A-17")
    pairs = [(film, f"P{k}") if isinstance(film, str) else film for k, film in enumerate(films)]
    return "\n".join([header, *(f"{name};{patient}{rest}" for name, patient in pairs)]) + "\n"


def write_films(folder, patients=40):
    """Write real PNG and JPEG films of `patients` with 6 findings and gaps, in the README's form."""
    rng, lines = np.random.default_rng(0), [MARKS_TABLE.splitlines()[0]]
    pixels = draw_batch(20, size=64)
    for film in range(2 * patients):
        patient, number = divmod(film, 2)
        path = f"pictures/P-{patient:02d}/{number}.{'jpg' if film % 3 else 'PNG'}"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels[film % 20])
        (image.convert("RGB") if film % 4 else image).save(folder / path)
        marks = np.where(rng.random(6) < 0.15, "", (rng.random(6) < 0.4).astype(int).astype(str))
        row = [path, f"P-{patient:02d}", number, "pa", 50, "female", f"Room {patient % 2}", *marks]
        lines.append(";".join(map(str, row)))
    return write(folder, table="\n".join(lines))
