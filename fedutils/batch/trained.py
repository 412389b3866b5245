"""A run that was trained, and what may be asked of it afterwards."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ..base.errors import InputError
from ..base.files import KAGGLE, fetch_runs, find_work
from ..base.parameters import check_names, convert
from ..run import read_history
from ..settings import FIELDS, Settings, fill, given_names

# What notebook 04 takes; all else is as the run was trained.
EVALUATES = ("work_dir", "name", "device", "cache_features", "compare")


def read_run(
    work_dir: str = "", name: str = "", device: str = "auto", cache_features: bool = False
) -> Settings:
    """Return the settings of a run that notebook 03 began; without a name that of the latest.

    Raises InputError where there is none, here or attached.
    """
    work = find_work(work_dir)
    fetch_runs(work)
    found = sorted(work.glob(f"runs/{name or '*'}/config.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        attached = f" and none in {KAGGLE / 'input'}" if KAGGLE.is_dir() else ""
        raise InputError(f"no run in {work / 'runs' / name}{attached}: run notebook 03 first")
    config, run = json.loads(found[-1].read_text()), found[-1].parent
    given = {key: config[key] for key in FIELDS if key in config}
    names = [name for name, field in FIELDS.items() if field.metadata["identity"]]
    for missing in [name for name in names if config and name not in config]:
        what = f"{run} was trained by another fedutils, which knew no {missing}"
        raise InputError(f"{what}: evaluate it with that one, or train it again")
    here = {"work_dir": str(work), "name": run.name, "device": device}
    if (run / "history.csv").is_file():  # the rounds that there are, whatever was asked for
        given.setdefault("rounds", int(read_history(run)["round"].max()))
    settings = dataclasses.replace(Settings(**given), **here)
    # A run may have been trained without a cache: then there is none to be used.
    return dataclasses.replace(settings, cache_features=cache_features and not settings.augment)


def read_evaluated(values: Mapping[str, Any]) -> Settings:
    """Return the settings of the run that notebook 04, whose globals these are, is to evaluate.

    Raises InputError for a parameter that was given and is not that of the run.
    """
    names = given_names(values)
    check_names(names, FIELDS)
    settings = read_run(**{name: values[name] for name in EVALUATES[:4]})
    check_trained({name: values[name] for name in names}, settings)
    return dataclasses.replace(settings, compare=values["compare"])


def check_trained(given: Mapping[str, Any], settings: Settings) -> None:
    """Raise InputError for a parameter that is not that of a run, whose `settings` were read.

    What is left to the profile passes; what only training heeds, such as `max_hours`, does not.
    """
    empty = {name: field.default for name, field in FIELDS.items() if field.metadata["profiles"]}
    asked = {n: convert(FIELDS[n], value) for n, value in given.items() if n not in EVALUATES}
    asked = {n: value for n, value in asked.items() if value or n not in empty}
    known = {"rounds": settings.rounds} | settings.identity()
    if other := asked.keys() - known.keys() - {"profile"}:
        raise InputError(f"{min(other)}: only training heeds it, notebook 03; leave it out here")
    of_profile = {} if asked.get("profile", "auto") == "auto" else empty
    beside = {"data_dir": "", "profile": "demo"}  # a run keeps but the folder's name
    wanted = fill(dataclasses.replace(settings, **beside | of_profile | asked))
    wanted = {"rounds": wanted.rounds} | wanted.identity()
    compared = asked.keys() | of_profile.keys() - {"rounds"}
    for name in [n for n in known if n in compared and wanted[n] != known[n]]:
        said = f"{name}={wanted[name]!r}: run {settings.name} was trained with {known[name]!r}"
        raise InputError(f"{said}; choose another run by its name")
