"""Predictions of a run's models, written to a file and read back."""

from pathlib import Path

import numpy as np
import pandas as pd

from ..base.device import find_devices
from ..base.errors import InputError
from ..base.files import read_written
from ..base.findings import FINDINGS
from ..base.parameters import Parameters
from ..dataset import ChestXrayDataset
from ..model import build_resnet34
from ..rounds import predict_with
from ..run import TRUNK, list_models, read_model, read_own_batchnorm
from .tables import OWNER, name_model


def predict_films(settings: Parameters, films: ChestXrayDataset, split: str) -> pd.DataFrame:
    """Predict the films of a split with every model of a run, at its best validation round.

    `films.index` carries `client` and `split`. Returns `arm, seed, client, image_index` and 14
    probabilities; `client` names the model's owner in the arm `local` and is empty elsewhere.
    """
    clients = films.index["client"].unique()
    films = films.where(films.index["split"] == split)
    net = build_resnet34("none", settings.tracked, "average", precision=settings.precision)
    net.place(find_devices(settings.device)[0]).load(read_model(settings.run, TRUNK))
    tables = []
    for model in list_models(settings, clients):
        own = read_own_batchnorm(settings.run, model, clients)
        net.batchnorm = "local" if own else "average"  # whether each client's films have their own
        state = read_model(settings.run, model.name)
        logits = predict_with(net, films, state, own).astype(np.float64)
        table = pd.DataFrame(1 / (1 + np.exp(-logits)), columns=FINDINGS)
        table.insert(0, "image_index", films.index["image_index"])
        tables.append(name_model(table, model))
    return pd.concat(tables, ignore_index=True)


def write_predictions(predictions: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Write `predictions.csv.gz` and return it as read back: metrics are computed from the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gzip = {"method": "gzip", "mtime": 0}  # no time of day in the file: equal runs, equal bytes
    predictions.to_csv(path, index=False, float_format="%.9g", compression=gzip)
    return read_predictions(path)


def read_predictions(path: Path) -> pd.DataFrame:
    """Read `predictions.csv.gz`; raise InputError where a model has a film twice."""
    table = read_written(path, "arm", "client", "image_index")
    if table.duplicated([*OWNER, "image_index"]).any():
        raise InputError(f"{path} holds a film twice for one model: run notebook 04 again")
    return table
