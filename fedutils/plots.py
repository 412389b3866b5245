"""Every figure, one look: takes tidy tables, returns a Matplotlib figure, writes no file.

Colours are those of Okabe and Ito ("Color universal design", 2008), safe for colour-blind
readers. Figures are 880 pixels wide, which is GitHub's width, so that no text is scaled down.
In all of them `title` is the name of the data set, put behind the heading.
"""

import functools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib.colors as mcolors
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedutils.calibration import calibration_error, reliability, rescale
from fedutils.explain import ALL, CENTRE, ELSEWHERE, KINDS, UPPER
from fedutils.findings import FINDINGS, NO_FINDING, no_finding
from fedutils.metrics import (
    ALL_FILMS,
    LEAST_POSITIVES,
    MEAN,
    ONE_FILM,
    SHOWN,
    auroc,
    average_precision,
    pr_points,
    roc_points,
    undefined,
)

INK, GREY, PALE = "#222222", "#767676", "#eeeeee"
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
LIGHT = "#bbbbbb"
ORANGE, PURPLE, SKY = "#E69F00", "#CC79A7", "#56B4E9"
ARMS = {"federated": BLUE, "centralised": VERMILION, "local": GREEN}
WIDTH, DPI, FONT = 8.8, 100, 9.5  # inches, pixels an inch, points
STYLE = {
    "figure.dpi": DPI, "figure.facecolor": "white", "figure.titlesize": 12,
    "figure.titleweight": "bold", "figure.labelsize": FONT, "font.size": FONT,
    "axes.labelsize": FONT, "axes.titlesize": FONT, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
    "axes.facecolor": "white", "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "xtick.labelsize": 9, "ytick.labelsize": FONT,
}  # fmt: skip


