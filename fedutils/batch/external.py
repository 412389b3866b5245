"""A finished run's models on films that they never saw: `fedutils test`."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from .. import plots
from ..base.errors import InputError
from ..base.files import run_lock, write_atomic
from ..base.findings import findings_of
from ..dataset import ChestXrayDataset, read_index, read_report
from ..evidence import tables
from ..evidence.calibration import calibrate
from ..evidence.external import films_in_both, lay_beside
from ..evidence.metrics import evaluate_models
from ..evidence.predict import (
    check_fingerprint,
    check_models,
    predict_films,
    read_predictions,
    write_predictions,
)
from ..evidence.words import say
from ..films.decode import decode_films, write_index
from ..films.find import check_films
from ..films.sources import open_data
from ..run import read_films
from ..settings import Settings


def external_test(settings: Settings, folder: Path) -> str:
    """Test all models of an evaluated run on a folder of films, and return what that shows.

    Whatever `read_folder` reads will do; its films are decoded at the run's size. Writes
    `external/FOLDER/` below the run: `predictions.csv.gz`, `metrics.csv`, `calibration.csv`,
    figures, `external.csv`, which lays the AUROC beside the internal one, and `summary.json`.
    Raises InputError without models, an evaluation, the run's prepared films, or a shared finding.
    """
    clients = check_models(settings)
    tables.read_summary(settings)  # else notebook 04 has not run
    check_fingerprint(settings, read_report(settings.prepared))
    own = read_films(settings)
    place = settings.run / "external" / folder.resolve().name
    with run_lock(settings.run):
        films, report, known = _prepare(settings, folder, place, own.findings)
        predicted = predict_films(settings, films, "test", clients)
        predictions = write_predictions(predicted, place / "predictions.csv.gz")
        _evaluate(settings, films, predictions, place, report["release"])
        inside = read_predictions(settings.run / "evaluation" / "predictions.csv.gz")
        beside = lay_beside((inside, own.index), (predictions, films.index), settings.seed)
        write_atomic(place / "external.csv", beside.to_csv(index=False).encode())
        summary: dict[str, Any] = {
            "folder": place.name, "source": report["source"], "labels_by": report["labels_by"],
            "films": report["films"], "patients": report["patients"], "shared": known,
            "unknown": [name for name in own.findings if name not in known],
            "near_equal": films_in_both(own.where(own.index["split"] == "train"), films),
        }  # fmt: skip
        means = list(beside[beside["finding"] == tables.MEAN].itertuples())
        summary["sentence"] = say("external", **summary, means=means, count=_count(beside))
        write_atomic(place / "summary.json", json.dumps(summary, indent=1).encode())
    return summary["sentence"]


def _count(beside: pd.DataFrame) -> int:
    """Count the findings of a table that were judged."""
    return len({*beside["finding"]} - {tables.MEAN})


def _prepare(
    settings: Settings, folder: Path, place: Path, findings: list[str]
) -> tuple[ChestXrayDataset, dict[str, Any], list[str]]:
    """Decode a folder's films, all for the test; return them, the report, and shared findings.

    Their labels are the model's findings in its order, NaN where the folder's data do not know one.
    """
    data = open_data(str(folder), settings.work_dir)
    theirs = findings_of(data.table)
    known = [name for name in findings if name in theirs and data.table[name].notna().any()]
    if not known:
        told = f"its data know {', '.join(theirs)}, and run {settings.name} {', '.join(findings)}"
        raise InputError(f"{folder}: {told}: no finding is shared; name alike what is the same")
    check_films(data.table, data.folder, None)
    there = data.table[data.table["path"] != ""].reset_index(drop=True)
    table = there.drop(columns=theirs).join(there.reindex(columns=findings)).assign(split="test")
    films = decode_films(table, data.folder, place, settings.image_size)
    about = data.about() | {"image_size": settings.image_size}
    report = write_index(table, films, data.boxes, place, about)
    return ChestXrayDataset(place, read_index(place).assign(client="")), report, known


def _evaluate(
    settings: Settings, films: ChestXrayDataset, predictions: pd.DataFrame, place: Path, title: str
) -> None:
    """Write the tables and figures of notebook 04 that need these films alone."""
    metrics = evaluate_models(predictions, films, settings.seed).metrics
    calibration = calibrate(predictions, films.index, settings.seed)
    for name, table in {"metrics": metrics, "calibration": calibration}.items():
        write_atomic(place / f"{name}.csv", table.to_csv(index=False).encode())
    main, truth = tables.main_model(predictions), films.index[films.findings]
    scores = predictions.merge(main)[films.findings]
    own, title = calibration.merge(main), f"external test, {title}"
    figures = {
        "auroc": plots.auroc_forest(metrics, title=title),
        "roc": plots.roc_curves(truth, scores, title),
        "precision_recall": plots.pr_curves(truth, scores, title),
        "calibration": plots.reliability_diagram(truth.to_numpy(), scores.to_numpy(), own, title),
    }
    for name, figure in figures.items():
        plots.save(figure, place / f"{name}.png")
