"""Figures of scores: curves, forests and matrices of AUROC."""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..base.findings import FINDINGS
from ..base.scores import auroc, average_precision, pr_points, roc_points, undefined
from ..evidence.tables import (
    ALL_FILMS,
    BRACKETS,
    LEAST_POSITIVES,
    MEAN,
    MEAN_LOCAL,
    SHOWN,
    is_client,
    mean_auroc_rows,
    rows_of,
    value_or_why_not,
    with_interval,
)
from .style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    ORANGE,
    PURPLE,
    VERMILION,
    at_right,
    blank,
    by_arm,
    canvas,
    grid,
    heat,
    in_our_style,
    note,
    stripe,
)


def _curve_panels(
    truth: np.ndarray, probability: np.ndarray, title: str, draw: Callable[..., str], words: tuple
) -> Figure:
    """Let `draw` draw each finding's curve, if defined, and return what is said below its name.

    `words` are the heading, the names of the axes, and a note on how to read the panels.
    """
    heading, x, y, remark = words
    fig, axes = grid(heading, title, len(FINDINGS), 1.95, sharex=True, sharey=True)
    fig.supxlabel(x)
    fig.supylabel(y)
    truth, probability = np.asarray(truth, dtype=float), np.asarray(probability, dtype=float)
    for ax, finding, labels, scores in zip(axes, FINDINGS, truth.T, probability.T, strict=False):
        ax.set_title(f"{finding}\n{draw(ax, labels, scores)}")
        if not ax.lines:
            why = undefined(np.nansum(labels), np.count_nonzero(~np.isnan(labels)))
            note(ax, why.replace(" (", "\n("))
    ticks = (0, 0.5, 1)
    axes[0].set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=ticks, yticks=ticks)
    axes[len(FINDINGS) - 5].tick_params(labelbottom=True)  # the panel above the blank one
    note(axes[-1], remark)
    return fig


def _roc(ax: Axes, labels: np.ndarray, scores: np.ndarray) -> str:
    """Draw one ROC curve over the diagonal, which is chance."""
    value = auroc(labels, scores)
    if np.isnan(value):
        return ""
    ax.plot([0, 1], [0, 1], ":", color=GREY)
    ax.plot(*roc_points(labels, scores), color=BLUE)
    return f"AUROC {value:.2f}"


def _pr(ax: Axes, labels: np.ndarray, scores: np.ndarray) -> str:
    """Draw one precision-recall curve over the prevalence, which is chance."""
    value = average_precision(labels, scores)
    if np.isnan(value):
        return ""
    chance = np.nanmean(labels)
    ax.plot([0, 1], [chance, chance], ":", color=GREY)
    ax.plot(*pr_points(labels, scores), color=BLUE, drawstyle="steps-post")
    return f"AP {value:.2f} (chance {chance:.3f})"


@in_our_style
def roc_curves(truth: np.ndarray, probability: np.ndarray, title: str = "") -> Figure:
    """ROC curve of each finding, for truth (n, 14) of 0, 1 or NaN and probability (n, 14)."""
    words = ("ROC curves", "1 − specificity", "sensitivity", "dotted:\na model that\nguesses")
    return _curve_panels(truth, probability, title, _roc, words)


@in_our_style
def pr_curves(truth: np.ndarray, probability: np.ndarray, title: str = "") -> Figure:
    """Precision-recall curve of each finding over its prevalence; arguments as `roc_curves`."""
    note = "dotted:\nthe prevalence,\nwhich a model that\nguesses reaches"
    words = ("Precision-recall curves", "recall (sensitivity)", "precision", note)
    return _curve_panels(truth, probability, title, _pr, words)