def _figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in our style, with the global style left alone and nothing left open in pyplot."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        """Draw, then close."""
        with plt.rc_context(STYLE):
            fig = draw(*args, **kwargs)
            fig.draw_without_rendering()  # ticks take their style when first drawn
        plt.close(fig)  # a notebook would show an open figure a second time
        return fig

    return styled


def _canvas(
    heading: str, title: str, height: float, rows: int = 1, columns: int = 1, **grid: Any
) -> tuple[Figure, np.ndarray]:
    """Open a figure of our width with a heading; return it with its axes in reading order."""
    size = (WIDTH, height)
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **grid)
    fig.suptitle(f"{heading} · {title}" if title else heading, x=0.01, ha="left")
    return fig, np.atleast_1d(axes).ravel()


def _grid(heading: str, title: str, count: int, height: float, **grid: Any) -> tuple:
    """Open a figure of `count` panels, 5 a row; return it with its axes, those left over blank."""
    rows = max(1, -(-count // 5))
    fig, axes = _canvas(heading, title, rows * height + 0.5, rows, 5, **grid)
    for ax in axes[count:]:
        ax.axis("off")
    return fig, axes


def _note(ax: Axes, text: str) -> None:
    """Write a grey text in the middle of a panel."""
    ax.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=ax.transAxes)


def _percent(share: float, digits: int = 0) -> str:
    """Write a share of 0..1 as per cent; '<1 %' for little but some, a dash where unknown."""
    least = 10.0**-digits
    if 0 < 100 * share < least / 2:
        return f"<{least:.{digits}f} %"
    return "–" if np.isnan(share) else f"{100 * share:.{digits}f} %"


def _counted(values: pd.Series, totals: float | pd.Series) -> list[str]:
    """Texts such as '2,303  (2.1 %)'."""
    shares = values / totals
    texts = [f"{v:,.0f}  ({_percent(s, 1)})" for v, s in zip(values, shares, strict=True)]
    return ["not labelled" if np.isnan(s) else t for t, s in zip(texts, shares, strict=True)]


def _bars(
    ax: Axes, values: pd.Series, texts: Iterable[str], unit: str, colour: str | list[str] = BLUE
) -> None:
    """Draw horizontal bars from top to bottom, each with its text at its end."""
    bars = ax.barh([str(name) for name in values.index], values, color=colour)
    ax.bar_label(bars, list(texts), padding=4)
    ax.set(xlim=(0, max(values.max(), 1e-9) * 1.3), ylim=(len(values) - 0.5, -0.5), xlabel=unit)
    ax.tick_params(axis="y", length=0)
    _whole(ax)


def _whole(ax: Axes) -> None:
    """Write the x axis as few whole numbers with thousands separators and without a sign."""
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):,.0f}"))


@_figure
def prevalence(table: pd.DataFrame, title: str = "") -> Figure:
    """Films by finding, and those without any, with counts and per cent of the labelled films.

    `table` has one row a film and 14 columns of 0, 1 or NaN named as in FINDINGS.
    """
    labels = table[list(FINDINGS)]
    labels = labels.assign(**{NO_FINDING: no_finding(labels)})
    counts = labels.sum().sort_values(ascending=False, kind="stable")
    known = labels.notna().sum()[counts.index]
    fig, (ax,) = _canvas("Films by finding (a film can have several)", title, 4.4)
    colours = [GREY if name == NO_FINDING else BLUE for name in counts.index]
    _bars(ax, counts, _counted(counts, known.where(known > 0)), "films", colours)
    return fig


def _heat(
    ax: Axes,
    values: np.ndarray,
    texts: np.ndarray,
    rows: list[str],
    columns: Sequence[str] = FINDINGS,
    **style: Any,
) -> None:
    """Draw an annotated heat map, the findings along the x axis if not else; NaN stays grey."""
    ax.set_facecolor(PALE)
    look = {"fmt": "", "linewidths": 1, "linecolor": PALE, "annot_kws": {"size": 9}}
    sns.heatmap(values, annot=texts, ax=ax, **look, **style)
    few = len(columns) < 7
    turn = {} if few else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, **({"rotation": 0} | turn))
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows, rotation=0)
    ax.tick_params(length=0)


@_figure
def cooccurrence(table: pd.DataFrame, title: str = "") -> Figure:
    """Of the films with the row's finding, per cent that also have the column's; see `prevalence`.

    Rows give their number of films. A pair that no film is labelled for stays grey.
    """
    labels = table[list(FINDINGS)].to_numpy(dtype=float)
    present, known = (labels == 1).astype(float), (~np.isnan(labels)).astype(float)
    with np.errstate(invalid="ignore"):
        share = (present.T @ present) / (present.T @ known)
    np.fill_diagonal(share, np.nan)
    texts = np.array([_percent(value)[:-2] for value in share.flat]).reshape(share.shape)
    counts = np.where(known.any(axis=0), present.sum(axis=0), np.nan)
    rows = [
        f"{f} (not labelled)" if np.isnan(n) else f"{f} ({n:,.0f})"
        for f, n in zip(FINDINGS, counts, strict=True)
    ]
    fig, (ax,) = _canvas("Of the films with the row's finding, % that also have …", title, 5.6)
    most = max(0.01, np.nan_to_num(share).max())
    blues = sns.blend_palette(["white", BLUE], as_cmap=True)
    _heat(ax, share, texts, rows, cmap=blues, cbar=False, vmin=0, vmax=most)
    return fig


@_figure
def films_per_patient(table: pd.DataFrame, title: str = "") -> Figure:
    """Patients, and their films, by number of films a patient; `table` needs `patient_id`."""
    films = table["patient_id"].value_counts()
    names = ["1", "2", "3–5", "6–10", "11–20", "21–50", "51 or more"]
    group = pd.cut(films, [1, 2, 3, 6, 11, 21, 51, np.inf], right=False, labels=names)
    top = films.head(max(1, round(len(films) / 100)))
    share = _percent(top.sum() / len(table))
    hold = f"the top 1 % of patients ({len(top):,}) hold {share} of the films"
    fig, axes = _canvas(f"Films a patient: {hold}", title, 3.0, columns=2, sharey=True)
    sums = films.groupby(group, observed=False).agg(["size", "sum"])
    for ax, column, unit in zip(axes, sums, ("patients", "films"), strict=True):
        _bars(ax, sums[column], _counted(sums[column], sums[column].sum()), unit)
    axes[0].set_ylabel("films of one patient")
    return fig


def _pyramid(ax: Axes, table: pd.DataFrame) -> None:
    """Ages of women to the left and of men to the right, in bins of 5 years."""
    edges = np.arange(0, 101, 5)
    shown = table[table["age"].between(0, 100) & table["sex"].isin(["F", "M"])]
    sides = (("F", "women", -1, VERMILION), ("M", "men", 1, BLUE))
    if shown.empty:
        _note(ax, "no film with\nage and sex")
    for sex, name, sign, colour in sides if len(shown) else ():
        counts, _ = np.histogram(shown.loc[shown["sex"] == sex, "age"], edges)
        ax.barh(edges[:-1], sign * counts, 4.6, align="edge", color=colour)
        text = f"{name} {_percent(counts.sum() / len(shown))}"
        place = {"ha": "right" if sign > 0 else "left", "va": "top", "transform": ax.transAxes}
        ax.text(sign * 0.48 + 0.5, 0.98, text, color=colour, **place)
    limit, hidden = max(np.abs(ax.get_xlim()).max(), 1), len(table) - len(shown)
    ax.set(xlim=(-limit, limit), ylim=(0, 112), yticks=range(0, 101, 20), ylabel="age (years)")
    ax.set_xlabel(f"films (not shown: {hidden:,})" if hidden else "films")
    _whole(ax)


@_figure
def demographics(table: pd.DataFrame, title: str = "") -> Figure:
    """Age by sex, films by scanner, and view position by scanner, in three panels.

    `table` has one row a film with `age` (years), `sex` (F, M), `scanner` and `view` (AP, PA).
    Films without a sex or an age of 0 to 100 are counted below the first panel, an unknown view
    is not counted, and a scanner without name or view is said to be unknown.
    """
    scanner = table["scanner"].astype(str).replace("", "unknown")
    films = scanner.value_counts()
    known = table["view"].eq("AP").where(table["view"] != "").astype(float)
    views = 100 * known.groupby(scanner).mean()[films.index]
    height = max(3.4, 1 + 0.23 * len(films))
    ratios = {"width_ratios": [1.25, 1, 1]}
    fig, axes = _canvas("Who was filmed, on what", title, height, columns=3, gridspec_kw=ratios)
    _pyramid(axes[0], table)
    _bars(axes[1], films, map(_percent, films / len(table)), "films")
    axes[1].set_ylabel("scanner")
    texts = ["unknown" if np.isnan(view) else _percent(view / 100) for view in views]
    _bars(axes[2], views.fillna(0), texts, "AP views (% of films)", ORANGE)
    axes[2].set(xlim=(0, 125), xticks=(0, 50, 100))
    axes[2].tick_params(labelleft=False)  # the rows of the panel to its left
    return fig


def _film(ax: Axes, image: np.ndarray | None, title: str, boxes: Sequence[tuple] = ()) -> None:
    """Show one film with its title and boxes, or say that there is none."""
    ax.set(xticks=[], yticks=[], aspect="equal", facecolor=PALE)
    ax.spines[:].set_visible(False)
    ax.set_title(textwrap.fill(title, 24), loc="center")
    if image is None:
        return _note(ax, "no film")
    ax.imshow(image, cmap="gray", vmin=0, vmax=255)
    for x, y, width, height in boxes:
        box = {"fill": False, "edgecolor": ORANGE, "linewidth": 1.8}
        ax.add_patch(plt.Rectangle((x, y), width, height, **box))


@_figure
def finding_grid(
    images: dict[str, np.ndarray], boxes: dict[str, list[tuple]], title: str = ""
) -> Figure:
    """One film for each of the 14 findings, with the radiologist's boxes.

    `images` maps a finding to a uint8 array (height, width), `boxes` a finding to a list of
    (x, y, w, h) in that array's pixels. A finding without a film is said to have none.
    """
    fig, axes = _grid("One film for each finding, boxes where known", title, len(FINDINGS), 2.0)
    for ax, finding in zip(axes, FINDINGS, strict=False):
        _film(ax, images.get(finding), finding, boxes.get(finding, []))
    return fig


@_figure
def film_grid(images: Sequence[np.ndarray], titles: Sequence[str], title: str = "") -> Figure:
    """Films (uint8 arrays of height, width), 5 a row, each under its title."""
    fig, axes = _grid("Films", title, len(images), 2.2)
    for ax, image, name in zip(axes, images, titles, strict=False):
        _film(ax, image, name)
    return fig


@_figure
def split_overlap(table: pd.DataFrame, title: str = "") -> Figure:
    """Held-out films whose patient is in training too: `split` (a name) and `share` (0..1)."""
    heading = "Held-out films whose patient is also in training"
    fig, (ax,) = _canvas(heading, title, 0.9 + 0.4 * len(table))
    shares = table.set_index("split")["share"]
    colours = [GREEN if share == 0 else VERMILION for share in shares]
    _bars(ax, 100 * shares, map(_percent, shares), "% of the held-out films", colours)
    ax.set(xlim=(0, 110), xticks=range(0, 101, 25))
    return fig


@_figure
def client_heatmap(report: pd.DataFrame, title: str = "") -> Figure:
    """Share of each finding at each client; the colour compares it with all clients together.

    `report` is indexed by client with `films`, `patients` and 14 columns of shares (0..1, or
    NaN where a client has no labels).
    """
    share = report[list(FINDINGS)].to_numpy(dtype=float)
    known = ~np.isnan(share) * report[["films"]].to_numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.log2(share / (np.nansum(share * known, axis=0) / known.sum(axis=0)))
    # No film at any client: 0 of 0 is as expected. No label at this client: grey.
    ratio = np.where(np.isnan(share), np.nan, np.nan_to_num(ratio, neginf=-9))
    texts = np.char.mod("%.1f", 100 * share)
    sizes = report[["films", "patients"]].itertuples()
    names = [
        f"{client}\n{films:,} films, {patients:,} patients" for client, films, patients in sizes
    ]
    heading = "Films with each finding (%), coloured against all clients together"
    fig, (ax,) = _canvas(heading, title, 1.9 + 0.4 * len(report))
    ticks = np.log2([1 / 3, 1 / 2, 1, 2, 3])
    bar = {"ticks": ticks, "label": "× all clients", "pad": 0.01}
    cmap = sns.blend_palette([BLUE, "white", VERMILION], as_cmap=True)
    _heat(ax, ratio, texts, names, cmap=cmap, vmin=ticks[0], vmax=ticks[-1], cbar_kws=bar)
    ax.collections[0].colorbar.ax.set_yticklabels(["1/3", "1/2", "1", "2", "3"])
    return fig


def _blank(column: pd.Series) -> pd.Series:
    """Where a column of a history or metrics table is empty: NaN, or '' before it was saved."""
    return column.isna() | (column.astype(str) == "")


def _by_arm(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Each arm with its colour, the same in every figure, and its rows."""
    spare = iter([PURPLE, ORANGE, SKY] + [INK] * len(table))
    arms = [(arm, ARMS.get(arm) or next(spare)) for arm in table["arm"].unique()]
    return [(arm, colour, table[table["arm"] == arm]) for arm, colour in arms]


