"""The model card that leaves with a run: MODEL_CARD.md, written from the run's own files."""

import json
from typing import Any

import numpy as np
import pandas as pd

from ..base.files import write_atomic
from ..base.findings import FINDINGS, SPLITS
from ..base.parameters import Parameters
from ..dataset import read_report
from ..run import best_rounds, read_films, read_history
from .tables import ALL_FILMS, MEAN, main_model, read_table, rows_of, with_interval
from .words import pointing_words, privacy_words

PHANTOM = (
    "**Trained on phantom films, which are drawn: nothing here is evidence about patients, and the"
    " model knows nothing of real films.**"
)
# By the release that `read_nih` names; all others are NIH's.
SOURCES = {"phantom": "Synthetic phantom", "own": "Films and table of the user's own"}
LABELS = {
    "phantom": "Signs and labels were drawn by a program; only their plumbing resembles real data.",
    "own": "Labels are those of the table as it was given: how they came about is not known here.",
    "nih": "Labels were mined from reports by text: they are not a radiologist's truth. Chest"
    " drains give Pneumothorax away, and the view position (AP, PA) gives away who is bedridden.",
}


def write_card(settings: Parameters) -> str:
    """Write `MODEL_CARD.md` into the run folder (Mitchell et al., FAT* 2019) and return its text.

    Everything in it comes from the run's files: settings, report, history, and the tables of
    notebook 04 (metrics, calibration, pointing). Raises FileNotFoundError where one is missing.
    """
    report = read_report(settings.prepared)
    config = json.loads((settings.run / "config.json").read_text())
    release = report["release"]
    folder = settings.run / "evaluation"
    metrics, calibration = (read_table(folder / f"{n}.csv") for n in ("metrics", "calibration"))
    lines = [
        f"# Model card: run {settings.name}",
        "",
        *([PHANTOM, ""] if release == "phantom" else []),
    ]
    lines += _model(settings, config) + _data(settings, report)
    lines += _figures(metrics, calibration) + [
        pointing_words(read_table(folder / "pointing.csv"), settings.image_size),
        "",
    ]
    lines += _limits(settings, release) + _use(release)
    text = "\n".join(lines) + "\n"
    write_atomic(settings.run / "MODEL_CARD.md", text.encode())
    return text


def _model(settings: Parameters, config: dict[str, Any]) -> list[str]:
    """Say what the model is, how it was trained, and in which file it leaves."""
    history = read_history(settings.run)
    best = best_rounds(history)
    trained = history["round"].max()  # the number of rounds is no part of config.json
    rounds = best[best["arm"] == "federated"].head(1)["round"].tolist()
    leaves = f"`global_model.safetensors`, of round {rounds[0]}" if rounds else ""
    file = leaves or "none: this run has no federated arm, so no global model leaves"
    return [
        "## Model", "",
        f"- ResNet-34, 14 outputs (one a finding); input one grey film of {settings.image_size}"
        f" x {settings.image_size} pixels, normalised as for ImageNet",
        f"- Arms of this run: {settings.arms}; training seeds {settings.seeds};"
        f" {trained} rounds, local epochs in each: {settings.local_epochs}",
        f"- Strategy {settings.strategy}, aggregation {settings.aggregation}, optimiser"
        f" {settings.optimizer} (lr {settings.lr:g}); trained and sent: {settings.tracked};"
        f" BatchNorm {settings.batchnorm}; start: {settings.weights}",
        f"- File: {file}" + ("; loads with `torchvision.models.resnet34(num_classes=14)` and"
                             " `load_state_dict`" if leaves else ""),
        f"- Chosen by validation AUROC; threads {config['threads']}", "",
    ]  # fmt: skip


