"""A run for each combination of values."""

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..base.errors import InputError, NotebookFailed
from ..evidence.tables import best_rounds
from ..run import read_history
from ..settings import Settings, convert_texts, read_parameters
from .early import check_early
from .notebook import READ_FILMS
from .run import PREPARES, choose_notebooks, run


def sweep(
    values: Mapping[str, Any], grid: Mapping[str, list[str]], only: str = "", force: bool = False
) -> list[Settings]:
    """Execute a run for each combination of the grid's values, and return their parameters.

    With a name given, a run is called NAME-VALUE-VALUE. The last run's notebook 04 lays all of them
    side by side, and a table on validation films, to choose by, is printed. Raises InputError first
    where `run` would for any, and NotebookFailed at the end: a failure costs its run only.
    """
    if "compare" in (*grid, *values):
        raise InputError("compare: a sweep lays its own runs side by side, so it takes none")
    if taken := [key for key in grid if key in (*PREPARES, "name") or key in values]:
        what = f"sweep {taken[0]}: prepares other films or is given already"
        raise InputError(f"{what}; sweep it by a run each, in a work folder each")
    runs = []
    for row in itertools.product(*grid.values()):
        words = [re.sub(r"[^\w.-]+", "-", value) for value in row]
        name = "-".join([values["name"], *words]) if values.get("name") else ""
        runs.append(dict(values) | dict(zip(grid, row, strict=True)) | {"name": name})
    resolved = [read_parameters(convert_texts(one)) for one in runs]
    for name, count in Counter(settings.name for settings in resolved).items():
        if count > 1:
            what = f"sweep {' '.join(grid)}: {count} of these runs would be one, {name}"
            raise InputError(f"{what}; give a --name if the values continue a run, and none twice")
    stems, failures, done = choose_notebooks(only), [], []
    check_early(resolved, stems)
    for number, one in enumerate(runs, start=1):
        texts = " ".join(f"{key}={one[key]}" for key in grid)
        print(f"\nRun {number} of {len(runs)}: {texts}", flush=True)
        chosen = [stem[:2] for stem in stems if number == 1 or stem not in READ_FILMS]
        try:
            beside = {"compare": ",".join(done)} if number == len(runs) else {}
            done.append(run(one | beside, ",".join(chosen), force).name)
        except (InputError, NotebookFailed) as error:
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
            cells = [one[key] for key in keys] + [settings.name, arm, len(rows)]
            cells += [f"{rows['val_auroc'].mean():.3f}", f"{rows['val_loss'].mean():.3f}"]
            print(f"| {' | '.join(map(str, cells))} | {rows['round'].mean():.1f} |")