def _spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Move rising positions apart to at least `gap`, up and down alike."""
    steps = gap * np.arange(len(wanted))
    up = np.maximum.accumulate(wanted - steps) + steps
    down = np.minimum.accumulate((wanted - steps)[::-1])[::-1] + steps
    return (up + down) / 2


def _end_labels(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Name each line (x, y, text, colour) beside its end, without overlap."""
    if not ends:
        return _note(ax, "not defined")
    ends = sorted(ends, key=lambda end: end[1])
    ax.figure.draw_without_rendering()
    lines = max(text.count("\n") + 1 for *_, text, _ in ends)
    gap = (1.35 * lines + 0.3) * FONT * DPI / 72 / ax.get_window_extent().height
    points = ax.transData.transform([end[:2] for end in ends])
    heights = _spread(ax.transAxes.inverted().transform(points)[:, 1], gap)
    thread = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": 3, "relpos": (0, 0.5)}
    for (x, y, text, colour), height in zip(ends, heights, strict=True):
        place = {"xytext": (1.05, height), "textcoords": "axes fraction", "va": "center"}
        ax.annotate(text, (x, y), color=colour, arrowprops=thread, **place)


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


def _loss_panel(ax: Axes, arms: list[tuple[str, str, pd.DataFrame]]) -> None:
    """Training loss dashed and validation loss solid, named at the lines' ends."""
    ends = []
    lone = len(arms) == 1
    for arm, colour, rows in arms:
        training = _runs(ax, rows, "train_loss", colour, "--")
        validation = _runs(ax, rows, "val_loss", colour)
        named = {"training": training, "validation": validation} if lone else {arm: validation}
        for text, mean in named.items():
            ends += [(mean.index[-1], mean.iloc[-1], text, colour)] if len(mean) else []
    ax.set_title("Loss (solid: validation, dashed: training)")
    _end_labels(ax, ends)


