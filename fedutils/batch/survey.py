"""What hospitals said of their films before training, as a table and in notebook 01's figures."""

import json
from pathlib import Path

import numpy as np

from ..films.survey import shares, tabulate_surveys
from ..plots import style
from ..plots.films import client_heatmap, film_grid


def draw_surveys(folder: Path) -> list[Path]:
    """Draw the `survey.json` of a folder and write its counts as a table; return the files."""
    surveys = json.loads((folder / "survey.json").read_text())
    report = shares(surveys).dropna(axis="columns", how="all")
    figures = {"hospitals": client_heatmap(report, "survey")}
    means = {name: one["mean film"] for name, one in surveys.items() if "mean film" in one}
    if means:
        films = [np.array(mean, np.uint8) for mean in means.values()]
        figures["mean_films"] = film_grid(films, list(means), "survey", "Mean film by hospital")
    least = min(one["least"] for one in surveys.values())
    files = [folder / f"{name}.png" for name in figures]
    for file, figure in zip(files, figures.values(), strict=True):
        style.save(figure, file)
    table = folder / "survey.csv"
    tabulate_surveys(surveys, f"of under {least}").to_csv(table)
    return [*files, table]
