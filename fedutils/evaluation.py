"""What notebook 04 writes: predictions, metrics, and the summary that says how to repeat them."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file

from .device import find_devices
from .features import FeatureStore
from .federation import plan, predict_with
from .findings import FINDINGS, InputError
from .images import ChestXrayDataset, read_index, read_report, write_atomic
from .metrics import evaluate, undefined
from .model import build_resnet34
from .settings import Settings, environment, read_run
from .weights import state_hash

OWNER = ["arm", "seed", "client"]  # names a model; `client` is its owner in the arm `local`


def predict_films(settings: Settings, films: ChestXrayDataset, split: str) -> pd.DataFrame:
    """Predict the films of a split with every model of a run, at its best validation round.

    `films.index` carries `client` and `split`. Returns `arm, seed, client, image_index` and 14
    probabilities; `client` names the model's owner in the arm `local` and is empty elsewhere.
    With `cache_features` the trunk's output is taken from its store, if that is whole.
    """
    models = settings.run / "models"
    how = "none", settings.tracked, settings.batchnorm
    model = build_resnet34(*how, precision=settings.precision)
    model.to(find_devices(settings.device)[0]).load(load_file(models / "trunk.safetensors"))
    if settings.cache_features:
        fingerprint = read_report(settings.prepared)["fingerprint"]
        features = FeatureStore(model, films, settings, fingerprint).open()
        films = films if features is None else films.holding(features)
    jobs, films = plan(settings, films), films.where(films.index["split"] == split)
    tables = []
    for job in jobs:
        own = {c.name: models / f"{job.name}-{c.name}.safetensors" for c in job.clients}
        clients = {name: load_file(file) for name, file in own.items() if file.is_file()}
        state = load_file(models / f"{job.name}.safetensors")
        model.batchnorm = job.settings.batchnorm
        logits = predict_with(model, films, state, clients).astype(np.float64)
        table = pd.DataFrame(1 / (1 + np.exp(-logits)), columns=FINDINGS)
        for name in ("image_index", "client", "seed", "arm"):
            value = {"arm": job.arm, "seed": job.seed, "client": job.owner}
            table.insert(0, name, value.get(name, films.index["image_index"]))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def evaluate_models(predictions: pd.DataFrame, films: ChestXrayDataset, seed: int) -> pd.DataFrame:
    """Return the rows of `metrics.csv`: AUROC and average precision of each model, with intervals.

    `predictions` is what `predict_films` returned, or the file as read back. See
    `metrics.evaluate`; the resamples of patients are the same for all models.
    """
    index = films.index.set_index("image_index")
    tables = []
    for owner, rows in predictions.fillna({"client": ""}).groupby(OWNER, sort=False):
        truth = index.loc[rows["image_index"]]
        scores = rows[list(FINDINGS)].to_numpy()
        table = evaluate(truth[list(FINDINGS)].to_numpy(), scores, truth["patient_id"], seed)
        for name, value in zip(["test_set", *OWNER[::-1]], ["all", *owner[::-1]], strict=True):
            table.insert(0, name, value)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def tabulate(metrics: pd.DataFrame) -> pd.DataFrame:
    """Lay one model's rows out for reading: a row a finding, a column a metric, with intervals."""
    text = [
        with_interval(row) if row.value == row.value else undefined(row.positives, row.n)
        for row in metrics.itertuples()
    ]
    wide = metrics.assign(text=text).pivot(index="finding", columns="metric", values="text")
    return wide.loc[[*FINDINGS, "mean"]].rename_axis(index=None, columns=None)


def with_interval(row: Any, name: str = "") -> str:
    """Write a value of the metrics with its interval, or say that there is none."""
    if np.isnan(row.ci_low):
        return f"{row.value:.3f} (no interval: too few films)"
    return f"{row.value:.3f} ({name}{row.ci_low:.3f} to {row.ci_high:.3f})"


