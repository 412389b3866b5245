"""The parameters of a run: names, types, allowed values, two profiles; and the machine."""

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

from .device import PRECISIONS, find_devices
from .findings import InputError
from .nih import KAGGLE, find_data, search_files
from .partition import METHODS
from .weights import find_weights, load_weights

__version__ = "0.1.0"
ROOT_MARKER = "notebooks/01_explore.py"
CHOICES = {
    "profile": ("auto", "demo", "kaggle"),
    "batchnorm": ("average", "precise", "frozen", "local"),
    "partition": METHODS,
    "strategy": ("fedavg", "fedavgm", "fedadam", "fedprox", "scaffold"),
    "aggregation": ("mean", "median", "trimmed"),
    "optimizer": ("adamw", "sgd"),
    "precision": ("auto", *PRECISIONS),
    "feature_dtype": ("fp16", "fp32"),
}
ARMS = ("federated", "centralised", "local")
LAYERS = ("all", "conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
# Lower and upper bound; both are allowed values.
RANGES = {
    "image_size": (32, 1024), "num_clients": (1, 100_000), "rounds": (1, 10_000),
    "local_epochs": (1, 1000), "batch_size": (1, 4096), "max_films": (0, math.inf),
    "threads": (0, 1024), "min_clients": (1, 100_000), "client_fraction": (1e-6, 1.0),
    "trim": (0.0, 0.49), "mu": (0.0, math.inf), "lr": (1e-12, math.inf), "momentum": (0.0, 1.0),
    "server_lr": (1e-12, math.inf), "server_momentum": (0.0, 1.0), "weight_decay": (0.0, math.inf),
    "lr_centralised": (0.0, math.inf), "lr_local": (0.0, math.inf),
    "max_hours": (0.0, math.inf), "client_seconds": (0.0, math.inf), "alpha": (1e-12, math.inf),
}  # fmt: skip
# What an empty parameter means: in seconds on two cores, or on a GPU with ImageNet weights.
PROFILES: dict[str, dict[str, Any]] = {
    "demo": dict(image_size=64, weights="none", rounds=6, num_clients=3, batch_size=32),
    "kaggle": dict(image_size=224, weights="imagenet", rounds=15, num_clients=5, batch_size=64),
}
FEATURE_LAYERS = {"layer4", "fc"}  # what may be trained from cached features of conv1 to layer3
# A change of these continues a run; a change of any other parameter is another run. The cache is
# how a run computes, as the device is; what may change the result by more than rounding (precision,
# augment, the dtype that features are stored in) is part of what it computes.
NOT_IDENTITY = (
    "work_dir", "name", "profile", "rounds", "device", "max_hours", "min_clients", "compare",
    "cache_features",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """All parameters; once resolved, only `data_dir` may be empty, which is the phantom."""

    data_dir: str = ""
    work_dir: str = ""
    name: str = ""
    profile: str = "auto"
    seed: int = 0
    image_size: int = 0
    max_films: int = 0
    weights: str = ""
    tracked: str = ""
    batchnorm: str = "precise"
    partition: str = "iid"
    num_clients: int = 0
    alpha: float = 0.5
    strategy: str = "fedavg"
    mu: float = 0.01
    server_lr: float = 0.0
    server_momentum: float = 0.9
    aggregation: str = "mean"
    trim: float = 0.2
    client_fraction: float = 1.0
    min_clients: int = 1
    client_seconds: float = 0.0
    rounds: int = 0
    local_epochs: int = 1
    batch_size: int = 0
    optimizer: str = "adamw"
    lr: float = 1e-3
    lr_centralised: float = 0.0
    lr_local: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    augment: bool = True
    cache_features: bool = False
    feature_dtype: str = "fp16"
    precision: str = "auto"
    arms: str = "federated"
    seeds: str = "0"
    device: str = "auto"
    threads: int = 0
    max_hours: float = 0.0
    compare: str = ""

    @property
    def arm_list(self) -> list[str]:
        """The arms to train, in order."""
        return [arm.strip() for arm in self.arms.split(",")]

    @property
    def seed_list(self) -> list[int]:
        """The training seeds, in order."""
        return [int(seed) for seed in self.seeds.split(",")]

    @property
    def prepared(self) -> Path:
        """The prepared films to read: of this work folder, else of an attached kernel's output."""
        here, report = Path(self.work_dir) / "prepared", "prepared/report.json"
        if (here / "report.json").is_file():
            return here
        return next((found.parent for found in search_files(KAGGLE / "input", report)), here)

    @property
    def run(self) -> Path:
        """The folder of this run, which notebooks 03 and 04 write."""
        return Path(self.work_dir) / "runs" / self.name

    def identity(self) -> dict[str, Any]:
        """Return the parameters that change the result; a moved data folder is the same data."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in NOT_IDENTITY}
        return values | {"data_dir": Path(self.data_dir).name or "phantom"}


TYPES = {field.name: type(field.default) for field in dataclasses.fields(Settings)}


def read_parameters(values: Mapping[str, Any]) -> Settings:
    """Pick the parameters out of a mapping, such as a notebook's globals(), check and resolve them.

    Names that are no parameter are ignored (a notebook has many); the command line checks names.
    Raises InputError that names the parameter, what was found and what is allowed.
    """
    given = {name: convert(name, values[name]) for name in TYPES if name in values}
    filled = _fill(Settings(**given))
    _check(filled)
    return filled if filled.name else dataclasses.replace(filled, name=_short_hash(filled))


def convert(name: str, value: Any) -> Any:
    """Convert a value, maybe text from the command line, to its parameter's type, or InputError."""
    if name not in TYPES:
        raise InputError(f"unknown parameter {name!r}; known: {', '.join(TYPES)}")
    kind = TYPES[name]
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise InputError(f"{name}={value!r}: expected true or false")
        return str(value).lower() == "true"
    if (kind is int and isinstance(value, float)) or isinstance(value, bool):
        raise InputError(f"{name}={value!r}: expected {kind.__name__}")
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}={value!r}: expected {kind.__name__}") from error


def _fill(given: Settings) -> Settings:
    """Replace what is empty by the profile's value, and paths by absolute ones."""
    if given.profile not in CHOICES["profile"]:
        raise InputError(f"profile={given.profile!r}: allowed are {', '.join(CHOICES['profile'])}")
    profile = find_profile() if given.profile == "auto" else given.profile
    empty = {k: v for k, v in PROFILES[profile].items() if not getattr(given, k)}
    data = find_data(given.data_dir)
    weights = given.weights or PROFILES[profile]["weights"]
    places = {
        "work_dir": str(Path(given.work_dir).resolve() if given.work_dir else find_root() / "work"),
        "data_dir": str(data.resolve()) if data else "",
    }
    tracked = given.tracked or ("all" if weights == "none" else "layer4,fc")
    rate = given.server_lr or (0.01 if given.strategy == "fedadam" else 1.0)
    changes = {"profile": profile, "tracked": tracked, "server_lr": rate}
    return dataclasses.replace(given, **empty, **places, **changes)


def _check(settings: Settings) -> None:
    """Raise InputError on a value that is not allowed."""
    for name, allowed in CHOICES.items():
        if getattr(settings, name) not in allowed:
            raise InputError(
                f"{name}={getattr(settings, name)!r}: allowed are {', '.join(allowed)}"
            )
    for name, (low, high) in RANGES.items():
        if not low <= getattr(settings, name) <= high:
            raise InputError(f"{name}={getattr(settings, name)!r}: allowed is {low} to {high}")
    for name, allowed in (("arms", ARMS), ("tracked", LAYERS)):
        if not {part.strip() for part in getattr(settings, name).split(",")} <= set(allowed):
            raise InputError(
                f"{name}={getattr(settings, name)!r}: allowed are {', '.join(allowed)}"
            )
    if not all(seed.strip().isdigit() for seed in settings.seeds.split(",")):
        raise InputError(f"seeds={settings.seeds!r}: expected numbers such as 0,1,2")
    plain_sgd = settings.optimizer == "sgd" and settings.momentum == settings.weight_decay == 0
    if settings.strategy == "scaffold" and not plain_sgd:
        raise InputError("strategy=scaffold wants optimizer=sgd momentum=0 weight_decay=0")
    _check_cache(settings)
    for name in ("name", "compare"):
        names = getattr(settings, name).split(",") if name == "compare" else [settings.name]
        if not all(re.fullmatch(r"(\w[\w.-]*)?", part.strip()) for part in names):
            raise InputError(f"{name}={getattr(settings, name)!r}: expected letters, digits, . _ -")
    find_devices(settings.device)
    if settings.weights != "none":
        find_weights(settings.weights)


def _check_cache(settings: Settings) -> None:
    """Raise InputError where features of the trunk cannot stand for the films."""
    if not settings.cache_features:
        return
    if settings.augment:
        raise InputError(
            "cache_features=true wants augment=false: features are computed once, of films as they"
            " are stored"
        )
    if not {part.strip() for part in settings.tracked.split(",")} <= FEATURE_LAYERS:
        raise InputError(
            f"cache_features=true wants tracked=layer4,fc, not {settings.tracked!r}: only a trunk"
            " that stays frozen can be computed once"
        )


def read_run(
    work_dir: str = "", name: str = "", device: str = "auto", cache_features: bool = False
) -> Settings:
    """Return the settings of a run that notebook 03 began; without a name that of the latest.

    Raises InputError where there is none, here or attached.
    """
    work = Path(work_dir).resolve() if work_dir else find_root() / "work"
    fetch_runs(work)
    found = sorted(work.glob(f"runs/{name or '*'}/config.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        attached = f" and none in {KAGGLE / 'input'}" if KAGGLE.is_dir() else ""
        raise InputError(
            f"no run in {work / 'runs' / name}{attached}: run notebook 03_federated_train first"
        )
    config = json.loads(found[-1].read_text())
    given = {key: config[key] for key in TYPES if key in config}
    here = {"work_dir": str(work), "name": found[-1].parent.name, "device": device}
    settings = dataclasses.replace(Settings(**given), **here)
    # A run may have been trained without a cache: then there is none to be used.
    return dataclasses.replace(settings, cache_features=cache_features and not settings.augment)


def fetch_runs(work_dir: str | Path) -> None:
    """Copy the runs that are attached on Kaggle to the work folder, where it does not have them.

    The output of another kernel, or of an earlier version of the same one, can only be read.
    Copied, notebook 03 goes on with a run or shares its models, and notebook 04 writes beside it.
    """
    found = search_files(KAGGLE / "input", "runs/*/config.json")
    latest_last = sorted(found, key=lambda path: path.stat().st_mtime)
    for name, config in {path.parent.name: path for path in latest_last}.items():
        if not Path(work_dir, "runs", name, "config.json").is_file():
            _copy_run(config.parent, Path(work_dir))


def _copy_run(source: Path, work: Path) -> None:
    """Copy a run folder, but for its lock, under `work`; a kill leaves no half of it there."""
    half, whole = work / f"fetching-{source.name}", work / "runs" / source.name
    shutil.rmtree(half, ignore_errors=True)
    for file in (path for path in source.rglob("*") if path.is_file() and path.name != "run.lock"):
        target = half / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)  # without its mode: what is attached may not be written to
        os.utime(target, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    shutil.rmtree(whole, ignore_errors=True)  # without config.json nothing was trained there
    whole.parent.mkdir(exist_ok=True)
    half.rename(whole)


def _short_hash(settings: Settings) -> str:
    """Return eight hex digits that stand for the identity of a run."""
    text = json.dumps(settings.identity(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def find_profile() -> str:
    """Return 'kaggle' where there is a usable GPU and ImageNet weights, else 'demo'.

    Warns where somebody who has a GPU, or who is on Kaggle, gets the demo.
    """
    problem = "there is no GPU" if (KAGGLE / "working").is_dir() else ""
    if find_devices("auto")[0].type != "cpu":
        try:
            if find_weights("imagenet") or load_weights("imagenet"):
                return "kaggle"
        except InputError as error:
            problem = f"there is a GPU, but {error}"
    if problem:
        warnings.warn(
            f"profile=auto is the demo here (64 pixels, no ImageNet weights): {problem}. Attach a"
            " data set with resnet34-b627a593.pth and set profile=kaggle in every notebook for 224"
            " pixels; profile=demo says that the demo is meant",
            stacklevel=2,
        )
    return "demo"


def find_root() -> Path:
    """Return the project's folder, from wherever a notebook runs; on Kaggle the output folder."""
    if (KAGGLE / "working").is_dir():
        return KAGGLE / "working"
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / ROOT_MARKER).is_file()), here)


def environment() -> dict[str, Any]:
    """Return what a run depends on beside its parameters: versions, threads, device, processor."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fedutils": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": ", ".join(gpus) or "CPU",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }


def print_environment() -> None:
    """Print versions and device in one line, and which copy of fedutils this is."""
    about = environment()
    about["fedutils"] += f" ({find_copy()})"
    print(" · ".join(f"{name} {value}" for name, value in about.items()))


def find_copy() -> str:
    """Say where this fedutils lies: beside the notebooks, attached on Kaggle, or installed."""
    here = Path(__file__).resolve().parent
    if here.is_relative_to((KAGGLE / "input").resolve()):
        return f"attached, {here}"
    beside = (here.parent / ROOT_MARKER).is_file()
    beside |= here.parent in (Path.cwd(), *Path.cwd().parents)
    return "beside the notebooks" if beside else "installed"