def _auroc_panel(ax: Axes, arms: list[tuple[str, str, pd.DataFrame]]) -> None:
    """Mean AUROC on validation; a circle marks the best round."""
    ends = []
    for arm, colour, rows in arms:
        mean = _runs(ax, rows, "val_auroc", colour)
        if len(mean):
            best = mean.idxmax()
            ring = {"mfc": "white", "mec": colour, "mew": 2, "clip_on": False, "zorder": 3}
            ax.plot(best, mean[best], "o", markersize=8, **ring)
            text = f"{arm}\nbest {mean[best]:.3f}, round {best}"
            ends.append((mean.index[-1], mean.iloc[-1], text, colour))
    ax.set_title("Validation AUROC (circle: best round)")
    _end_labels(ax, ends)


@_figure
def learning_curves(history: pd.DataFrame, title: str = "") -> Figure:
    """Loss by round, and validation AUROC of the aggregated model, for each arm.

    `history` holds rows `arm, seed, round, client, train_loss, val_loss, val_auroc, ...`; those
    without a client describe the aggregated model, in the arm `local` each client's row its own
    model. Several seeds or local models: thin lines, and their mean thick.
    """
    models = history[_blank(history["client"]) | (history["arm"] == "local")]
    first, last = models["round"].min(), models["round"].max()
    margin = 0.5 if first == last else 0
    several = models.groupby(["arm", "round"]).size().max() > 1
    heading = "Learning curves" + (" (thin: each seed or client, thick: mean)" if several else "")
    fig, axes = _canvas(heading, title, 3.6, columns=2)
    for ax in axes:
        ax.set(xlim=(first - margin, last + margin), xlabel="round")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    _loss_panel(axes[0], _by_arm(models))
    _auroc_panel(axes[1], _by_arm(models))
    return fig


def _curve_panels(
    truth: np.ndarray, probability: np.ndarray, title: str, draw: Callable[..., str], words: tuple
) -> Figure:
    """Let `draw` draw the curve of each finding and return what is said below its name.

    `words` are the heading, the names of the axes, and a note on how to read the panels.
    """
    heading, x, y, note = words
    fig, axes = _grid(heading, title, len(FINDINGS), 1.95, sharex=True, sharey=True)
    fig.supxlabel(x)
    fig.supylabel(y)
    truth, probability = np.asarray(truth, dtype=float), np.asarray(probability, dtype=float)
    for ax, finding, labels, scores in zip(axes, FINDINGS, truth.T, probability.T, strict=False):
        text = draw(ax, labels, scores)
        if not ax.lines:
            _note(ax, text.replace(" (", "\n("))
        ax.set_title(f"{finding}\n{text if ax.lines else ''}")
    ticks = (0, 0.5, 1)
    axes[0].set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=ticks, yticks=ticks)
    axes[len(FINDINGS) - 5].tick_params(labelbottom=True)  # the panel above the blank one
    _note(axes[-1], note)
    return fig


def _roc(ax: Axes, labels: np.ndarray, scores: np.ndarray) -> str:
    """Draw one ROC curve over the diagonal, which is chance."""
    value = auroc(labels, scores)
    if np.isnan(value):
        return undefined(np.nansum(labels), np.count_nonzero(~np.isnan(labels)))
    ax.plot([0, 1], [0, 1], ":", color=GREY)
    ax.plot(*roc_points(labels, scores), color=BLUE)
    return f"AUROC {value:.2f}"


