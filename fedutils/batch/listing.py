"""What runs there are, what one found, and what a command would do: `list`, `show`, `--dry-run`."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from ..base.errors import InputError
from ..evidence.tables import (
    NETWORK,
    SUMMARY,
    mean_auroc_rows,
    over_seeds,
    read_table,
    with_interval,
)
from ..run import read_history
from ..settings import FIELDS
from .early import check_early
from .notebook import TRAINS
from .run import Step, plan_steps

DAY = "%Y-%m-%d %H:%M"


def list_runs(work: Path) -> pd.DataFrame:
    """Return a row a run of a work folder, the latest first: what it is, how far, what it found."""
    rows = []
    for config in sorted(work.glob("runs/*/config.json"), key=_time, reverse=True):
        run, about = config.parent, json.loads(config.read_text())
        rows.append({
            "run": run.name, "date": time.strftime(DAY, time.localtime(_time(config))),
            "data": _data(about), "partition": about.get("partition", ""),
            "arms": about.get("arms", ""), "seeds": about.get("seeds", ""),
            "rounds": _rounds(run), "state": _state(run), "mean AUROC": _result(run),
            "size": f"{sum(p.stat().st_size for p in run.rglob('*') if p.is_file()) / 1e6:,.0f} MB",
        })  # fmt: skip
    return pd.DataFrame(rows)


def _data(config: Mapping[str, Any]) -> str:
    """Name the films of a run."""
    return "at hospitals" if config.get("partition") == NETWORK else config.get("data_dir", "")


def _time(path: Path) -> float:
    return path.stat().st_mtime


def _rounds(run: Path) -> str:
    """Say how many rounds there are; nothing before the first."""
    found = read_history(run)["round"].max() if (run / "history.csv").is_file() else float("nan")
    return "" if pd.isna(found) else f"{found:.0f}"


def _state(run: Path) -> str:
    """Say how far a run has come."""
    if (run / SUMMARY).is_file():
        return "evaluated"
    return "trained" if (run / "finished.json").is_file() else "unfinished"


def _result(run: Path) -> str:
    """Write the first arm's mean AUROC on test films."""
    path = run / "evaluation/metrics.csv"
    rows = mean_auroc_rows(over_seeds(read_table(path)), client="") if path.is_file() else []
    for row in rows.itertuples() if len(rows) else ():
        return "not defined" if pd.isna(row.value) else with_interval(row, without="")
    return ""


def show_run(run: Path) -> Iterator[str]:
    """Say in lines what a run was given, how far it is, what it found, and where that lies.

    Raises InputError where the folder holds none.
    """
    config = run / "config.json"
    if not config.is_file():
        raise InputError(f"{run}: no run; `fedutils list` names those that there are")
    about = json.loads(config.read_text())
    state, rounds = _state(run), _rounds(run)
    yield f"{run.name}: {state}, {rounds or 'no'} {'round' if rounds == '1' else 'rounds'}"
    for name in [name for name in FIELDS if name in about and about[name] != FIELDS[name].default]:
        yield f"  {name}={about[name]}"
    summary = run / SUMMARY
    if summary.is_file():
        yield from (f"- {line}" for line in json.loads(summary.read_text())["headline"])
    pages = sorted(run.parent.parent.glob(f"notebooks/{run.name}/*.html"))
    for path in [summary, run / "MODEL_CARD.md", run / "global_model.safetensors", *pages]:
        if path.is_file():
            yield f"  {path}"


def plan_run(values: Mapping[str, Any], only: str, force: bool) -> Iterator[str]:
    """Say, a line a notebook, what a run would do, why, and how long it took last time.

    Raises InputError where `run` would before it starts.
    """
    steps = plan_steps(values, only)
    settings = steps[0].settings
    reasons = {step.stem: step.why() or "--force" * force for step in steps}
    check_early([settings], [stem for stem, why in reasons.items() if why])
    yield f"run {settings.name} in {settings.work_dir}"
    before = ""
    for step in steps:
        why = reasons[step.stem]
        unless = f"; runs if {before} leaves something else" if before and not why else ""
        yield f"  {step.stem:<19} {_would(step, why)}{unless}"
        before = before or (step.stem if why else "")


def _would(step: Step, why: str) -> str:
    """Say what becomes of a notebook."""
    if not why:
        return "skipped (unchanged)"
    taken = "notebook 03 estimates it before it trains" if step.stem == TRAINS else "unknown"
    if step.output.is_file():
        about = nbformat.read(step.output, as_version=4).metadata.get("papermill", {})
        if seconds := about.get("duration"):
            taken = f"{seconds:.0f} s last time"
    return f"runs: {why}; how long: {taken}"