def _forest_arm(
    ax: Axes, rows: pd.DataFrame, shift: float, colour: str, name: str, all_said: bool = False
) -> None:
    """Draw one arm in its lane of each row (`lane`), its mean written at the right, or every value.

    Models of single clients are small circles without an interval.
    """
    lane, single = rows["lane"] + shift, ~blank(rows["client"])
    ax.plot(rows["value"][single], lane[single], "o", ms=4, mfc="none", mec=colour, alpha=0.7)
    for index, row in rows[~single].iterrows():
        few = row.get("few", False)
        shade = LIGHT if few else colour
        ax.hlines(lane[index], row["ci_low"], row["ci_high"], color=shade)
        ax.plot(row["value"], lane[index], "o", ms=5.5, color=shade)
        if all_said or row["lane"] == 0 or np.isnan(row["value"]):
            text = f"{name} {value_or_why_not(row, **BRACKETS)}".strip()
            at_right(ax, lane[index], text, GREY if few else colour)


def _yardsticks(ax: Axes, yardsticks: dict[str, float], step: float) -> float:
    """Tick published means on the top row, named on a staircase above it; return its height."""
    low, high = ax.get_xlim()
    low, high = min([low, *yardsticks.values()]), max([high, *yardsticks.values()])
    ax.set_xlim(min(low, min(yardsticks.values()) - 0.5 * (high - low)), high + 0.02 * (high - low))
    for k, (name, value) in enumerate(sorted(yardsticks.items(), key=lambda item: item[1])):
        top = -0.5 - (k + 0.7) * step
        ax.vlines(value, top, 0.5, color=GREY, linewidth=0.9)
        ax.text(value, top, f"{name}  {value:.3f} ", ha="right", va="center", color=GREY, size=9)
    return 0.5 + (len(yardsticks) + 0.5) * step


@in_our_style
def auroc_forest(
    metrics: pd.DataFrame, yardsticks: dict[str, float] | None = None, title: str = ""
) -> Figure:
    """AUROC by finding with 95 % intervals, arms side by side, the mean on top.

    `metrics` is metrics.csv: `arm, seed, client, test_set, finding, metric, value, ci_low,
    ci_high, n, positives`. Shown are the rows of the test set `all`, of the mean over seeds
    (else of the first seed). `yardsticks` are published means, right only for that test set.
    """
    whole = rows_of(metrics, metric="auroc", test_set=ALL_FILMS)
    whole = whole.assign(lane=whole["finding"].map([MEAN, *FINDINGS].index))
    means = whole.loc[whole["finding"] == MEAN, "positives"]
    names = [f"mean of {means.max():.0f}" if len(means) else MEAN, *FINDINGS]
    lone = whole["arm"].nunique() == 1
    return _forest("AUROC with 95 % interval over patients", title, whole, names, yardsticks, lone)


def _forest(
    heading: str,
    title: str,
    rows: pd.DataFrame,
    names: Sequence[str],
    yardsticks: dict[str, float] | None = None,
    all_said: bool = True,
) -> Figure:
    """Draw points with intervals, a row a name and a lane an arm; `rows` has the column `lane`.

    Of several seeds the rows of their mean are shown, else those of the first.
    """
    arms = by_arm(rows.reset_index(drop=True))
    height, gap = 0.16, 0.2  # inches, of an arm's lane and of a yardstick's name
    pitch = max(0.26, height * len(arms) + 0.06)
    size = len(names) * pitch + 1.0 + gap * len(yardsticks or {})
    fig, (ax,) = canvas(heading, title, size)
    for k, (arm, colour, own) in enumerate(arms):
        mean = own[blank(own["seed"])]
        own = mean if len(mean) else own[own["seed"] == own["seed"].min()]
        shift = (k - (len(arms) - 1) / 2) * height / pitch
        name = ("mean local" if arm == "local" else arm) if len(arms) > 1 else ""
        _forest_arm(ax, own, shift, colour, name, all_said)
    stripe(ax, range(0, len(names), 2))
    top = _yardsticks(ax, yardsticks, gap / pitch) if yardsticks else 0.5
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -top), xlabel="AUROC (0.5 is chance)")
    return fig