def _pr(ax: Axes, labels: np.ndarray, scores: np.ndarray) -> str:
    """Draw one precision-recall curve over the prevalence, which is chance."""
    value = average_precision(labels, scores)
    if np.isnan(value):
        return undefined(np.nansum(labels), np.count_nonzero(~np.isnan(labels)))
    chance = np.nanmean(labels)
    ax.plot([0, 1], [chance, chance], ":", color=GREY)
    ax.plot(*pr_points(labels, scores), color=BLUE, drawstyle="steps-post")
    return f"AP {value:.2f} (chance {chance:.3f})"


@_figure
def roc_curves(truth: np.ndarray, probability: np.ndarray, title: str = "") -> Figure:
    """ROC curve of each finding, for truth (n, 14) of 0, 1 or NaN and probability (n, 14)."""
    words = ("ROC curves", "1 − specificity", "sensitivity", "dotted:\na model that\nguesses")
    return _curve_panels(truth, probability, title, _roc, words)


@_figure
def pr_curves(truth: np.ndarray, probability: np.ndarray, title: str = "") -> Figure:
    """Precision-recall curve of each finding over its prevalence; arguments as `roc_curves`."""
    note = "dotted:\nthe prevalence,\nwhich a model that\nguesses reaches"
    words = ("Precision-recall curves", "recall (sensitivity)", "precision", note)
    return _curve_panels(truth, probability, title, _pr, words)


def _with_interval(row: pd.Series) -> str:
    """Text such as '0.712 [0.690, 0.734]', or why there is no value."""
    if np.isnan(row["value"]):
        mean = row["finding"] == MEAN
        return "not defined" if mean else undefined(row["positives"], row["n"])
    low, high = row["ci_low"], row["ci_high"]
    return f"{row['value']:.3f}" + ("" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")


def _forest_arm(
    ax: Axes, rows: pd.DataFrame, shift: float, colour: str, name: str, all_said: bool = False
) -> None:
    """Draw one arm in its lane of each row (`lane`), its mean written at the right, or every value.

    Models of single clients are small circles without an interval.
    """
    lane, single = rows["lane"] + shift, ~_blank(rows["client"])
    ax.plot(rows["value"][single], lane[single], "o", ms=4, mfc="none", mec=colour, alpha=0.7)
    for index, row in rows[~single].iterrows():
        shade = LIGHT if row.get("few", False) else colour
        ax.hlines(lane[index], row["ci_low"], row["ci_high"], color=shade)
        ax.plot(row["value"], lane[index], "o", ms=5.5, color=shade)
        if all_said or row["lane"] == 0 or np.isnan(row["value"]):
            text = f"{name} {_with_interval(row)}".strip()
            place = {"va": "center", "transform": ax.get_yaxis_transform(), "fontsize": 9}
            ax.text(
                1.01, lane[index], text, color=GREY if row.get("few", False) else colour, **place
            )


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


@_figure
def auroc_forest(
    metrics: pd.DataFrame, yardsticks: dict[str, float] | None = None, title: str = ""
) -> Figure:
    """AUROC by finding with 95 % intervals, arms side by side, the mean on top.

    `metrics` is metrics.csv: `arm, seed, client, test_set, finding, metric, value, ci_low,
    ci_high, n, positives`. Shown are the rows of the test set `all`, of the mean over seeds
    (else of the first seed). `yardsticks` are published means, right only for that test set.
    """
    whole = metrics[(metrics["metric"] == "auroc") & (metrics["test_set"] == ALL_FILMS)]
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
    arms = _by_arm(rows.reset_index(drop=True))
    height, gap = 0.16, 0.2  # inches, of an arm's lane and of a yardstick's name
    pitch = max(0.26, height * len(arms) + 0.06)
    size = len(names) * pitch + 1.0 + gap * len(yardsticks or {})
    fig, (ax,) = _canvas(heading, title, size)
    for k, (arm, colour, own) in enumerate(arms):
        mean = own[_blank(own["seed"])]
        own = mean if len(mean) else own[own["seed"] == own["seed"].min()]
        shift = (k - (len(arms) - 1) / 2) * height / pitch
        name = ("mean local" if arm == "local" else arm) if len(arms) > 1 else ""
        _forest_arm(ax, own, shift, colour, name, all_said)
    for row in range(0, len(names), 2):
        ax.axhspan(row - 0.5, row + 0.5, color=PALE, zorder=0, linewidth=0)
    top = _yardsticks(ax, yardsticks, gap / pitch) if yardsticks else 0.5
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -top), xlabel="AUROC (0.5 is chance)")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    return fig


