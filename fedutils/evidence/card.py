"""The model card that leaves with a run: MODEL_CARD.md, written from the run's own files."""

import json
from typing import Any

import numpy as np
import pandas as pd

from ..base.files import write_atomic
from ..base.findings import FINDINGS, SPLITS
from ..base.parameters import Parameters
from ..base.text import bullets, plain
from ..dataset import read_report
from ..run import best_rounds, read_films, read_history
from . import tables, words

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
    release, folder = report["release"], settings.run / "evaluation"
    metrics, calibration, pointing = (
        tables.read_table(folder / f"{name}.csv") for name in ("metrics", "calibration", "pointing")
    )
    lines = [f"# Model card: run {settings.name}", ""]
    lines += [PHANTOM, ""] if release == "phantom" else []
    lines += _model(settings) + _data(settings, report) + _figures(metrics, calibration)
    lines += [plain(words.pointing_words(pointing, settings.image_size)), ""]
    lines += _limits(settings, release) + _use(release)
    text = "\n".join(lines) + "\n"
    write_atomic(settings.run / "MODEL_CARD.md", text.encode())
    return text


def _model(settings: Parameters) -> list[str]:
    """Say what the model is, how it was trained, and in which file it leaves."""
    config = json.loads((settings.run / "config.json").read_text())
    history = read_history(settings.run)  # the number of rounds is no part of config.json
    best = best_rounds(history).set_index("arm")["round"]
    file = "none: this run has no federated arm, so no global model leaves"
    if "federated" in best:
        file = (
            f"`global_model.safetensors`, of round {best.loc[['federated']].iloc[0]}; loads with"
            " `torchvision.models.resnet34(num_classes=14)` and `load_state_dict`"
        )
    starts = dict.fromkeys(
        f"fedutils {start['fedutils']} ({start['git_revision'][:12] or 'revision unknown'}), torch"
        f" {start['torch']}, on {start['device']} ({start['machine']})"
        for start in config["starts"]
    )  # fmt: skip
    adopted = tables.adopted_models(settings.run).items()
    return [
        "## Model", "",
        f"- ResNet-34, 14 outputs (one a finding); input one grey film of {settings.image_size}"
        f" x {settings.image_size} pixels, normalised as for ImageNet",
        f"- Arms of this run: {settings.arms}; training seeds {settings.seeds};"
        f" {history['round'].max()} rounds, local epochs in each: {settings.local_epochs}",
        f"- Strategy {settings.strategy}, aggregation {settings.aggregation}, optimiser"
        f" {settings.optimizer} (lr {settings.lr:g}); trained and sent: {settings.tracked};"
        f" BatchNorm {settings.batchnorm}; start: {plain(settings.weights)}",
        f"- File: {file}",
        f"- Chosen by validation AUROC; threads {config['threads']}",
        *[f"- Trained by {start}" for start in starts],
        *[f"- {plain(f'{name} was adopted from run {run}, which trained the same')}"
          for name, run in adopted],
        "",
    ]  # fmt: skip


def _data(settings: Parameters, report: dict[str, Any]) -> list[str]:
    """Say which films it was trained, chosen and tested on, and how patients were placed."""
    parts = {name: report["splits"][name] for name in SPLITS if name in report["splits"]}
    splits = [f"{k} {v['films']:,} films of {v['patients']:,} patients" for k, v in parts.items()]
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
    whole = tables.rows_of(metrics, metric="auroc", test_set=tables.ALL_FILMS)
    means = tables.mean_auroc_rows(whole)
    over_seeds = tables.over_seeds(means)
    lines = [
        "## Figures on test films", "", "In brackets, 95 % intervals over patients.", "",
        "| arm | client | seed | mean AUROC | findings in it |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in (over_seeds if len(over_seeds) else means).itertuples():
        names = f"| {row.arm} | {plain(row.client) or '–'} | {row.seed or 'mean over seeds'} "
        lines.append(f"{names}| {_interval(row)} | {row.positives} |")
    main = tables.main_model(calibration)
    arm, seed, client = main.iloc[0]
    owner = f", {plain(client)}" if client else ""
    calibration = tables.rows_of(calibration, hospital="")
    own, area = (table.merge(main).set_index("finding") for table in (calibration, whole))
    lines += [
        "", f"By finding, of {arm}, seed {seed}{owner}. Slope under 1: too sure;"
        " intercept above 0: the model says too little. Their intervals, and all of it by hospital:"
        " `evaluation/calibration.csv`.", "",
        "| finding | prevalence | AUROC | Brier | calibration error | slope | intercept |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for finding in FINDINGS:
        parts = own.loc[finding, ["prevalence", "brier", "ece", "slope", "intercept"]]
        share, *errors = ("–" if np.isnan(part) else f"{part:.3f}" for part in parts)
        auroc = _interval(area.loc[finding])
        lines.append(f"| {finding} | {share} | {auroc} | {' | '.join(errors)} |")
    return [*lines, "", "Operating points: `evaluation/operating_points.csv`.", ""]


def _interval(row: Any) -> str:
    """Write a value with its interval, or that it is not defined."""
    return "not defined" if np.isnan(row.value) else tables.with_interval(row, without="")


def _limits(settings: Parameters, release: str) -> list[str]:
    """Say what the figures do not show."""
    lines = [
        LABELS.get(release, LABELS["nih"]),
        "One source of data: nothing is known of other hospitals, scanners or populations.",
        "PPV and NPV hold at the prevalence that stands beside them, and at no other.",
        "Cuts were chosen on validation films; for rare findings these are few.",
        *words.privacy_words(settings),
    ]
    if settings.batchnorm == "local":
        lines += ["BatchNorm is local: the file holds the clients' average, not one client's own."]
    return ["## Limits", "", bullets(lines), ""]


def _use(release: str) -> list[str]:
    """Say what it is for, and what not."""
    other = "Lateral films, and films of other sources"
    return [
        "## Intended use", "",
        "- Research and teaching on federated learning: comparing ways of training on one data set",
        "", "## Not for", "",
        "- Diagnosis, triage, or any other decision about a patient",
        f"- {'Any use on real films' if release == 'phantom' else other}",
        "- Claims of privacy, or of fairness between groups, that the tables do not show", "",
        "Versions, revision of the code and hashes of all files: `evaluation/summary.json`.",
    ]  # fmt: skip
