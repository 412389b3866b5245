"""Figures of scores: curves, forests and matrices of AUROC."""

import textwrap
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..base import scores
from ..evidence import tables
from ..evidence.tables import BRACKETS, LEAST_POSITIVES, MEAN, is_client, is_subgroup
from . import style
from .style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILION, blank, canvas, in_our_style

TICKS = {"chance": GREY, "beside": INK}  # columns of what stands beside a model


def _curve_panels(
    truth: pd.DataFrame, probability: pd.DataFrame, title: str, words: tuple, metric: Callable,
    points: Callable, diagonal: bool,
) -> Figure:  # fmt: skip
    """Draw each finding's curve, if defined, over that of a guess: the diagonal or the prevalence.

    `words` are the heading, the names of the axes, a note on how to read the panels, and the form
    of a metric's value and of the prevalence.
    """
    heading, x, y, remark, form = words
    fig, axes = style.grid(heading, title, truth.shape[1] + 1, 1.95, sharex=True, sharey=True)
    fig.supxlabel(x)
    fig.supylabel(y)
    for ax, finding in zip(axes, truth, strict=False):
        labels, score = (part[finding].to_numpy(float) for part in (truth, probability))
        name = textwrap.fill(finding, 20)
        ax.set_title(f"{name}\n")
        if np.isnan(value := metric(labels, score)):
            why = scores.undefined(np.nansum(labels), np.count_nonzero(~np.isnan(labels)))
            style.note(ax, why.replace(" show", "\nshow"))
            continue
        prevalence = np.nanmean(labels)
        ax.plot([0, 1], [0, 1] if diagonal else [prevalence] * 2, ":", color=GREY)
        joined = "default" if diagonal else "steps-post"
        ax.plot(*points(labels, score), color=BLUE, drawstyle=joined)
        ax.set_title(f"{name}\n{form.format(value, prevalence)}")
    ticks = (0, 0.5, 1)
    axes[0].set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=ticks, yticks=ticks)
    last = axes[truth.shape[1]]
    last.axis("off")
    style.note(last, remark)
    for above, ax in zip(axes, axes[5:], strict=False):
        above.tick_params(labelbottom=not ax.axison)  # the panel above a blank one
    return fig


@in_our_style
def roc_curves(truth: pd.DataFrame, probability: pd.DataFrame, title: str = "") -> Figure:
    """ROC curve of each finding, for a column each of 0, 1 or NaN, and of probability."""
    note = "dotted:\na model that\nguesses"
    words = ("ROC curves", "1 − specificity", "sensitivity", note, "AUROC {:.2f}")
    metric, points = scores.auroc, scores.roc_points
    return _curve_panels(truth, probability, title, words, metric, points, diagonal=True)


@in_our_style
def pr_curves(truth: pd.DataFrame, probability: pd.DataFrame, title: str = "") -> Figure:
    """Precision-recall curve of each finding over its prevalence; arguments as `roc_curves`."""
    note = "dotted:\nthe prevalence,\nwhich a model that\nguesses reaches"
    words = ("Precision-recall curves", "recall (sensitivity)", "precision", note)
    words += ("AP {:.2f} (chance {:.3f})",)
    metric, points = scores.average_precision, scores.pr_points
    return _curve_panels(truth, probability, title, words, metric, points, diagonal=False)


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
    metrics: pd.DataFrame, yardsticks: dict[str, float] | None = None, title: str = "",
    controls: pd.DataFrame | None = None,
) -> Figure:  # fmt: skip
    """AUROC by finding with 95 % intervals, arms side by side, the mean on top.

    `metrics` is metrics.csv: `arm, seed, client, test_set, finding, metric, value, ci_low,
    ci_high, n, positives`. Shown are the rows of the test set `all`, of the mean over seeds
    (else of the first seed). `yardsticks` are published means, right only for that test set;
    `controls` is controls.csv by finding.
    """
    whole = tables.rows_of(metrics, metric="auroc", test_set=tables.ALL_FILMS)
    lanes = list(dict.fromkeys([MEAN, *whole["finding"]]))
    whole = whole.assign(lane=whole["finding"].map(lanes.index))
    means = whole.loc[whole["finding"] == MEAN, "positives"]
    names = [f"mean of {means.max():.0f}" if len(means) else MEAN, *lanes[1:]]
    lone = whole["arm"].nunique() == 1
    heading = "AUROC with 95 % interval over patients"
    if controls is not None:
        ticks = {"attributes": "beside", "shuffled": "chance"}
        whole = whole.join(controls.rename(columns=ticks), on="finding")
    fig = _forest(heading, title, whole, names, yardsticks or {}, lone)
    if controls is not None:
        told = "ticks: black, age, sex, view and scanner alone; grey, labels shuffled"
        fig.axes[0].set_xlabel(f"{fig.axes[0].get_xlabel()} · {told}")
    return fig


