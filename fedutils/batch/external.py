"""A finished run's models on films that they never saw: `fedutils test`."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import pandas as pd

from .. import plots
from ..base.errors import InputError, each
from ..base.files import run_lock, write_atomic
from ..base.findings import findings_of, spelled_twice
from ..dataset import ChestXrayDataset, read_index, read_report
from ..evidence import external, predict, tables, words
from ..evidence.calibration import calibrate
from ..evidence.controls import control_scores
from ..evidence.cuts import operating_points
from ..evidence.metrics import evaluate_models
from ..films.decode import decode_films, write_index
from ..films.find import check_films
from ..films.read import DataSet, read_folder
from ..run import read_films
from ..settings import Settings


def external_test(settings: Settings, folders: Sequence[Path]) -> Iterator[str]:
    """Test all models of an evaluated run on folders of films, and tell of each what that shows.

    Their films are decoded at the run's size. Writes `external/FOLDER/` below the run: predictions,
    metrics, calibration, operating points, controls, figures, `external.csv` and `summary.json`.
    Raises InputError without models, an evaluation, or the run's prepared films, and, before any
    test, where folders cannot be read or share no finding: of all of them.
    """
    clients = predict.check_models(settings)
    predict.check_fingerprint(settings, read_report(settings.prepared))
    own = read_films(settings)
    for data in each(lambda folder: _read(settings, folder, own.findings), folders):
        with run_lock(settings.run):
            place = _place(settings.run, data.folder.resolve())
            films, summary = _prepare(settings, data, place, own.findings)
            predicted = predict.predict_films(settings, films, "test", clients, own=own.index)
            predictions = predict.write_predictions(predicted, place / "predictions.csv.gz")
            _evaluate(settings, films, predictions, own, place)
            inside = predict.read_predictions(settings.run / "evaluation" / "predictions.csv.gz")
            sides = [(inside, own.index), (predictions, films.index)]
            beside = external.lay_beside(sides, settings.seed)
            beside.to_csv(place / "external.csv", index=False)
            train = own.where(own.index["split"] == "train")
            summary["near_equal"] = external.films_in_both(train, films)
            judged = set(beside["finding"])
            summary["judged"] = [name for name in summary["shared"] if name in judged]
            means = list(beside[beside["finding"] == tables.MEAN].itertuples())
            summary["sentence"] = words.say("external", means=means, **summary)
            summary["path"] = str(data.folder.resolve())
            write_atomic(place / "summary.json", json.dumps(summary, indent=1).encode())
        yield summary["sentence"]


def _place(run: Path, folder: Path) -> Path:
    """Return where a folder's test is kept: below its name, or NAME~2 if that is of another one."""

    def free(place: Path) -> bool:
        """Tell where no test lies, or one of this folder, or one that does not say of which."""
        done, here = place / "summary.json", str(folder)
        return not done.is_file() or json.loads(done.read_text()).get("path", here) == here

    names = chain([folder.name], (f"{folder.name}~{number}" for number in count(2)))
    return next(filter(free, (run / "external" / name for name in names)))


def _read(settings: Settings, folder: Path, findings: list[str]) -> DataSet:
    """Read a folder's tables; raise InputError where nothing of it can be tested."""
    data = read_folder(folder, Path(settings.work_dir))
    theirs = findings_of(data.table)
    if pair := spelled_twice([*findings, *theirs]):
        told = f"{pair[1]!r} is the {pair[0]!r} of run {settings.name}"
        raise InputError(f"{folder}: {told}; {data.mapping.to_rename(pair[1], pair[0])}")
    if data.table.reindex(columns=findings).isna().all(axis=None):
        told = f"its data know {', '.join(theirs)}, and run {settings.name} {', '.join(findings)}"
        told += ": no finding is shared; where one is the same under another name, "
        raise InputError(f"{folder}: {told}{data.mapping.to_rename(theirs[0], findings[0])}")
    check_films(data.table, data.folder, None)
    return data


def _prepare(
    settings: Settings, data: DataSet, place: Path, findings: list[str]
) -> tuple[ChestXrayDataset, dict[str, Any]]:
    """Decode a folder's films, all for the test; return them, and what they are.

    Their labels are the model's findings in its order, NaN where the folder's data do not know one.
    """
    theirs, known = findings_of(data.table), data.table.reindex(columns=findings).notna().any()
    there = data.table[data.table["path"] != ""].reset_index(drop=True)
    table = there.drop(columns=theirs).join(there.reindex(columns=findings)).assign(split="test")
    films = decode_films(table, data.folder, place, settings.image_size)
    about = data.about() | {"image_size": settings.image_size}
    report = write_index(table, films, data.boxes, place, about)
    summary = {name: report[name] for name in ("source", "labels_by", "films", "patients")}
    summary |= {"folder": place.name, "shared": [*known.index[known]]}
    summary["unknown"] = [*known.index[~known]]
    return ChestXrayDataset(place, read_index(place).assign(client="")), summary


def _evaluate(
    settings: Settings, films: ChestXrayDataset, predictions: pd.DataFrame, own: ChestXrayDataset,
    place: Path,
) -> None:  # fmt: skip
    """Write the tables and figures of notebook 04 that these films allow.

    What is fitted or chosen, controls and cuts, is so on the run's `own` films.
    """
    result = evaluate_models(predictions, films, settings.seed)
    metrics, inside = result.metrics, own.index.groupby("split")
    metrics.to_csv(place / "metrics.csv", index=False)
    both = pd.concat([inside.get_group("train"), films.index])
    controls = control_scores(predictions, both, result.mean_over, settings.seed)
    controls.to_csv(place / "controls.csv")
    seen = predict.read_predictions(settings.run / "evaluation" / "validation.csv.gz")
    seen, val = (
        side.assign(image_index="own/" + side["image_index"])  # an id stands for two films
        for side in (seen, inside.get_group("val"))
    )
    points = operating_points(seen, predictions, pd.concat([val, films.index]))
    points.to_csv(place / "operating_points.csv", index=False)
    calibration = calibrate(predictions, films.index, settings.seed)
    calibration.to_csv(place / "calibration.csv", index=False)
    main, truth = tables.main_model(predictions), films.index[films.findings]
    scores, title = predictions.merge(main)[films.findings], f"external test, {place.name}"
    rows = calibration.merge(main)
    figures = {
        "auroc": plots.auroc_forest(metrics, title=title, controls=controls),
        "subgroups": plots.subgroup_forest(metrics, title),
        "roc": plots.roc_curves(truth, scores, title),
        "precision_recall": plots.pr_curves(truth, scores, title),
        "calibration": plots.reliability_diagram(truth.to_numpy(), scores.to_numpy(), rows, title),
    }
    for name, figure in figures.items():
        plots.save(figure, place / f"{name}.png")