@_figure
def subgroup_forest(metrics: pd.DataFrame, title: str = "") -> Figure:
    """Mean AUROC of each subgroup with 95 % intervals, arms side by side; the rest as metrics.csv.

    Subgroups with under 30 positive labels in all are grey: nothing is to be concluded from them.
    """
    whole = metrics[(metrics["metric"] == "auroc") & _blank(metrics["client"])]
    names = [n for n in whole["test_set"].unique() if n in (ALL_FILMS, ONE_FILM) or "=" in n]
    rows = whole[(whole["finding"] == MEAN) & whole["test_set"].isin(names)]
    labels = whole[whole["finding"] != MEAN].drop_duplicates(["test_set", "finding"])
    positives = labels.groupby("test_set")["positives"].sum()
    rows = rows.assign(
        lane=rows["test_set"].map(names.index),
        few=rows["test_set"].map(positives) < LEAST_POSITIVES,
    )
    films = rows.drop_duplicates("test_set").set_index("test_set")["n"]
    names = [f"{name} ({films[name]:,} films)" for name in names]
    heading = f"Mean AUROC by subgroup (grey: under {LEAST_POSITIVES} positives)"
    return _forest(heading, title, rows, names)


@_figure
def subgroup_heatmap(metrics: pd.DataFrame, title: str = "") -> Figure:
    """AUROC of the first arm by subgroup and finding; grey where there are under 30 positives."""
    rows = metrics[(metrics["metric"] == "auroc") & (metrics["finding"] != MEAN)]
    arm = rows["arm"].iloc[0]
    rows = rows[(rows["arm"] == arm) & _blank(rows["seed"]) & _blank(rows["client"])]
    names = [n for n in rows["test_set"].unique() if n in (ALL_FILMS, ONE_FILM) or "=" in n]
    wide = rows.pivot(index="test_set", columns="finding", values=["value", "positives"])
    value = wide["value"].loc[names, list(FINDINGS)].to_numpy(dtype=float)
    count = wide["positives"].loc[names, list(FINDINGS)].to_numpy(dtype=float)
    texts = np.where(np.isnan(value), "–", np.char.mod("%.2f", np.nan_to_num(value)))
    heading = f"AUROC by subgroup, {arm} (grey: under {LEAST_POSITIVES} positives)"
    fig, (ax,) = _canvas(heading, title, 1.9 + 0.28 * len(names))
    cmap = sns.blend_palette([VERMILION, "white", BLUE], as_cmap=True)
    shown = np.where(count < LEAST_POSITIVES, np.nan, value)
    _heat(ax, shown, texts, names, cmap=cmap, vmin=0, vmax=1, cbar=False)
    for (row, column), text in np.ndenumerate(texts):
        if np.isnan(shown[row, column]):
            ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", size=9, color=GREY)
    return fig


@_figure
def client_matrix(metrics: pd.DataFrame, title: str = "") -> Figure:
    """Mean AUROC of every model (rows) on every client's test films (columns), as metrics.csv.

    A frame marks a local model on the films of its own hospital.
    """
    rows = metrics[(metrics["metric"] == "auroc") & (metrics["finding"] == MEAN)]
    rows = rows[_blank(rows["seed"]) & ~rows["test_set"].isin([ALL_FILMS, ONE_FILM])]
    rows = rows[~rows["test_set"].str.contains("=")]
    clients = list(rows["test_set"].unique())
    arm = rows["arm"].replace("local", "mean local model")
    rows = rows.assign(model=arm.where(_blank(rows["client"]), "local " + rows["client"]))
    models = sorted(rows["model"].unique(), key=lambda name: name.startswith("local "))
    wide = rows.set_index(["model", "test_set"]).reindex(
        pd.MultiIndex.from_product([models, clients])
    )
    texts = np.array([_with_interval(row).replace(" ", "\n", 1) for _, row in wide.iterrows()])
    shape = len(models), len(clients)
    fig, (ax,) = _canvas(
        "Mean AUROC of each model on each hospital’s films", title, 1.5 + 0.42 * len(models)
    )
    cmap = sns.blend_palette(["white", BLUE], as_cmap=True)
    value = wide["value"].to_numpy(dtype=float).reshape(shape)
    look = {"cmap": cmap, "cbar": False, "vmin": 0.5, "vmax": 1.1}
    films = wide["n"].groupby(level=1).max()
    columns = [f"{name}\n{films[name]:,.0f} films" for name in clients]
    _heat(ax, value, texts.reshape(shape), models, columns, **look)
    for row, model in enumerate(models):
        if model.removeprefix("local ") in clients:
            place = clients.index(model.removeprefix("local ")), row
            ax.add_patch(plt.Rectangle(place, 1, 1, fill=False, edgecolor=INK, linewidth=2))
    return fig


