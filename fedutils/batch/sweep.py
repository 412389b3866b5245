"""A run for each combination of values."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.errors import InputError, NotebookFailed
from ..run import best_rounds, read_history
from ..settings import Settings
from .notebook import FOLDER, READ_FILMS
from .run import PREPARES, choose_notebooks, resolve, run


def sweep(
    values: Mapping[str, Any],
    grid: Mapping[str, list[str]],
    only: str = "",
    force: bool = False,
    notebooks: Path = FOLDER,
) -> list[Settings]:
    """Execute a run for each combination of the grid's values, and return their parameters.

    A run that is finished is skipped, the films are prepared once, and equal models are shared.
    With a name given, a run is called NAME-VALUE-VALUE. The last run's notebook 04 lays all of them
    side by side, and a table on validation films, to choose by, is printed. A notebook that fails
    costs its run only: NotebookFailed is raised at the end. Raises InputError, before any notebook
    starts, where `run` would for any combination.
    """
    if taken := [key for key in grid if key in (*PREPARES, "name") or key in values]:
        raise InputError(
            f"sweep {taken[0]}: prepares other films or is given already; sweep it by a run each,"
            " in a work folder each"
        )
    runs = []
    for row in itertools.product(*grid.values()):
        name = "-".join([values["name"], *row]) if values.get("name") else ""
        runs.append(dict(values) | dict(zip(grid, row, strict=True)) | {"name": name})
    resolved = [resolve(one)[0] for one in runs]
    runs[-1]["compare"] = ",".join(settings.name for settings in resolved[:-1])
    stems, failures = choose_notebooks(only), []
    for number, one in enumerate(runs, start=1):
        texts = " ".join(f"{key}={one[key]}" for key in grid)
        print(f"\nRun {number} of {len(runs)}: {texts}", flush=True)
        chosen = [stem[:2] for stem in stems if number == 1 or stem not in READ_FILMS]
        try:
            run(one, ",".join(chosen), force, notebooks)
        except NotebookFailed as error:
            failures.append(f"{texts}: {error}")
    _print_validation(runs, resolved, list(grid))
    if failures:
        raise NotebookFailed("; ".join(failures))
    return resolved


def _print_validation(
    runs: list[dict[str, Any]], resolved: list[Settings], keys: list[str]
) -> None:
    """Print what each run of a sweep reached on validation films, by arm, as a Markdown table."""
    print(f"\n| {' | '.join(keys)} | run | arm | models | AUROC | loss | best round |")
    print("|---" * (len(keys) + 6) + "|")
    for one, settings in zip(runs, resolved, strict=True):
        if not (settings.run / "history.csv").is_file():
            continue  # notebook 03 was not among the chosen ones
        for arm, rows in best_rounds(read_history(settings.run)).groupby("arm", sort=False):
            cells = [str(one[key]) for key in keys] + [settings.name, arm, str(len(rows))]
            mean = rows[["val_auroc", "val_loss", "round"]].mean()
            cells += [f"{mean['val_auroc']:.3f}", f"{mean['val_loss']:.3f}", f"{mean['round']:.1f}"]
            print(f"| {' | '.join(cells)} |")