@in_our_style
def subgroup_forest(metrics: pd.DataFrame, title: str = "") -> Figure:
    """Mean AUROC of each subgroup with 95 % intervals, arms side by side; the rest as metrics.csv.

    Subgroups with under 30 positive labels in all are grey: nothing is to be concluded from them.
    """
    whole = metrics[(metrics["metric"] == "auroc") & blank(metrics["client"])]
    names = [name for name in whole["test_set"].unique() if not is_client(name)]
    rows = whole[(whole["finding"] == MEAN) & whole["test_set"].isin(names)]
    labels = whole[whole["finding"] != MEAN].drop_duplicates(["test_set", "finding"])
    positives = labels.groupby("test_set")["positives"].sum()
    few = rows["test_set"].map(positives) < LEAST_POSITIVES
    rows = rows.assign(lane=rows["test_set"].map(names.index), few=few)
    films = rows.drop_duplicates("test_set").set_index("test_set")["n"]
    names = [f"{name} ({films[name]:,} films)" for name in names]
    heading = f"Mean AUROC by subgroup (grey: under {LEAST_POSITIVES} positives)"
    return _forest(heading, title, rows, names)


@in_our_style
def subgroup_heatmap(metrics: pd.DataFrame, title: str = "") -> Figure:
    """AUROC of the first arm by subgroup and finding; grey where there are under 30 positives."""
    rows = metrics[(metrics["metric"] == "auroc") & (metrics["finding"] != MEAN)]
    arm = rows["arm"].iloc[0]
    rows = rows[(rows["arm"] == arm) & blank(rows["seed"]) & blank(rows["client"])]
    names = [name for name in rows["test_set"].unique() if not is_client(name)]
    wide = rows.pivot(index="test_set", columns="finding", values=["value", "positives"])
    value = wide["value"].loc[names, list(FINDINGS)].to_numpy(dtype=float)
    count = wide["positives"].loc[names, list(FINDINGS)].to_numpy(dtype=float)
    texts = np.where(np.isnan(value), "–", np.char.mod("%.2f", np.nan_to_num(value)))
    heading = f"AUROC by subgroup, {arm} (grey: under {LEAST_POSITIVES} positives)"
    fig, (ax,) = canvas(heading, title, 1.9 + 0.28 * len(names))
    shown = np.where(count < LEAST_POSITIVES, np.nan, value)
    colours = [VERMILION, "white", BLUE]
    heat(ax, shown, texts, names, colours=colours, vmin=0, vmax=1, cbar=False)
    for (row, column), text in np.ndenumerate(texts):
        if np.isnan(shown[row, column]):
            ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", size=9, color=GREY)
    return fig


@in_our_style
def client_matrix(metrics: pd.DataFrame, title: str = "") -> Figure:
    """Mean AUROC of every model (rows) on every client's test films (columns), as metrics.csv.

    A frame marks a local model on the films of its own hospital.
    """
    rows = mean_auroc_rows(metrics)
    rows = rows.loc[blank(rows["seed"]) & rows["test_set"].map(is_client)]
    clients = list(rows["test_set"].unique())
    arm = rows["arm"].replace("local", MEAN_LOCAL)
    rows = rows.assign(model=arm.where(blank(rows["client"]), "local " + rows["client"]))
    models = sorted(rows["model"].unique(), key=lambda name: name.startswith("local "))
    cells = pd.MultiIndex.from_product([models, clients])
    wide = rows.set_index(["model", "test_set"]).reindex(cells)
    said = [value_or_why_not(row, **BRACKETS) for _, row in wide.iterrows()]
    texts = np.array([text.replace(" ", "\n", 1) for text in said])
    shape = len(models), len(clients)
    heading = "Mean AUROC of each model on each hospital’s films"
    fig, (ax,) = canvas(heading, title, 1.5 + 0.42 * len(models))
    value = wide["value"].to_numpy(dtype=float).reshape(shape)
    look = {"colours": ["white", BLUE], "cbar": False, "vmin": 0.5, "vmax": 1.1}
    films = wide["n"].groupby(level=1).max()
    columns = [f"{name}\n{films[name]:,.0f} films" for name in clients]
    heat(ax, value, texts.reshape(shape), models, columns, **look)
    for row, model in enumerate(models):
        if model.removeprefix("local ") in clients:
            place = clients.index(model.removeprefix("local ")), row
            ax.add_patch(plt.Rectangle(place, 1, 1, fill=False, edgecolor=INK, linewidth=2))
    return fig