def write_predictions(predictions: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Write `predictions.csv.gz` and return it as read back: metrics are computed from the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gzip = {"method": "gzip", "mtime": 0}  # no time of day in the file: equal runs, equal bytes
    predictions.to_csv(path, index=False, float_format="%.9g", compression=gzip)
    return read_predictions(path)


def read_predictions(path: Path) -> pd.DataFrame:
    """Read `predictions.csv.gz`."""
    return pd.read_csv(path, dtype={"client": str}, keep_default_na=False)


def headline(metrics: pd.DataFrame, source: str) -> list[str]:
    """Say the mean AUROC of each model in plain sentences."""
    rows = metrics[(metrics["finding"] == "mean") & (metrics["metric"] == "auroc")]
    return [
        f"{source}: {' '.join(filter(None, [row.arm, row.client]))} (seed {row.seed}) reaches a"
        f" mean AUROC of {with_interval(row, '95 % interval ')}"
        f" over {row.positives} findings on {row.n:,} test films."
        for row in rows.itertuples()
    ]


def write_summary(settings: Settings, metrics: pd.DataFrame, source: str) -> dict[str, Any]:
    """Write `metrics.csv` and `summary.json`: the headline, and what repeating it takes."""
    folder = settings.run / "evaluation"
    write_atomic(folder / "metrics.csv", metrics.to_csv(index=False).encode())
    files = [settings.run / "global_model.safetensors", folder / "predictions.csv.gz"]
    files += sorted((settings.run / "models").glob("*.safetensors"))
    rows = metrics[metrics["finding"] == "mean"].fillna("").to_dict("records")
    summary = {
        "headline": headline(metrics, source),
        "means": rows,
        "models": sorted(
            {"-".join(filter(None, [r["arm"], f"s{r['seed']}", r["client"]])) for r in rows}
        ),
        "settings": json.loads((settings.run / "config.json").read_text()),
        "fingerprint": read_report(settings.prepared)["fingerprint"],
        "environment": environment(),
        "git_revision": git_revision(),
        "sha256": {str(f.relative_to(settings.run)): _sha256(f) for f in files if f.is_file()},
    }
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def record_files(settings: Settings, *names: str) -> None:
    """Add files of the run folder to the hashes in `summary.json`, for `verify_run` to check.

    For what is written after the summary; a name that is not there is left out.
    """
    path = settings.run / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    files = {name: settings.run / name for name in names}
    summary["sha256"] |= {name: _sha256(file) for name, file in files.items() if file.is_file()}
    write_atomic(path, json.dumps(summary, indent=1).encode())


def verify_run(run: Path) -> list[str]:
    """Check a run folder against its own summary; return what is wrong, a line each.

    Hashes of models and predictions, the hash of each best model in the history, the fingerprint of
    the prepared data, and the metrics, computed again from `predictions.csv.gz`. Raises InputError
    if there is no summary.
    """
    path = run / "evaluation" / "summary.json"
    if not path.is_file():
        raise InputError(f"{path} is not there: run notebook 04_evaluate first")
    summary, settings = json.loads(path.read_text()), read_run(str(run.parent.parent), run.name)
    files = {name: run / name for name in summary["sha256"]}
    wrong = [f"{name} is missing" for name, file in files.items() if not file.is_file()]
    there = {name: file for name, file in files.items() if file.is_file()}
    wrong += [f"{k} has changed" for k, f in there.items() if _sha256(f) != summary["sha256"][k]]
    history = set(pd.read_csv(run / "history.csv")["state_sha256"].dropna())
    # Local BatchNorm is in the file of a model, but not in what travelled and was hashed.
    for name in sorted(there) if settings.batchnorm != "local" else ():
        model = name.startswith("models/") and name != "models/trunk.safetensors"
        if model and state_hash(load_file(there[name])) not in history:
            wrong.append(f"{name} is the state of no round in history.csv")
    if summary["fingerprint"] != read_report(settings.prepared)["fingerprint"]:
        return [*wrong, f"{settings.prepared} holds other data: metrics cannot be recomputed"]
    return wrong + _recompute(run, settings)


def _recompute(run: Path, settings: Settings) -> list[str]:
    """Compute the metrics again from the predictions as written; name the rows that differ."""
    keys = [*OWNER, "test_set", "finding", "metric"]
    stored = pd.read_csv(run / "evaluation" / "metrics.csv").fillna({"client": ""})
    predictions = read_predictions(run / "evaluation" / "predictions.csv.gz")
    again = evaluate_models(predictions, read_films(settings), settings.seed)
    both = stored.merge(again, on=keys, how="outer", suffixes=("", "_again"))
    same = np.isclose(both["value"], both["value_again"], atol=1e-12, equal_nan=True)
    rows = both[~same][["arm", "finding", "metric", "value", "value_again"]].to_numpy().tolist()
    return [f"metrics.csv says {row[3]} for {row[:3]}, computed again {row[4]}" for row in rows]


def git_revision() -> str:
    """Return the revision of the code, with a plus where files differ; empty outside git."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=40"]
    try:
        here = Path(__file__).parent
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""  # an installed package or a Kaggle data set has no history
    return done.stdout.strip()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_fingerprint(settings: Settings, report: dict[str, Any]) -> None:
    """Raise InputError where the prepared data are not those that the run was trained on."""
    trained = json.loads((settings.run / "config.json").read_text())["fingerprint"]
    if report["fingerprint"] != trained:
        raise InputError(
            f"run {settings.name} was trained on data {trained[:16]}, but {settings.prepared} holds"
            f" {report['fingerprint'][:16]}: run notebook 02 again with that run's parameters"
        )


def read_films(settings: Settings) -> ChestXrayDataset:
    """Open the prepared films with each patient's client, as `clients.csv` of the run has it."""
    clients = pd.read_csv(settings.run / "clients.csv", dtype=str).set_index("patient_id")["client"]
    index = read_index(settings.prepared)
    return ChestXrayDataset(
        settings.prepared, index.assign(client=index["patient_id"].map(clients))
    )
