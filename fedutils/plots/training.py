"""Figures of training: learning curves, and what the AUROC cost."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .style import blank, by_arm, canvas, end_labels, in_our_style


def _runs(ax: Axes, rows: pd.DataFrame, column: str, colour: str, line: str = "-") -> pd.Series:
    """Thin line for each seed and client, thick line for their mean; return the mean by round."""
    runs = rows.assign(client=rows["client"].fillna("")).dropna(subset=[column])
    runs = runs.pivot_table(index="round", columns=["seed", "client"], values=column)
    if runs.shape[1] > 1:
        ax.plot(runs, line, color=colour, linewidth=0.8, alpha=0.4)
    mean = runs.mean(axis=1)
    point = {"marker": "o", "mfc": "white" if line == "--" else colour} if len(mean) == 1 else {}
    ax.plot(mean, line, color=colour, linewidth=2, **point)
    return mean


@in_our_style
def learning_curves(history: pd.DataFrame, title: str = "") -> Figure:
    """Loss by round, and validation AUROC of the aggregated model, for each arm.

    `history` holds rows `arm, seed, round, client, train_loss, val_loss, val_auroc, ...`; those
    without a client describe the aggregated model, in the arm `local` each client's row its own
    model. Several seeds or local models: thin lines, and their mean thick.
    """
    models = history[blank(history["client"]) | (history["arm"] == "local")]
    first, last = models["round"].min(), models["round"].max()
    margin = 0.5 if first == last else 0
    several = models.groupby(["arm", "round"]).size().max() > 1
    heading = "Learning curves" + (" (thin: each seed or client, thick: mean)" if several else "")
    fig, axes = canvas(heading, title, 3.6, columns=2)
    for ax in axes:
        ax.set(xlim=(first - margin, last + margin), xlabel="round")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    arms, ends = by_arm(models), []
    for arm, colour, rows in arms:
        training = _runs(axes[0], rows, "train_loss", colour, "--")
        validation = _runs(axes[0], rows, "val_loss", colour)
        lone = {"training": training, "validation": validation}
        for text, mean in (lone if len(arms) == 1 else {arm: validation}).items():
            ends += [(mean.index[-1], mean.iloc[-1], text, colour)] if len(mean) else []
    said = "dashed: training" if models["train_loss"].notna().any() else "training: withheld"
    axes[0].set_title(f"Loss (solid: validation; {said})")
    end_labels(axes[0], ends)
    ends = []
    for arm, colour, rows in arms:
        if len(mean := _runs(axes[1], rows, "val_auroc", colour)):
            best = mean.idxmax()
            ring = {"mfc": "white", "mec": colour, "mew": 2, "clip_on": False, "zorder": 3}
            axes[1].plot(best, mean[best], "o", markersize=8, **ring)
            text = f"{arm}\nbest {mean[best]:.3f}, round {best}"
            spent = rows["epsilon"].max() if "epsilon" in rows else np.nan
            text += "" if np.isnan(spent) else f"\nepsilon {spent:.3g} in all"
            ends.append((mean.index[-1], mean.iloc[-1], text, colour))
    axes[1].set_title("Validation AUROC (circle: best round)")
    end_labels(axes[1], ends)
    return fig


@in_our_style
def cost_curves(cost: pd.DataFrame, title: str = "") -> Figure:
    """Validation AUROC against gigabytes sent and against films seen, for each arm.

    `cost` has columns `arm, seed, round, films_seen, gigabytes, val_auroc`. An arm that sends
    nothing is a dotted line at its best AUROC in the left panel.
    """
    fig, axes = canvas("What the AUROC on validation films costs", title, 3.6, columns=2)
    units = {"gigabytes": "gigabytes of model states sent", "films_seen": "films trained on"}
    for ax, (column, unit) in zip(axes, units.items(), strict=True):
        ends = []
        for arm, colour, rows in by_arm(cost):
            mean = rows.groupby("round")[[column, "val_auroc"]].mean().dropna()
            name = "mean local" if arm == "local" else arm
            if column == "gigabytes" and len(mean) and not mean[column].any():
                best = mean["val_auroc"].max()
                ax.axhline(best, color=colour, linestyle=":")
                ends.append((None, best, f"{name}\nsends nothing", colour))
            elif len(mean):
                ax.plot(mean[column], mean["val_auroc"], "o-", color=colour, ms=4)
                ends.append((*mean.iloc[-1], name, colour))
        ax.set(xlabel=unit, xlim=(0, None))
        end_labels(ax, [(ax.get_xlim()[1] if x is None else x, *end) for x, *end in ends])
    axes[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes[0].set_ylabel("AUROC, validation")
    return fig
