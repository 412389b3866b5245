"""All parameters: the union of what each room declares, filled and checked."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import parameters
from .base.errors import InputError, each
from .base.files import find_work, sha256
from .base.parameters import Parameters, assigned, check_names, check_value, convert, parameter
from .base.provenance import provenance
from .base.weights import find_profile
from .client import ClientParameters
from .evidence.compare import CompareParameters
from .fedavg import AggregationParameters
from .films.decode import FilmParameters
from .films.find import find_data
from .films.partition import PartitionParameters
from .films.sources import split_folders
from .films.split import SplitParameters
from .model import ModelParameters
from .privacy.client import PrivacyParameters
from .privacy.masks import MaskParameters
from .rounds import RoundParameters
from .run import RunParameters
from .strategies import STRATEGIES, StrategyParameters
from .training.arms import ArmParameters
from .training.features import FeatureParameters
from .training.replicas import ReplicaParameters


@dataclass(frozen=True)
class ProfileParameters(Parameters):
    """What an empty parameter means: minutes on two cores, or a GPU with ImageNet weights."""

    profile: str = parameter(
        "auto", "auto, demo (no GPU, no network) or kaggle: what an empty parameter means",
        allowed=("auto", "demo", "kaggle"), identity=False,
    )  # fmt: skip


ROOMS = (
    RunParameters, ProfileParameters, SplitParameters, FilmParameters, PartitionParameters,
    ModelParameters, ClientParameters, AggregationParameters, StrategyParameters, RoundParameters,
    PrivacyParameters, MaskParameters, FeatureParameters, ArmParameters, ReplicaParameters,
    CompareParameters,
)  # fmt: skip


@dataclass(frozen=True)
class Settings(*reversed(ROOMS)):
    """All parameters; once resolved, only `data_dir` may be empty, which is the phantom."""

    def check(self) -> None:
        """Raise InputError, which names the parameter, on a value that is not allowed."""
        for name, field in FIELDS.items():
            check_value(field, getattr(self, name))
        for room in ROOMS:
            room.check(self)

    def identity(self) -> dict[str, Any]:
        """Return the parameters that change the result; a moved data folder is the same data."""
        values = {n: getattr(self, n) for n, f in FIELDS.items() if f.metadata["identity"]}
        # Noise that is chosen so that all rounds stay within a budget depends on their number.
        calibrated = self.dp != "off" and not self.noise_multiplier
        values |= {"rounds": self.rounds} if calibrated else {}
        # A share of the clients is at least `min_clients`.
        values |= {"min_clients": self.min_clients} if self.client_fraction < 1 else {}
        names = [folder.name for folder in split_folders(self.data_dir)]
        return values | {"data_dir": ";".join(names) or "phantom"}


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def read_parameters(values: Mapping[str, Any]) -> Settings:
    """Pick the parameters out of a mapping, such as a notebook's globals(), check and resolve them.

    Names that are no parameter are ignored, for a notebook has many, but not in the cells that give
    parameters; the command line checks all. Raises InputError that names the parameter, what was
    found and what is allowed.
    """
    check_names(given_names(values), FIELDS)
    given = {name: convert(FIELDS[name], values[name]) for name in FIELDS if name in values}
    filled = fill(Settings(**given))
    filled.check()
    parameters.check_meant(FIELDS, given, filled, fill(Settings()))
    beside = provenance(filled.device, filled.precision, filled.weights)
    about = json.dumps(filled.identity() | beside, sort_keys=True)
    return dataclasses.replace(filled, name=filled.name or sha256(about.encode())[:8])


def convert_texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values, maybe text from the command line, to their types; InputError on a name, and
    on a number that would mean the profile's.
    """
    check_names(values, FIELDS)
    return {name: parameters.convert_given(FIELDS[name], value) for name, value in values.items()}


def given_names(values: Mapping[str, Any]) -> list[str]:
    """Return the names that a notebook, whose globals these are, assigns as its parameters.

    In the cell that declares them, as it ran last, and in the one that papermill puts below it.
    """
    kinds = rf"(?m)^({'|'.join(FIELDS)}): \w+ = ", r"\A# Parameters\n"
    cells = [[cell for cell in values.get("In", ()) if re.search(kind, cell)] for kind in kinds]
    return assigned(*(cell for found in cells for cell in found[-1:]))


def fill(given: Settings) -> Settings:
    """Replace what is empty by the profile's value, and paths by absolute ones."""
    for name in ("profile", "strategy"):
        check_value(FIELDS[name], getattr(given, name))
    profile = find_profile() if given.profile == "auto" else given.profile
    number = ("demo", "kaggle").index(profile)
    open_ones = [n for n, f in FIELDS.items() if f.metadata["profiles"] and not getattr(given, n)]
    empty = {name: FIELDS[name].metadata["profiles"][number] for name in open_ones}
    folders = map(str, split_folders(given.data_dir)) if given.data_dir else [""]
    found = [data.resolve() for data in each(find_data, folders) if data]
    if len(set(found)) < len(found):
        raise InputError(f"data_dir={given.data_dir!r} names a folder twice, maybe by a link")
    work = find_work(given.work_dir)
    places = {"work_dir": str(work), "data_dir": ";".join(map(str, found))}
    weights = empty.get("weights", given.weights)
    if weights not in ("none", "imagenet"):  # a notebook runs in another folder than the command
        places["weights"] = str(Path(weights).expanduser().resolve())
    tracked = given.tracked or ("all" if weights == "none" else "layer4,fc")
    rate = given.server_lr or STRATEGIES[given.strategy].server_lr
    chosen = {"profile": profile, "tracked": tracked, "server_lr": rate}
    chosen["lr"] = given.lr or (4e-4 if weights == "none" else 1e-3)
    return dataclasses.replace(given, **empty | places | chosen)
