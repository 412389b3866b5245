"""What a run leaves on disk, and how it is read back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from safetensors.torch import load_file, save_file

from .base.files import KAGGLE, read_written, search_files, write_atomic
from .base.parameters import Parameters, parameter
from .base.state import State
from .dataset import ChestXrayDataset, read_index

HISTORY = [
    "arm", "seed", "round", "client", "train_loss", "val_loss", "val_auroc", "examples", "bytes_up",
    "bytes_down", "seconds", "status", "reason", "epsilon", "state_sha256",
]  # fmt: skip
ADOPTED = "adopted from run "  # the reason in the history of a model that another run trained
TRUNK = "trunk"  # the frozen layers, which all models of a run share


@dataclass(frozen=True)
class RunParameters(Parameters):
    """Where the films are, and where a run's results go."""

    data_dir: str = parameter(
        "", "a data set's folder as downloaded, or one with films.toml; empty:"
        " NIH_DATA_DIR, Kaggle, else the phantom; several: A;B"
    )  # fmt: skip
    work_dir: str = parameter("", "where results go; empty: work/ of the project", identity=False)
    name: str = parameter(
        "", "of this run; empty: a short hash of the parameters", identity=False,
        pattern=r"letters, digits, . _ -: (\w[\w.-]*)?",
    )  # fmt: skip

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


class Model(NamedTuple):
    """One model of a run: its arm, its seed, and in the arm `local` the client that owns it."""

    arm: str
    seed: int
    owner: str = ""

    @property
    def name(self) -> str:
        """Its name in files, such as federated-s0 or local-s0-client-1."""
        return "-".join(filter(None, [self.arm, f"s{self.seed}", self.owner]))


def list_models(settings: Parameters, clients: Iterable[str]) -> list[Model]:
    """List the models of a run, in the order in which they are trained."""
    models = []
    for seed, arm in product(settings.seed_list, settings.arm_list):
        owners = sorted(clients) if arm == "local" else [""]
        models += [Model(arm, seed, owner) for owner in owners]
    return models


def model_file(run: Path, name: str) -> Path:
    """Return the file of a model, of the trunk, or of a client's own BatchNorm (MODEL-CLIENT)."""
    return run / "models" / f"{name}.safetensors"


def write_model(run: Path, name: str, state: State, **about: str) -> None:
    """Write a state as `model_file` names it; `about` goes into its header."""
    write_atomic(model_file(run, name), partial(save_file, state, metadata=about or None))


def read_model(run: Path, name: str) -> State:
    """Read a state that `write_model` wrote."""
    return load_file(model_file(run, name))


def read_own_batchnorm(run: Path, model: Model, clients: Sequence[str]) -> dict[str, State]:
    """Read the BatchNorm that clients kept for themselves under a federated model, by client."""
    files = {client: model_file(run, f"{model.name}-{client}") for client in clients}
    return {client: load_file(file) for client, file in files.items() if file.is_file()}


def write_global_model(run: Path, name: str) -> None:
    """Write a whole model, trunk and all, for plain torchvision."""
    whole = read_model(run, TRUNK) | read_model(run, name)
    write_atomic(run / "global_model.safetensors", partial(save_file, whole))


def read_history(run: Path) -> pd.DataFrame:
    """Read a run's `history.csv`; `client` is empty on the rows of aggregated models."""
    return read_written(run / "history.csv", "client", "status", "reason")


def read_films(settings: RunParameters) -> ChestXrayDataset:
    """Open the prepared films with each patient's client, as `clients.csv` of the run has it."""
    clients = read_written(settings.run / "clients.csv", "patient_id", "client")
    clients = clients.set_index("patient_id")["client"]
    index = read_index(settings.prepared)
    return ChestXrayDataset(
        settings.prepared, index.assign(client=index["patient_id"].map(clients))
    )
