"""summary.json: what a run found and how to repeat it; and the check of it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file

from ..base.files import sha256, write_atomic
from ..base.parameters import Parameters
from ..base.provenance import this_machine
from ..base.state import state_hash
from ..run import read_films, read_history
from . import tables
from .metrics import evaluate_models
from .predict import read_predictions
from .words import headline


def write_summary(settings: Parameters, result: tables.Evaluation, source: str) -> dict[str, Any]:
    """Write `metrics.csv`, `differences.csv` and `summary.json`, which says how to repeat them."""
    folder = settings.run / "evaluation"
    for name, table in result._asdict().items():
        if isinstance(table, pd.DataFrame):
            write_atomic(folder / f"{name}.csv", table.to_csv(index=False).encode())
    files = [settings.run / "global_model.safetensors", folder / "predictions.csv.gz"]
    files += sorted((settings.run / "models").glob("*.safetensors"))
    means = tables.rows_of(tables.over_seeds(result.metrics), finding=tables.MEAN)
    config = json.loads((settings.run / "config.json").read_text())
    starts, report = config.pop("starts"), tables.read_data(settings)
    summary = {
        "headline": headline(result, source, report["labels_by"]),
        "mean_over": result.mean_over,
        "means": means.astype(object).where(means.notna(), None).to_dict("records"),
        "settings": config,
        "trained": starts,
        "adopted": tables.adopted_models(settings.run),
        "privacy": tables.read_budget(settings.run).to_dict("records"),
        "fingerprint": report["fingerprint"],
        "evaluated": this_machine(),
        "sha256": _hashes(settings.run, files),
    }
    write_atomic(settings.run / tables.SUMMARY, json.dumps(summary, indent=1).encode())
    return summary


def record_files(settings: Parameters, *names: str) -> None:
    """Add what was written after the summary, if it is there, to its hashes for `verify_run`."""
    summary = tables.read_summary(settings)
    summary["sha256"] |= _hashes(settings.run, [settings.run / name for name in names])
    write_atomic(settings.run / tables.SUMMARY, json.dumps(summary, indent=1).encode())


def _hashes(run: Path, files: Iterable[Path]) -> dict[str, str]:
    """Hash the files that are there, by their names below the run folder."""
    return {str(f.relative_to(run)): sha256(f.read_bytes()) for f in files if f.is_file()}


def verify_run(settings: Parameters) -> list[str]:
    """Check a run folder against its own summary; return what is wrong, a line each.

    Hashes of models and predictions, the hash of each best model in the history, the fingerprint of
    the prepared data, and the metrics, computed again from `predictions.csv.gz`; of a run over a
    network, whose predictions stay in the hospitals, the first two. Raises InputError if there is
    no summary.
    """
    run = settings.run
    summary = tables.read_summary(settings)
    written = summary["sha256"]
    there = _hashes(run, [run / name for name in written])
    wrong = [f"{name} is missing" for name in written if name not in there]
    wrong += [f"{name} has changed" for name in there if there[name] != written[name]]
    history = set(read_history(run)["state_sha256"].dropna())
    # Local BatchNorm is in the file of a model, but not in what travelled and was hashed.
    for name in sorted(there) if settings.batchnorm != "local" else ():
        model = name.startswith("models/") and name != "models/trunk.safetensors"
        if model and state_hash(load_file(run / name)) not in history:
            wrong.append(f"{name} is the state of no round in history.csv")
    if settings.partition == tables.NETWORK:
        return wrong
    if summary["fingerprint"] != tables.read_data(settings)["fingerprint"]:
        return [*wrong, f"{settings.prepared} holds other data: metrics cannot be recomputed"]
    return wrong + _recompute(settings)


def _recompute(settings: Parameters) -> list[str]:
    """Compute the tables again from the predictions as written; name the rows that differ."""
    run = settings.run
    predictions = read_predictions(run / "evaluation" / "predictions.csv.gz")
    again = evaluate_models(predictions, read_films(settings), settings.seed)
    wrong = []
    for name, keys in (("metrics", tables.OWNER), ("differences", ["first", "second"])):
        stored = tables.read_table(run / "evaluation" / f"{name}.csv")
        stored = stored[stored["metric"].isin(tables.METRICS)]
        keys = [*keys, "test_set", "finding", "metric"]
        both = stored.merge(getattr(again, name), on=keys, how="outer", suffixes=("", "_again"))
        pairs = [both[[c, f"{c}_again"]].to_numpy(float).T for c in ("value", "ci_low", "ci_high")]
        same = np.all([np.isclose(*pair, atol=1e-12, equal_nan=True) for pair in pairs], axis=0)
        if "verdict" in both:
            same &= both["verdict"] == both["verdict_again"]
        told = [c for c in ("value", "verdict", "value_again", "verdict_again") if c in both]
        for row in both[~same][[*keys, *told]].astype(object).to_numpy().tolist():
            about, found = row[: len(keys)], row[len(keys) :]
            half = len(found) // 2
            wrong.append(f"{name}.csv says {found[:half]} for {about}, again {found[half:]}")
    return wrong