def _data(settings: Parameters, report: dict[str, Any]) -> list[str]:
    """Say which films it was trained, chosen and tested on, and how patients were placed."""
    splits = [
        f"{name} {report['splits'][name]['films']:,} films of"
        f" {report['splits'][name]['patients']:,} patients"
        for name in SPLITS
        if name in report["splits"]
    ]
    lists = "the lists that came with the data" if report["lists"] else "a hash of the patient"
    clients = read_films(settings).index["client"].nunique()
    source = SOURCES.get(report["release"], f"NIH ChestX-ray14, release {report['release']}")
    return [
        "## Data", "",
        f"- {source}: {report['films']:,} films of {report['patients']:,} patients",
        f"- Split by patient, after {lists}: {'; '.join(splits)}",
        f"- {clients} clients, partition {settings.partition}; a patient is at one client only",
        f"- Fingerprint of data and split: `{report['fingerprint']}`", "",
    ]  # fmt: skip


def _figures(metrics: pd.DataFrame, calibration: pd.DataFrame) -> list[str]:
    """Tabulate the mean AUROC of each model, and one model's figures by finding."""
    whole = rows_of(metrics, metric="auroc", test_set=ALL_FILMS)
    means = rows_of(whole, finding=MEAN)
    over_seeds = rows_of(means, seed="")
    lines = ["## Figures on test films", "", "95 % intervals over patients.", ""]
    lines += ["| arm | client | seed | mean AUROC | findings in it |", "|---|---|---|---|---|"]
    for row in (over_seeds if len(over_seeds) else means).itertuples():
        names = f"| {row.arm} | {row.client or '–'} | {row.seed or 'mean over seeds'} "
        lines.append(f"{names}| {_interval(row)} | {row.positives} |")
    return [*lines, "", *_by_finding(whole, calibration), ""]


def _by_finding(metrics: pd.DataFrame, calibration: pd.DataFrame) -> list[str]:
    """Tabulate the findings of the model that leaves, or else of the first one."""
    main = main_model(calibration)
    arm, seed, client = main.iloc[0]
    own, area = (table.merge(main).set_index("finding") for table in (calibration, metrics))
    lines = [
        f"By finding, of {arm}, seed {seed}{client and ', '}{client}. Calibration is that after"
        f" temperature {own['temperature'].iloc[0]:.2f}, fitted on validation films.", "",
        "| finding | prevalence | AUROC | Brier | calibration error |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for finding in FINDINGS:
        parts = own.loc[finding, ["prevalence", "brier_scaled", "ece_scaled"]]
        share, brier, error = ("–" if np.isnan(part) else f"{part:.3f}" for part in parts)
        auroc = _interval(area.loc[finding])
        lines.append(f"| {finding} | {share} | {auroc} | {brier} | {error} |")
    return [*lines, "", "Operating points: `evaluation/operating_points.csv`."]


def _interval(row: Any) -> str:
    """Write a value with its interval, or that it is not defined."""
    return "not defined" if np.isnan(row.value) else with_interval(row, without="")


def _limits(settings: Parameters, release: str) -> list[str]:
    """Say what the figures do not show."""
    lines = [
        LABELS.get(release, LABELS["nih"]),
        "One source of data: nothing is known of other hospitals, scanners or populations.",
        "PPV and NPV hold at the prevalence that stands beside them, and at no other.",
        "Temperature and cuts were fitted on validation films; for rare findings these are few.",
        *privacy_words(settings),
    ]
    if settings.batchnorm == "local":
        lines.append(
            "BatchNorm is local: the file holds the clients' average, not one client's own."
        )
    return ["## Limits", "", *(f"- {line}" for line in lines), ""]


def _use(release: str) -> list[str]:
    """Say what it is for, and what not."""
    phantom = release == "phantom"
    real = "Any use on real films" if phantom else "Lateral films, and films of other sources"
    return [
        "## Intended use", "",
        "- Research and teaching on federated learning: comparing ways of training on one data set",
        "", "## Not for", "",
        "- Diagnosis, triage, or any other decision about a patient",
        f"- {real}",
        "- Claims of privacy, or of fairness between groups, that the tables do not show", "",
        "Versions, revision of the code and hashes of all files: `evaluation/summary.json`.",
    ]  # fmt: skip
