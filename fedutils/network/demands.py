"""What a network heeds, and what a hospital takes from a server: a run's parameters, each of them
checked, and no less than it insists on.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..base.parameters import check_value, convert
from ..settings import FIELDS, ROOMS, Settings

# What means nothing over a network, and why: refused unless it is as it is by default.
REFUSED = tomllib.loads(Path(__file__).with_name("refused.toml").read_text())


def read_run_settings(config: Mapping[str, Any], run: str, node: Mapping[str, Any]) -> Settings:
    """Return a run's parameters with those that this hospital, its `node`, has set itself.

    Raises InputError for a value that none may have, or that is less than the hospital insists on.
    """
    heeded = [key for key in FIELDS if key in config and key not in REFUSED]
    given = {key: convert(FIELDS[key], config[key]) for key in heeded}
    given["name"] = convert(FIELDS["name"], run)
    for key, value in given.items():
        check_value(FIELDS[key], value)
    if not run:
        raise InputError("name='': a run has one")
    here = {"work_dir": node["work_dir"], "device": node.get("device", "auto")}
    if "weights" in node and given.get("weights") != "none":
        here["weights"] = node["weights"]
    limit = float(node.get("total_epsilon", 0))
    if limits := [one for one in (limit, given.get("total_epsilon", 0.0)) if one]:
        here["total_epsilon"] = min(limits)
    settings = Settings(**given | here)
    for room in ROOMS:
        room.check(settings)
    if node.get("secure_aggregation") == "True" and not settings.secure_aggregation:
        raise InputError("the server asks for bare updates, and this hospital sends masked ones")
    wanted = node.get("dp", "patient" if limit else "off")
    if settings.dp != wanted != "off":
        raise InputError(f"the run has dp={settings.dp}, and this hospital insists on dp={wanted}")
    if settings.dp != "off" and not noise_is_secret(settings):
        raise InputError(f"dp={settings.dp} with secure=false: the server could draw the noise")
    return settings


def check_network(settings: Settings) -> None:
    """Raise InputError for a parameter that a network cannot heed."""
    for name, why in REFUSED.items():
        value, only = getattr(settings, name), FIELDS[name].default
        if value != only:
            raise InputError(f"over a network only {name}={only!r}, not {value!r}: {why}")
    if settings.batchnorm == "local":
        only = "batchnorm=precise, average or frozen"
        raise InputError(f"over a network only {only}: local models never leave the hospitals")


def noise_is_secret(settings: Settings) -> bool:
    """Tell whether noise comes from the system, not from the seed, which the server knows."""
    return settings.secure