def _forest(
    heading: str, title: str, rows: pd.DataFrame, names: list[str], yardsticks: dict, all_said: bool
) -> Figure:
    """Draw points with intervals, a row a name and a lane an arm; `rows` has the column `lane`.

    Of several seeds the rows of their mean are shown, else those of the first; models of single
    clients are small circles. Unless all is said, only the top row has its values at the right.
    """
    arms = style.by_arm(rows.reset_index(drop=True))
    height, gap = 0.16, 0.2  # inches, of an arm's lane and of a yardstick's name
    pitch = max(0.26, height * len(arms) + 0.06)
    fig, (ax,) = canvas(heading, title, len(names) * pitch + 1.0 + gap * len(yardsticks))
    for k, (arm, colour, own) in enumerate(arms):
        mean = own[blank(own["seed"])]
        own = mean if len(mean) else own[own["seed"] == own["seed"].min()]
        lane = own["lane"] + (k - (len(arms) - 1) / 2) * height / pitch
        single = ~blank(own["client"])
        ax.plot(own["value"][single], lane[single], "o", ms=4, mfc="none", mec=colour, alpha=0.7)
        name = ("mean local" if arm == "local" else arm) if len(arms) > 1 else ""
        for index, row in own[~single].iterrows():
            few = row.get("few", False)
            shade = style.LIGHT if few else colour
            ax.hlines(lane[index], row["ci_low"], row["ci_high"], color=shade)
            ax.plot(row["value"], lane[index], "o", ms=5.5, color=shade)
            for tick in row.index.intersection(TICKS):
                ax.plot(row[tick], lane[index], "|", ms=9, mew=1.6, color=TICKS[tick])
            if all_said or row["lane"] == 0 or np.isnan(row["value"]):
                text = f"{name} {tables.value_or_why_not(row, **BRACKETS)}".strip()
                style.at_right(ax, lane[index], text, GREY if few else colour)
    style.stripe(ax, range(0, len(names), 2))
    top = _yardsticks(ax, yardsticks, gap / pitch) if yardsticks else 0.5
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -top), xlabel="AUROC (0.5 is chance)")
    return fig


@in_our_style
def subgroup_forest(metrics: pd.DataFrame, title: str = "") -> Figure:
    """Mean AUROC of each subgroup with 95 % intervals, arms side by side; the rest as metrics.csv.

    A tick is the mean over the same findings on all films, to which its own compares. Subgroups
    with under 30 positive labels in all are grey: nothing is to be concluded from them.
    """
    whole = metrics[(metrics["metric"] == "auroc") & blank(metrics["client"])]
    names = [name for name in whole["test_set"].unique() if is_subgroup(name)]
    rows = whole[(whole["finding"] == MEAN) & whole["test_set"].isin(names)]
    labels = whole[whole["finding"] != MEAN].drop_duplicates(["test_set", "finding"])
    positives = labels.groupby("test_set")["positives"].sum()
    few = rows["test_set"].map(positives) < LEAST_POSITIVES
    lane, beside = rows["test_set"].map(names.index), rows.get("on_all_films", np.nan)
    rows = rows.assign(lane=lane, few=few, beside=beside)
    films = rows.drop_duplicates("test_set").set_index("test_set")["n"]
    names = [f"{name} ({films[name]:,} films)" for name in names]
    heading = (
        f"Mean AUROC by subgroup (tick: on all films; grey: under {LEAST_POSITIVES} positives)"
    )
    return _forest(heading, title, rows, names, {}, True)


