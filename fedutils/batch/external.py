"""A finished run's models on films that they never saw: `fedutils test`."""

import json
from itertools import chain, count
from pathlib import Path
from typing import Any

import pandas as pd

from .. import plots
from ..base.errors import InputError
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
from ..films.read import read_folder
from ..run import read_films
from ..settings import Settings


def external_test(settings: Settings, folder: Path) -> str:
    """Test all models of an evaluated run on a folder of films, and return what that shows.

    Its films are decoded at the run's size. Writes `external/FOLDER/` below the run: predictions,
    metrics, calibration, operating points, controls, figures, `external.csv` and `summary.json`.
    Raises InputError without models, an evaluation, the run's prepared films, or a shared finding.
    """
    clients = predict.check_models(settings)
    predict.check_fingerprint(settings, read_report(settings.prepared))
    own = read_films(settings)
    with run_lock(settings.run):
        place = _place(settings.run, folder.resolve())
        films, summary = _prepare(settings, folder, place, own.findings)
        predicted = predict.predict_films(settings, films, "test", clients, own=own.index)
        predictions = predict.write_predictions(predicted, place / "predictions.csv.gz")
        _evaluate(settings, films, predictions, own, place)
        inside = predict.read_predictions(settings.run / "evaluation" / "predictions.csv.gz")
        sides = [(inside, own.index), (predictions, films.index)]
        beside = external.lay_beside(sides, settings.seed)
        beside.to_csv(place / "external.csv", index=False)
        train = own.where(own.index["split"] == "train")
        summary["near_equal"] = external.films_in_both(train, films)
        summary["judged"] = [name for name in summary["shared"] if name in set(beside["finding"])]
        means = list(beside[beside["finding"] == tables.MEAN].itertuples())
        summary["sentence"] = words.say("external", means=means, **summary)
        summary["path"] = str(folder.resolve())
        write_atomic(place / "summary.json", json.dumps(summary, indent=1).encode())
    return summary["sentence"]


def _place(run: Path, folder: Path) -> Path:
    """Return where a folder's test is kept: below its name, or NAME~2 if that is of another one."""

    def free(place: Path) -> bool:
        """Tell where no test lies, or one of this folder, or one that does not say of which."""
        done, here = place / "summary.json", str(folder)
        return not done.is_file() or json.loads(done.read_text()).get("path", here) == here

    names = chain([folder.name], (f"{folder.name}~{number}" for number in count(2)))
    return next(filter(free, (run / "external" / name for name in names)))


def _prepare(
    settings: Settings, folder: Path, place: Path, findings: list[str]
) -> tuple[ChestXrayDataset, dict[str, Any]]:
    """Decode a folder's films, all for the test; return them, and what they are.

    Their labels are the model's findings in its order, NaN where the folder's data do not know one.
    """
    data = read_folder(folder, Path(settings.work_dir))
    theirs = findings_of(data.table)
    known = [name for name in findings if name in theirs and data.table[name].notna().any()]
    if pair := spelled_twice([*findings, *theirs]):
        told = f"{pair[1]!r} is the {pair[0]!r} of run {settings.name}"
        raise InputError(f"{folder}: {told}; write it alike in films.toml")
    if not known:
        told = f"its data know {', '.join(theirs)}, and run {settings.name} {', '.join(findings)}"
        raise InputError(f"{folder}: {told}: no finding is shared; name alike what is the same")
    check_films(data.table, data.folder, None)
    there = data.table[data.table["path"] != ""].reset_index(drop=True)
    table = there.drop(columns=theirs).join(there.reindex(columns=findings)).assign(split="test")
    films = decode_films(table, data.folder, place, settings.image_size)
    about = data.about() | {"image_size": settings.image_size}
    report = write_index(table, films, data.boxes, place, about)
    summary = {name: report[name] for name in ("source", "labels_by", "films", "patients")}
    summary |= {"folder": place.name, "shared": known}
    summary["unknown"] = [name for name in findings if name not in known]
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
