"""A run that was trained, and what may be asked of it afterwards."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..base.errors import InputError
from ..base.parameters import check_names, convert
from ..settings import FIELDS, Settings, fill, given_names, read_run

# What notebook 04 takes; all else is as the run was trained.
EVALUATES = ("work_dir", "name", "device", "cache_features", "compare")


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