@_figure
def difference_forest(differences: pd.DataFrame, title: str = "") -> Figure:
    """Differences of AUROC with 95 % intervals: of the mean for each pair, then by finding.

    `differences` is differences.csv; used are its rows on all test films. Filled: shown. Hollow: no
    difference shown. Small lines: the training seeds' smallest and largest value.
    """
    rows = differences[(differences["metric"] == "auroc") & (differences["test_set"] == ALL_FILMS)]
    first, pairs = rows["first"].iloc[0], list(rows["second"].unique())
    main = [name for name in pairs if not name.startswith("local ")] or pairs
    colours = dict(zip(main, [VERMILION, GREEN, PURPLE, ORANGE] + [INK] * len(main), strict=False))
    lanes = [(MEAN, name, f"mean: − {name}") for name in pairs]
    lanes += [(f, name, f if name == main[0] else "") for f in FINDINGS for name in main]
    size = 0.2 * len(lanes) + 1.2
    heading = f"AUROC of {first} minus others (filled: shown)"
    fig, (ax,) = _canvas(heading, title, size)
    table = rows.set_index(["finding", "second"])
    for lane, (finding, name, _) in enumerate(lanes):
        _difference(ax, table.loc[(finding, name)], lane, colours.get(name, GREY), finding == MEAN)
    ax.axvline(0, color=INK, linewidth=0.8)
    for start in range(len(pairs), len(lanes), 2 * len(main)):
        ax.axhspan(start - 0.5, start + len(main) - 0.5, color=PALE, zorder=0, linewidth=0)
    places = [
        k + (len(main) - 1) / 2 * (k >= len(pairs)) for k, lane in enumerate(lanes) if lane[2]
    ]
    ax.set_yticks(places, [text for *_, text in lanes if text])
    ax.set(ylim=(len(lanes) - 0.5, -0.5), xlabel=f"AUROC of {first} minus that of the other model")
    ax.tick_params(axis="y", length=0)
    for label, (_, name, _) in zip(ax.get_yticklabels(), lanes[: len(pairs)], strict=False):
        label.set_color(colours.get(name, GREY))
    ax.spines["left"].set_visible(False)
    return fig


def _reliability(ax: Axes, truth: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
    """Draw observed shares against predictions of all findings, the area of a dot its films."""
    ax.plot([0, 1], [0, 1], ":", color=GREY)
    for scores, colour, face in ((before, GREY, "none"), (after, BLUE, BLUE)):
        bins = reliability(truth, scores)
        area = 12 + 150 * bins["films"] / max(bins["films"].sum(), 1)
        ax.plot(bins["predicted"], bins["observed"], color=colour, linewidth=1.2)
        ax.scatter(bins["predicted"], bins["observed"], area, face, edgecolors=colour, zorder=3)
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    ax.set(xlabel="predicted probability", ylabel="share with the finding")


@_figure
def reliability_diagram(
    truth: np.ndarray, probability: np.ndarray, temperature: float, title: str = ""
) -> Figure:
    """Reliability of all findings together, and calibration error by finding, before and after.

    `truth` (n, 14) holds 0, 1 or NaN, `probability` is (n, 14); `temperature` was fitted on
    validation. Grey is the model as trained, blue the model after temperature scaling.
    """
    scaled = rescale(probability, temperature)
    fig, axes = _canvas("Calibration", title, 4.3, columns=2)
    _reliability(axes[0], truth, probability, scaled)
    axes[0].set_title("All findings, 15 bins (dotted: calibrated)")
    axes[1].set_title(f"By finding (grey: as trained, blue: temperature {temperature:.2f})")
    ax, rows = axes[1], np.arange(len(FINDINGS))
    before, after = (
        np.array([calibration_error(*pair) for pair in zip(truth.T, scores.T, strict=True)])
        for scores in (np.asarray(probability), scaled)
    )
    ax.hlines(rows, before, after, color=GREY, linewidth=1)
    ax.plot(before, rows, "o", mfc="white", mec=GREY)
    ax.plot(after, rows, "o", color=BLUE)
    for row in rows[np.isnan(after)]:
        ax.text(0.02, row, "no labels", color=GREY, va="center", transform=ax.get_yaxis_transform())
    ax.set_yticks(rows, FINDINGS)
    most = np.nanmax([*before, *after, 0.01])
    ax.set(xlim=(0, 1.08 * most), ylim=(len(rows) - 0.5, -0.5), xlabel="expected calibration error")
    ax.tick_params(axis="y", length=0)
    return fig


@_figure
def pointing(table: pd.DataFrame, title: str = "") -> Figure:
    """Share of films whose hottest point lies in a box, beside points placed without a look.

    `table` is pointing.csv: `method, arm, client, finding, hits, n, value, ci_low, ci_high`. Bars
    are Wilson's 95 % intervals; a tick is what one point reaches that was fitted on these boxes.
    """
    names = [ALL, *(f for f in FINDINGS if f in set(table["finding"]))]
    lanes = [(arm, colour, rows) for arm, colour, rows in _by_arm(table.dropna(subset=["arm"]))]
    for method, colour in ((CENTRE, INK), (ELSEWHERE, GREY)):
        lanes.append((method, colour, table[table["method"] == method]))
    lane = 0.17  # inches
    pitch = lane * len(lanes) + 0.12
    fig, (ax,) = _canvas("Pointing game, 95 % interval", title, 1.2 + pitch * len(names))
    for k, (name, colour, rows) in enumerate(lanes):
        shift = (k - (len(lanes) - 1) / 2) * lane / pitch
        y = rows["finding"].map(names.index) + shift
        ax.hlines(y, rows["ci_low"], rows["ci_high"], color=colour)
        ax.plot(rows["value"], y, "o", ms=5, color=colour)
        for at, row in zip(y, rows.itertuples(), strict=True):
            text = f"{row.hits:.0f} of {row.n:.0f}" + (f"  {name}" if row.finding == ALL else "")
            place = {"va": "center", "transform": ax.get_yaxis_transform(), "fontsize": 9}
            ax.text(1.01, at, text, color=colour, **place)
    bound = table[table["method"] == UPPER]
    y, shift = bound["finding"].map(names.index), (len(lanes) - 1) / 2 * lane / pitch
    ax.vlines(bound["value"], y + shift - 0.1, y + shift + 0.1, color=ORANGE, linewidth=2.5)
    for row in range(0, len(names), 2):
        ax.axhspan(row - 0.5, row + 0.5, color=PALE, zorder=0, linewidth=0)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5))
    ax.set_xlabel("share of points in a box (orange tick: a fixed point fitted on these films)")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    return fig


