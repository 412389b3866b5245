"""What privacy costs: the AUROC of runs that differ in epsilon."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file

from fedutils.base.errors import InputError
from fedutils.batch.trained import read_run
from fedutils.evidence.tables import ALL_FILMS, mean_auroc_rows, read_budget, read_table
from fedutils.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    canvas,
    end_labels,
    in_our_style,
)
from fedutils.settings import Settings

CHANCE = 0.5


def privacy_trade(work: Path) -> pd.DataFrame:
    """Return a row for each private run below a work folder, and each that it compares with.

    Columns: `run, tracked, seeds, value, ci_low, ci_high, lowest, highest`: the mean test AUROC of
    the federated models, mean over the seeds, its 95 % interval over patients, the seeds' range;
    `epsilon` (infinite without privacy) and `patients` of the hospital that spent most, `total`,
    what all models of the work folder had cost a patient together when this run ended (infinite,
    too, once one learned without privacy), and
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
    table = mean_auroc_rows(
        read_table(settings.run / "evaluation" / "metrics.csv"), test_set=ALL_FILMS
    )
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
        unbound = {"epsilon": math.inf, "total": math.inf}
        return unbound | dict.fromkeys(("patients", "wanted"), math.nan)
    rows = budget[budget["arm"] == "federated"]
    worst = rows.loc[rows["epsilon"].idxmax()]
    file = next((settings.run / "models").glob("federated-s*.safetensors"))
    state = load_file(file).items()
    trained = sum(v.numel() for name, v in state if v.ndim > 1 or name == "fc.bias")
    batch = worst["noise_multiplier"] * math.sqrt(trained)
    wanted = batch / worst["sampling_rate"]
    total = budget["total_epsilon"].max()
    about = {"epsilon": worst["epsilon"], "total": total}
    return about | {"patients": worst["patients"], "wanted": wanted}


def trade_words(table: pd.DataFrame) -> list[str]:
    """Say what privacy costs for each choice of tracked layers, and what all runs cost together."""
    said = [_sentence(tracked, rows) for tracked, rows in table.groupby("tracked", sort=False)]
    return [*said, f"{together(table)[0].upper()}{together(table)[1:]}."]


def together(table: pd.DataFrame) -> str:
    """Say what all models of the work folder cost a patient, by its ledger."""
    total = table["total"].max()
    cost = "no bound (epsilon is infinite)" if math.isinf(total) else f"epsilon {total:.2f}"
    return f"all models of this work folder together, by its ledger: {cost}"


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


def _trade_line(ax: Axes, rows: pd.DataFrame, places: pd.Series, colour: str, name: str) -> None:
    """Draw one line of the trade: the mean, its interval, and the seeds' range as thin marks."""
    x = places[rows["epsilon"]].to_numpy(float) + 0.06 * (colour == VERMILION)
    ax.vlines(x, rows["ci_low"], rows["ci_high"], color=colour, linewidth=2)
    for end in ("lowest", "highest"):
        ax.plot(x, rows[end], "_", color=colour, markersize=9)
    private = np.isfinite(rows["epsilon"]).to_numpy()
    ax.plot(x[private], rows["value"][private], "-o", color=colour)
    ax.plot(x[~private], rows["value"][~private], "o", mfc="white", color=colour)


@in_our_style
def plot_trade(table: pd.DataFrame, title: str = "") -> Figure:
    """Mean test AUROC against epsilon, a line for each choice of tracked layers.

    `table` is what `privacy_trade` returns. Bars are 95 % intervals over patients, dashes the
    lowest and the highest seed; a run without privacy stands at the right, hollow.
    """
    fig, (ax,) = canvas("What privacy costs (bar: 95 % interval, dashes: seeds)", title, 3.8)
    values = np.sort(table["epsilon"].round(1).unique())
    table = table.assign(epsilon=table["epsilon"].round(1))
    places = pd.Series(np.arange(len(values)), index=values)
    ends = []
    colours = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY]
    for (name, rows), colour in zip(table.groupby("tracked"), colours, strict=False):
        _trade_line(ax, rows, places, colour, name)
        ends.append((places[rows["epsilon"].iloc[-1]], rows["value"].iloc[-1], name, colour))
    ax.axhline(0.5, color=GREY, linewidth=1, linestyle=":")
    place = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "bottom", "fontsize": 9}
    ax.text(0.995, 0.5, "guessing", color=GREY, **place)
    names = ["no privacy" if np.isinf(v) else f"{v:.3g}" for v in values]
    ax.set_xticks(range(len(values)), names)
    ax.set(
        xlim=(-0.35, len(values) - 0.6),
        xlabel=f"epsilon of one model, at the worst hospital (small is private)\n{together(table)}",
    )
    ax.set_ylabel("mean test AUROC")
    end_labels(ax, ends)
    return fig
