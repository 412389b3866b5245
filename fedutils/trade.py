"""What privacy costs: the AUROC of runs that differ in epsilon."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file

from .evaluation import mean_auroc_rows, read_table
from .findings import InputError
from .privacy import read_budget
from .settings import Settings, read_run

CHANCE = 0.5


def privacy_trade(work: Path) -> pd.DataFrame:
    """Return a row for each private run below a work folder, and each that it compares with.

    Columns: `run, tracked, seeds, value, ci_low, ci_high, lowest, highest`: the mean test AUROC of
    the federated models, mean over the seeds, its 95 % interval over patients, the seeds' range;
    `epsilon` (infinite without privacy) and `patients` of the hospital that spent most, and
    `wanted`: the patients it would take for the noise of a step, of norm noise x clip x sqrt(d) for
    d parameters, to be no longer than the sum of the gradients, at most clip x patients drawn.
    Raises InputError where no evaluated run is private.
    """
    paths = sorted(work.glob("runs/*/evaluation/metrics.csv"))
    rows = [row for path in paths for row in _rows(read_run(str(work), path.parents[1].name))]
    table = pd.DataFrame(rows)
    if not len(table) or np.isinf(table["epsilon"]).all():
        raise InputError(f"{work}/runs holds no evaluated run with dp=patient")
    return table.sort_values(["tracked", "epsilon"], ignore_index=True)


def _rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield the row of one run, if it has a federated arm."""
    table = mean_auroc_rows(read_table(settings.run / "evaluation" / "metrics.csv"))
    table = table[table["arm"] == "federated"]
    seeds, whole = table[table["seed"] != ""], table[table["seed"] == ""]
    for row in (whole if len(whole) else seeds).head(1).itertuples():
        yield {
            "run": settings.name, "tracked": settings.tracked, "seeds": len(seeds),
            "value": row.value, "ci_low": row.ci_low, "ci_high": row.ci_high,
            "lowest": seeds["value"].min(), "highest": seeds["value"].max(),
        } | _spent(settings)  # fmt: skip


def _spent(settings: Settings) -> dict[str, float]:
    """Return what the worst hospital of the federated arm spent, and how many patients it wants."""
    budget = read_budget(settings.run)
    if not len(budget):
        return {"epsilon": math.inf, "patients": math.nan, "wanted": math.nan}
    rows = budget[budget["arm"] == "federated"]
    worst = rows.loc[rows["epsilon"].idxmax()]
    file = next((settings.run / "models").glob("federated-s*.safetensors"))
    state = load_file(file).items()
    trained = sum(v.numel() for name, v in state if v.ndim > 1 or name == "fc.bias")
    batch = worst["noise_multiplier"] * math.sqrt(trained)
    wanted = batch / worst["sampling_rate"]
    return {"epsilon": worst["epsilon"], "patients": worst["patients"], "wanted": wanted}


def trade_words(table: pd.DataFrame) -> list[str]:
    """Say for each choice of tracked layers what privacy costs, and where all drowns in noise."""
    return [_sentence(tracked, rows) for tracked, rows in table.groupby("tracked", sort=False)]


def _sentence(tracked: str, rows: pd.DataFrame) -> str:
    """Say it of one choice of tracked layers."""
    private, free = rows[np.isfinite(rows["epsilon"])], rows[np.isinf(rows["epsilon"])]
    parts = [
        f"{row.value:.3f} ({row.ci_low:.3f} to {row.ci_high:.3f}) at epsilon {row.epsilon:.2g}"
        for row in private.itertuples()
    ]
    text = f"tracked={tracked}: mean AUROC {', '.join(parts)}"
    text += "".join(f"; {row.value:.3f} without privacy" for row in free.itertuples()) + "."
    drowned = private[private["ci_low"] <= CHANCE]
    if not len(drowned):
        return text
    row = drowned.iloc[-1]
    text += f" Up to epsilon {row['epsilon']:.2g} it is not told from guessing"
    if not (free["ci_low"] > CHANCE).any():
        return f"{text}; that it would be without noise is not shown here."
    return (
        f"{text}: the gradient drowns in the noise. The smallest hospital has"
        f" {row['patients']:,.0f} patients; it would take about {row['wanted']:,.0f} for the noise"
        " of a step to be no longer than the longest mean gradient that clipping allows, at this"
        " noise multiplier and sampling rate."
    )