@in_our_style
def difference_forest(differences: pd.DataFrame, title: str = "") -> Figure:
    """Differences of AUROC with 95 % intervals: of the mean for each pair, then by finding.

    `differences` is differences.csv, or that of `compare_runs`; its rows on all films are used.
    Filled: shown. Hollow: no difference shown. Small lines: the training seeds' smallest and
    largest value.
    """
    rows = rows_of(differences, metric="auroc", test_set=ALL_FILMS)
    firsts = list(rows["first"].unique())
    alone, names = len(firsts) == 1, rows["first"] + " − " + rows["second"]
    rows = rows.assign(pair=rows["second"] if alone else names)
    pairs = list(rows["pair"].unique())
    main = [name for name in pairs if not name.startswith("local ")] or pairs
    colours = dict(zip(main, [VERMILION, GREEN, PURPLE, ORANGE] + [INK] * len(main), strict=False))
    lanes = [(MEAN, name, f"mean: {'− ' * alone}{name}") for name in pairs]
    lanes += [(f, name, f if name == main[0] else "") for f in FINDINGS for name in main]
    heading = f"AUROC {f'of {firsts[0]} minus others' if alone else 'between runs'} (filled: shown)"
    fig, (ax,) = canvas(heading, title, 0.2 * len(lanes) + 1.2)
    table = rows.set_index(["finding", "pair"])
    for lane, (finding, name, _) in enumerate(lanes):
        _difference(ax, table.loc[(finding, name)], lane, colours.get(name, GREY), finding == MEAN)
    ax.axvline(0, color=INK, linewidth=0.8)
    stripe(ax, range(len(pairs), len(lanes), 2 * len(main)), len(main))
    middle, named = (len(main) - 1) / 2, [k for k, lane in enumerate(lanes) if lane[2]]
    ax.set_yticks([k + middle * (k >= len(pairs)) for k in named], [lanes[k][2] for k in named])
    ax.set(ylim=(len(lanes) - 0.5, -0.5), xlabel="AUROC of the first minus that of the other")
    for label, (_, name, _) in zip(ax.get_yticklabels(), lanes[: len(pairs)], strict=False):
        label.set_color(colours.get(name, GREY))
    return fig


def _difference(ax: Axes, row: pd.Series, lane: float, colour: str, said: bool) -> None:
    """Draw one difference with its interval and the range of its seeds."""
    shown = row["verdict"] == SHOWN
    ax.hlines(lane, row["ci_low"], row["ci_high"], color=colour)
    ax.vlines([row["seed_low"], row["seed_high"]], lane - 0.3, lane + 0.3, color=colour, lw=0.9)
    ax.plot(row["value"], lane, "o", ms=5.5, mec=colour, mfc=colour if shown else "white")
    text = "not defined"
    if not np.isnan(row["value"]):
        text = with_interval(row, "+", **BRACKETS)
        text += (" shown" if shown else " not shown") if said else ""
    at_right(ax, lane, text, colour)


@in_our_style
def run_forest(metrics: pd.DataFrame, title: str = "") -> Figure:
    """Mean AUROC of several runs with 95 % intervals, arms side by side.

    `metrics` is that of `compare_runs`: metrics.csv with a first column `run`.
    """
    rows = mean_auroc_rows(metrics)
    runs = list(rows["run"].unique())
    rows = rows.assign(lane=rows["run"].map(runs.index))
    return _forest("Mean AUROC by run, 95 % interval over patients", title, rows, runs)