def _difference(ax: Axes, row: pd.Series, lane: float, colour: str, said: bool) -> None:
    """Draw one difference with its interval and the range of its seeds."""
    shown = row["verdict"] == SHOWN
    ax.hlines(lane, row["ci_low"], row["ci_high"], color=colour)
    ax.vlines([row["seed_low"], row["seed_high"]], lane - 0.3, lane + 0.3, color=colour, lw=0.9)
    ax.plot(row["value"], lane, "o", ms=5.5, mec=colour, mfc=colour if shown else "white")
    text = "not defined"
    if not np.isnan(row["value"]):
        text = f"{row['value']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
        text += (" shown" if shown else " not shown") if said else ""
    place = {"va": "center", "transform": ax.get_yaxis_transform(), "fontsize": 9}
    ax.text(1.01, lane, text, color=colour, **place)


@_figure
def cost_curves(cost: pd.DataFrame, title: str = "") -> Figure:
    """Validation AUROC against gigabytes sent and against films seen, for each arm.

    `cost` has columns `arm, seed, round, films_seen, gigabytes, val_auroc`. An arm that sends
    nothing is a dotted line at its best AUROC in the left panel.
    """
    fig, axes = _canvas("What the AUROC on validation films costs", title, 3.6, columns=2)
    units = {"gigabytes": "gigabytes of model states sent", "films_seen": "films trained on"}
    for ax, (column, unit) in zip(axes, units.items(), strict=True):
        ends = []
        for arm, colour, rows in _by_arm(cost):
            mean = rows.groupby("round")[[column, "val_auroc"]].mean().dropna()
            name = "mean local" if arm == "local" else arm
            if mean.empty:
                continue
            if column == "gigabytes" and not mean[column].any():
                best = mean["val_auroc"].max()
                ax.axhline(best, color=colour, linestyle=":")
                ends.append((1.0, best, f"{name}\nsends nothing", colour))
                continue
            ax.plot(mean[column], mean["val_auroc"], "o-", color=colour, ms=4)
            ends.append((*mean.iloc[-1], name, colour))
        ax.set(xlabel=unit, xlim=(0, None))
        right = ax.get_xlim()[1]
        _end_labels(ax, [(right if e[2].endswith("nothing") else e[0], *e[1:]) for e in ends])
    axes[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes[0].set_ylabel("AUROC, validation")
    return fig


@_figure
def run_forest(metrics: pd.DataFrame, title: str = "") -> Figure:
    """Mean AUROC of several runs with 95 % intervals, arms side by side.

    `metrics` is that of `compare_runs`: metrics.csv with a first column `run`.
    """
    rows = metrics[(metrics["metric"] == "auroc") & (metrics["finding"] == MEAN)]
    runs = list(rows["run"].unique())
    rows = rows.assign(lane=rows["run"].map(runs.index))
    return _forest("Mean AUROC by run, 95 % interval over patients", title, rows, runs)


def _gallery_panel(ax: Axes, panel: dict[str, Any]) -> None:
    """Show one film of the gallery with its heat map and boxes."""
    _film(ax, panel["film"], "", panel["boxes"])
    if panel["heat"] is not None:
        side = panel["film"].shape[0]
        heat = panel["heat"] / max(panel["heat"].max(), 1e-12)
        paint = mcolors.LinearSegmentedColormap.from_list("heat", [SKY + "00", SKY + "c8"])
        look = {"cmap": paint, "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
        ax.imshow(heat, extent=(-0.5, side - 0.5, side - 0.5, -0.5), **look)
    p = panel["probability"]
    score = "" if p is None else " <0.01" if p < 0.005 else f" {p:.2f}"
    ax.set_title(panel["kind"] + score, fontsize=9, loc="center", pad=3)


@_figure
def gallery(panels: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """Three films for each finding, with probability, heat map and boxes; two findings a row.

    `panels` is what `explain.fill_gallery` returns, in its order: `finding, kind, probability,
    film, boxes, heat`.
    """
    count = len(panels) // len(KINDS)
    fig = plt.figure(figsize=(WIDTH, 0.5 + 1.95 * -(-count // 2)), layout="constrained")
    fig.suptitle(f"Most confident, right and wrong · {title}".rstrip(" ·"), x=0.01, ha="left")
    groups = np.ravel(fig.subfigures(-(-count // 2), 2, wspace=0.03))
    for k, group in enumerate(groups[:count]):
        own = panels[k * len(KINDS) : (k + 1) * len(KINDS)]
        group.suptitle(own[0]["finding"], fontsize=10.5, x=0.01, ha="left")
        for ax, panel in zip(group.subplots(1, len(KINDS)), own, strict=True):
            _gallery_panel(ax, panel)
    return fig
