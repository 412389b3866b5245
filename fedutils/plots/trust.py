"""Figures for trust: calibration, pointing, a gallery of films."""

from collections.abc import Sequence
from typing import Any

import matplotlib.colors as mcolors
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..evidence.calibration import reliability
from ..evidence.explain import ALL_BOXES, CENTRE, ELSEWHERE, KINDS, UPPER
from ..evidence.tables import MEAN
from . import style
from .style import BLUE, GREY, INK, ORANGE, SKY, canvas, in_our_style


@in_our_style
def reliability_diagram(
    truth: np.ndarray, probability: np.ndarray, calibration: pd.DataFrame, title: str = ""
) -> Figure:
    """Reliability of all findings together, and calibration error by finding, with its interval.

    `truth` (n, findings) holds 0, 1 or NaN, `probability` is alike; `calibration` has the rows of
    that model on all films.
    """
    fig, (whole, ax) = canvas("Calibration", title, 4.3, columns=2)
    whole.plot([0, 1], [0, 1], ":", color=GREY)
    bins = reliability(truth, np.asarray(probability))
    area = 12 + 150 * bins["films"] / max(bins["films"].sum(), 1)  # of a dot, its films
    whole.plot(bins["predicted"], bins["observed"], color=BLUE, linewidth=1.2)
    whole.scatter(bins["predicted"], bins["observed"], area, BLUE, zorder=3)
    whole.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    whole.set(xlabel="predicted probability", ylabel="share with the finding")
    whole.set_title("All findings, 15 bins (dotted: calibrated)")
    ax.set_title("By finding, 95 % interval (hollow: too few patients)")
    own = calibration.set_index("finding").drop(MEAN, errors="ignore")
    for row, (_, one) in enumerate(own.iterrows()):
        if np.isnan(one["ece"]):
            at = ax.get_yaxis_transform()
            ax.text(0.02, row, "no labels", color=GREY, va="center", transform=at)
        few = np.isnan(one["ece_low"])
        ax.hlines(row, one["ece_low"], one["ece_high"], color=BLUE)
        ax.plot(one["ece"], row, "o", color=GREY if few else BLUE, mfc="white" if few else BLUE)
    ax.set_yticks(range(len(own)), own.index)
    most = np.nanmax([*own["ece"], *own["ece_high"], 0.01])
    limits = {"xlim": (0, 1.08 * most), "ylim": (len(own) - 0.5, -0.5)}
    ax.set(**limits, xlabel="expected calibration error")
    ax.tick_params(axis="y", length=0)
    return fig


@in_our_style
def pointing(table: pd.DataFrame, title: str = "") -> Figure:
    """Share of films whose hottest point lies in a box, beside points placed without a look.

    `table` is pointing.csv: `method, arm, client, finding, hits, n, value, ci_low, ci_high`. Bars
    are 95 % intervals over patients; a tick is what a point reaches that was fitted on these boxes.
    """
    names = list(dict.fromkeys([ALL_BOXES, *table["finding"]]))
    lanes = style.by_arm(table)
    for name, colour in ((CENTRE, INK), (ELSEWHERE, GREY)):
        lanes.append((name, colour, table[table["method"] == name]))
    lane = 0.17  # inches
    pitch = lane * len(lanes) + 0.12
    fig, (ax,) = canvas("Pointing game, 95 % interval", title, 1.2 + pitch * len(names))
    for k, (name, colour, rows) in enumerate(lanes):
        y = rows["finding"].map(names.index) + (k - (len(lanes) - 1) / 2) * lane / pitch
        ax.hlines(y, rows["ci_low"], rows["ci_high"], color=colour)
        ax.plot(rows["value"], y, "o", ms=5, color=colour)
        for at, row in zip(y, rows.itertuples(), strict=True):
            named = f"  {name}" if row.finding == ALL_BOXES else ""
            style.at_right(ax, at, f"{row.hits:.0f} of {row.n:.0f}{named}", colour)
    bound = table[table["method"] == UPPER]
    y, shift = bound["finding"].map(names.index), (len(lanes) - 1) / 2 * lane / pitch
    ax.vlines(bound["value"], y + shift - 0.1, y + shift + 0.1, color=ORANGE, linewidth=2.5)
    style.stripe(ax, range(0, len(names), 2))
    ax.set_yticks(range(len(names)), names)
    ax.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5))
    ax.set_xlabel("share of points in a box (orange tick: a fixed point fitted on these films)")
    return fig


@in_our_style
def gallery(panels: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """Three films for each finding, with probability, heat map and boxes; two findings a row.

    `panels` is what `explain.fill_gallery` returns, in its order: `finding, kind, probability,
    film, boxes, heat`.
    """
    count = len(panels) // len(KINDS)
    size = style.WIDTH, 0.5 + 1.95 * -(-count // 2)
    fig = plt.figure(figsize=size, layout="constrained")
    fig.suptitle(f"Most confident, right and wrong · {title}".rstrip(" ·"), x=0.01, ha="left")
    groups = np.ravel(fig.subfigures(-(-count // 2), 2, wspace=0.03))
    axes = [ax for group in groups[:count] for ax in group.subplots(1, len(KINDS))]
    for group, first in zip(groups, panels[:: len(KINDS)], strict=False):
        group.suptitle(first["finding"], fontsize=10.5, x=0.01, ha="left")
    paint = mcolors.LinearSegmentedColormap.from_list("heat", [SKY + "00", SKY + "c8"])
    for ax, panel in zip(axes, panels, strict=True):
        film, heat, p = panel["film"], panel["heat"], panel["probability"]
        style.show_film(ax, film, "", panel["boxes"])
        if heat is not None:
            extent = (-0.5, len(film) - 0.5, len(film) - 0.5, -0.5)
            look = {"cmap": paint, "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
            ax.imshow(heat / max(heat.max(), 1e-12), extent=extent, **look)
        score = "" if p is None else " <0.01" if p < 0.005 else f" {p:.2f}"
        ax.set_title(panel["kind"] + score, fontsize=9, loc="center", pad=3)
    return fig