@in_our_style
def client_matrix(metrics: pd.DataFrame, title: str = "") -> Figure:
    """Mean AUROC of every model (rows) on every client's test films (columns), as metrics.csv.

    A frame marks a local model on the films of its own hospital.
    """
    rows = tables.mean_auroc_rows(metrics)
    rows = rows.loc[blank(rows["seed"]) & rows["test_set"].map(is_client)]
    clients = list(rows["test_set"].unique())
    arm = rows["arm"].replace("local", tables.MEAN_LOCAL)
    rows = rows.assign(model=arm.where(blank(rows["client"]), "local " + rows["client"]))
    models = sorted(rows["model"].unique(), key=lambda name: name.startswith("local "))
    said = [tables.value_or_why_not(row, **BRACKETS) for row in rows.itertuples()]
    rows = rows.assign(said=[text.replace(" ", "\n", 1) for text in said])
    wide = rows.pivot(index="model", columns="test_set").loc[models]
    value, texts, films = (wide[name][clients] for name in ("value", "said", "n"))
    value.columns = [f"{name}\n{films[name].max():,.0f} films" for name in clients]
    heading = "Mean AUROC of each model on each hospital’s films"
    fig, (ax,) = canvas(heading, title, 1.5 + 0.42 * len(models))
    look = {"cbar": False, "vmin": 0.5, "vmax": 1.1}
    style.heat(ax, value.astype(float), texts.to_numpy(), ["white", BLUE], **look)
    for row, model in enumerate(models):
        if (home := model.removeprefix("local ")) in clients:
            frame = {"fill": False, "edgecolor": INK, "linewidth": 2}
            ax.add_patch(plt.Rectangle((clients.index(home), row), 1, 1, **frame))
    return fig


@in_our_style
def difference_forest(differences: pd.DataFrame, title: str = "") -> Figure:
    """Differences of AUROC with 95 % intervals: of the mean for each pair, then by finding.

    `differences` is differences.csv, or that of `compare_runs`; its rows on all films are used.
    Filled: shown. Hollow: no difference shown. Small lines: the training seeds' smallest and
    largest value.
    """
    rows = tables.rows_of(differences, metric="auroc", test_set=tables.ALL_FILMS)
    firsts = list(rows["first"].unique())
    alone, names = len(firsts) == 1, rows["first"] + " − " + rows["second"]
    rows = rows.assign(pair=rows["second"] if alone else names)
    pairs = list(rows["pair"].unique())
    main = [name for name in pairs if not name.startswith("local ")] or pairs
    colours = dict(zip(main, [VERMILION, GREEN, PURPLE, ORANGE] + [INK] * len(main), strict=False))
    lanes = [(MEAN, name, f"mean: {'− ' * alone}{name}") for name in pairs]
    findings = [finding for finding in rows["finding"].unique() if finding != MEAN]
    lanes += [(f, name, f if name == main[0] else "") for f in findings for name in main]
    heading = f"AUROC {f'of {firsts[0]} minus others' if alone else 'between runs'} (filled: shown)"
    fig, (ax,) = canvas(heading, title, 0.2 * len(lanes) + 1.2)
    table = rows.set_index(["finding", "pair"])
    for lane, (finding, name, _) in enumerate(lanes):
        row, colour = table.loc[(finding, name)], colours.get(name, GREY)
        shown = row["verdict"] == tables.SHOWN
        ax.hlines(lane, row["ci_low"], row["ci_high"], color=colour)
        ax.vlines(row[["seed_low", "seed_high"]], lane - 0.3, lane + 0.3, color=colour, lw=0.9)
        ax.plot(row["value"], lane, "o", ms=5.5, mec=colour, mfc=colour if shown else "white")
        said = {tables.SHOWN: " shown", tables.NOT_SHOWN: " not shown"}  # any other was not judged
        verdict = said.get(row["verdict"], " not judged") if finding == MEAN else ""
        text = tables.with_interval(row, "+", **BRACKETS) + verdict
        style.at_right(ax, lane, "not defined" if np.isnan(row["value"]) else text, colour)
    ax.axvline(0, color=INK, linewidth=0.8)
    style.stripe(ax, range(len(pairs), len(lanes), 2 * len(main)), len(main))
    middle, named = (len(main) - 1) / 2, [k for k, lane in enumerate(lanes) if lane[2]]
    ax.set_yticks([k + middle * (k >= len(pairs)) for k in named], [lanes[k][2] for k in named])
    ax.set(ylim=(len(lanes) - 0.5, -0.5), xlabel="AUROC of the first minus that of the other")
    for label, (_, name, _) in zip(ax.get_yticklabels(), lanes[: len(pairs)], strict=False):
        label.set_color(colours.get(name, GREY))
    return fig


@in_our_style
def run_forest(metrics: pd.DataFrame, title: str = "") -> Figure:
    """Mean AUROC of several runs with 95 % intervals, arms side by side.

    `metrics` is that of `compare_runs`: metrics.csv with a first column `run`.
    """
    rows = tables.mean_auroc_rows(metrics)
    runs = list(rows["run"].unique())
    rows = rows.assign(lane=rows["run"].map(runs.index))
    heading = "Mean AUROC by run, 95 % interval over patients"
    return _forest(heading, title, rows, runs, {}, True)
