"""Predictions of a run's models, written to a file and read back."""

import copy
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from ..base.device import find_devices
from ..base.errors import InputError, each
from ..base.files import read_written
from ..base.findings import findings_of
from ..base.parameters import Parameters
from ..base.state import State
from ..base.threads import Shared
from ..dataset import AT_ONCE, ChestXrayDataset
from ..films.decode import decode_films
from ..films.find import real_places, walk
from ..films.formats import FILM_ENDINGS, is_film
from ..model import ChestResNet, build_resnet34
from ..rounds import predict_with
from ..run import TRUNK, Model, list_models, model_file, read_model, read_own_batchnorm
from .tables import OWNER, check_once, main_model, name_model, read_summary, read_table


def check_models(settings: Parameters) -> list[str]:
    """Return the clients of a run; raise InputError without its evaluation or one of its models."""
    read_summary(settings)
    clients = read_written(settings.run / "clients.csv", "client")["client"].unique().tolist()
    for name in (TRUNK, *(model.name for model in list_models(settings, clients))):
        if not model_file(settings.run, name).is_file():
            raise InputError(f"{settings.run}: no model {name}; finish its training, notebook 03")
    return clients


def predict_films(
    settings: Parameters, films: ChestXrayDataset, split: str,
    clients: Sequence[str] = (), main_alone: bool = False, own: pd.DataFrame | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Predict the films of a split with every model of a run, at its best validation round.

    `films.index` carries `client` and `split`; where the films are of no client, `clients` names
    those of the run, and `own` is the index of its films; `main_alone` takes `main_model`. Returns
    `arm, seed, client, image_index` and a probability a finding, NaN where the model was not
    taught it; `client` names the model's owner in the arm `local`, else it is empty.
    """
    clients = clients or films.index["client"].unique()
    models = list_models(settings, clients)
    if main_alone:
        models = [Model(*main_model(pd.DataFrame(models, columns=OWNER)).iloc[0])]
    own = films.index if own is None else own
    films = films.where(films.index["split"] == split)
    devices = find_devices(settings.device)[: max(1, len(films) // AT_ONCE)]  # each has work
    net = build_resnet34(
        "none", settings.tracked, "average",
        outputs=len(films.findings), precision=settings.precision,
    )  # fmt: skip
    net.load(read_model(settings.run, TRUNK))
    nets = Shared([copy.deepcopy(net).place(device) for device in devices])
    tables = []
    for model in models:
        statistics = read_own_batchnorm(settings.run, model, clients)
        state = read_model(settings.run, model.name)
        parts = films.parts(1 if statistics else len(nets.tools))
        judge = partial(_judge, state=state, own=statistics)
        logits = np.concatenate(list(nets.each(judge, parts, settings.threads)))
        table = pd.DataFrame(1 / (1 + np.exp(-logits)), columns=films.findings)
        table[_untaught(own, films.findings, model.owner)] = np.nan
        table.insert(0, "image_index", films.index["image_index"])
        tables.append(name_model(table, model))
    return pd.concat(tables, ignore_index=True)


def predict_files(
    settings: Parameters, paths: Sequence[Path], rule: str = "", out: Path | None = None
) -> pd.DataFrame:
    """Predict films by file, or of folders, with the main model of an evaluated run: a row a film.

    Columns: `path`, `problem` (empty where it was read), and a probability a finding; with a
    `rule`, youden or sensitivity, another a finding: 1 at or above the cut that notebook 04 chose
    on validation films, else 0, NaN without a cut. Raises InputError without a model, an
    evaluation, or any film that can be read, and where the table could not be written to `out`.
    """
    if out and (out.is_dir() or not os.access(out.absolute().parent, os.W_OK)):
        raise InputError(f"{out}: cannot be written; give a file in a folder that is there")
    clients, folder = check_models(settings), settings.run / "evaluation"
    tested = read_predictions(folder / "predictions.csv.gz")
    findings = findings_of(tested)
    rows = pd.DataFrame({"path": list_films(paths)})
    rows["image_index"] = rows.index.astype(str)
    with TemporaryDirectory() as place:
        prepared = Path(place, "prepared")
        rows["problem"] = decode_films(rows, Path(), prepared, settings.image_size)["problem"]
        index = rows.reindex(columns=[*rows.columns, *findings])
        index = index.assign(row=rows.index, client="", split="test")[rows["problem"] == ""]
        films = ChestXrayDataset(prepared, index.drop(columns="problem"))
        chances = predict_films(settings, films, "test", clients, main_alone=True)
    untaught = tested.merge(main_model(tested))[findings].isna().all()
    chances[untaught.index[untaught]] = np.nan
    rows = rows.merge(chances[["image_index", *findings]], "left").drop(columns="image_index")
    if rule:
        points = read_table(folder / "operating_points.csv")
        points = points[points["rule"].str.lower().str.startswith(rule)].merge(main_model(points))
        for row in points.itertuples():
            chance = rows[row.finding].map("{:.9g}".format).astype(float)  # as cuts are written
            called = (chance >= row.threshold).astype(float)
            known = chance.notna() & pd.notna(row.threshold)
            rows[f"{row.finding} ({row.rule})"] = called.where(known)
    return rows


def list_films(paths: Sequence[Path]) -> list[str]:
    """List the films of files and folders, each once; InputError where there is none."""

    def films_of(path: Path) -> list[str]:
        """List the films of a folder, or the one that this is."""
        inside = [f"{here / name}" for here, _, files in walk(path, None) for name in sorted(files)]
        films = [str(path)] if path.is_file() else list(filter(is_film, inside))
        if not films:
            told = f"none of its {len(inside)} files is a film" if path.is_dir() else "is not there"
            kinds = f"{', '.join(FILM_ENDINGS)}, or DICOM without an ending"
            raise InputError(f"{path.absolute()}: {told}; give films ({kinds}), or their folders")
        return films

    found = [film for films in each(films_of, paths) for film in films]
    films = pd.Series(found, real_places(found, follow=False))
    return films[~films.index.duplicated()].tolist()


def _untaught(index: pd.DataFrame, findings: Sequence[str], owner: str) -> list[str]:
    """Name the findings without a training label at a model's owner, or anywhere if that is "".

    None where the index has no training film, so that it cannot tell.
    """
    train = index[(index["split"] == "train") & ((index["client"] == owner) | (owner == ""))]
    return [name for name in findings if len(train) and train[name].isna().all()]


def _judge(
    part: ChestXrayDataset, net: ChestResNet, state: State, own: dict[str, State]
) -> np.ndarray:
    """Return logits (N, findings) of some films, in float64."""
    net.batchnorm = "local" if own else "average"  # whether each client's films have their own
    return predict_with(net, part, state, own).astype(np.float64)


def check_fingerprint(settings: Parameters, report: dict[str, Any]) -> None:
    """Raise InputError where the prepared data are not those that the run was trained on.

    A run over a network has no fingerprint: its films never left the hospitals.
    """
    trained = json.loads((settings.run / "config.json").read_text())["fingerprint"]
    if trained and report["fingerprint"] != trained:
        raise InputError(
            f"run {settings.name} was trained on data {trained[:16]}, but {settings.prepared} holds"
            f" {report['fingerprint'][:16]}: run notebook 02 again with that run's parameters"
        )


def write_predictions(predictions: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Write `predictions.csv.gz` and return it as read back: metrics are computed from the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gzip = {"method": "gzip", "mtime": 0}  # no time of day in the file: equal runs, equal bytes
    predictions.to_csv(path, index=False, float_format="%.9g", compression=gzip)
    return read_predictions(path)


def read_predictions(path: Path) -> pd.DataFrame:
    """Read `predictions.csv.gz`; raise InputError where a model has a film twice."""
    return check_once(read_written(path, "arm", "client", "image_index"), path)
