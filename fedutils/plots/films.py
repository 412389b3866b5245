"""Figures of the films: findings, patients, hospitals."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..base.findings import NO_FINDING, findings_of, no_finding
from . import style
from .style import BLUE, GREEN, GREY, ORANGE, VERMILION, canvas, grid, in_our_style, percent


def _counted(values: pd.Series, totals: float | pd.Series) -> list[str]:
    """Texts such as '2,303  (2.1 %)'."""
    pairs = zip(values, values / totals, strict=True)
    return ["not labelled" if np.isnan(s) else f"{v:,.0f}  ({percent(s, 1)})" for v, s in pairs]


@in_our_style
def prevalence(table: pd.DataFrame, title: str = "") -> Figure:
    """Films by finding, and those without any, with counts and per cent of the labelled films.

    `table` has one row a film and a column of 0, 1 or NaN a finding. A film of a source is without
    any if it has none of those that this source looked for.
    """
    labels = table[findings_of(table)]
    sources = labels.groupby(table.get("source", pd.Series("", labels.index)))
    labels = labels.assign(**{NO_FINDING: pd.concat([no_finding(own) for _, own in sources])})
    counts = labels.sum().sort_values(ascending=False, kind="stable")
    height = max(4.4, 0.5 + 0.26 * len(counts))
    fig, (ax,) = canvas("Films by finding (a film can have several)", title, height)
    colours = [GREY if name == NO_FINDING else BLUE for name in counts.index]
    style.bars(ax, counts, _counted(counts, labels.count()[counts.index]), "films", colours)
    return fig


@in_our_style
def cooccurrence(table: pd.DataFrame, title: str = "") -> Figure:
    """Of the films with the row's finding, per cent that also have the column's; see `prevalence`.

    Rows give their number of films. A pair that no film is labelled for stays grey.
    """
    labels = table[findings_of(table)]
    present, known = (labels == 1).astype(float), labels.notna().astype(float)
    share = (present.T @ present) / (present.T @ known)
    share = share.mask(np.eye(len(share), dtype=bool))
    counts = zip(labels, present.sum(), known.any(), strict=True)
    share.index = [f"{f} ({n:,.0f})" if any_ else f"{f} (not labelled)" for f, n, any_ in counts]
    texts = share.map(lambda value: percent(value)[:-2]).to_numpy()
    fig, (ax,) = canvas(
        "Of the films with the row's finding, % that also have …", title, max(5.6, 0.4 * len(share))
    )
    most = max(0.01, share.max(axis=None))
    style.heat(ax, share, texts, ["white", BLUE], cbar=False, vmin=0, vmax=most)
    return fig


@in_our_style
def films_per_patient(table: pd.DataFrame, title: str = "") -> Figure:
    """Patients, and their films, by number of films a patient; `table` needs `patient_id`."""
    films = table["patient_id"].value_counts()
    names = ["1", "2", "3–5", "6–10", "11–20", "21–50", "51 or more"]
    group = pd.cut(films, [1, 2, 3, 6, 11, 21, 51, np.inf], right=False, labels=names)
    top = films.head(max(1, round(len(films) / 100)))
    share = percent(top.sum() / len(table))
    hold = f"the top 1 % of patients ({len(top):,}) hold {share} of the films"
    fig, axes = canvas(f"Films a patient: {hold}", title, 3.0, columns=2, sharey=True)
    sums = films.groupby(group, observed=False).agg(["size", "sum"])
    for ax, column, unit in zip(axes, sums, ("patients", "films"), strict=True):
        style.bars(ax, sums[column], _counted(sums[column], sums[column].sum()), unit)
    axes[0].set_ylabel("films of one patient")
    return fig


def _pyramid(ax: Axes, table: pd.DataFrame) -> None:
    """Ages of women to the left and of men to the right, in bins of 5 years."""
    edges = np.arange(0, 101, 5)
    shown = table[table["age"].between(0, 100) & table["sex"].isin(["F", "M"])]
    sides = (("F", "women", -1, VERMILION), ("M", "men", 1, BLUE))
    if shown.empty:
        style.note(ax, "no film with\nage and sex")
    for sex, name, sign, colour in sides if len(shown) else ():
        counts, _ = np.histogram(shown.loc[shown["sex"] == sex, "age"], edges)
        ax.barh(edges[:-1], sign * counts, 4.6, align="edge", color=colour)
        text = f"{name} {percent(counts.sum() / len(shown))}"
        place = {"ha": "right" if sign > 0 else "left", "va": "top", "transform": ax.transAxes}
        ax.text(sign * 0.48 + 0.5, 0.98, text, color=colour, **place)
    limit, hidden = max(np.abs(ax.get_xlim()).max(), 1), len(table) - len(shown)
    ax.set(xlim=(-limit, limit), ylim=(0, 112), yticks=range(0, 101, 20), ylabel="age (years)")
    ax.set_xlabel(f"films (not shown: {hidden:,})" if hidden else "films")
    style.whole(ax)


@in_our_style
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
    fig, axes = canvas("Who was filmed, on what", title, height, columns=3, gridspec_kw=ratios)
    _pyramid(axes[0], table)
    style.bars(axes[1], films, map(percent, films / len(table)), "films")
    axes[1].set_ylabel("scanner")
    texts = ["unknown" if np.isnan(view) else percent(view / 100) for view in views]
    style.bars(axes[2], views.fillna(0), texts, "AP views (% of films)", ORANGE)
    axes[2].set(xlim=(0, 125), xticks=(0, 50, 100))
    axes[2].tick_params(labelleft=False)  # the rows of the panel to its left
    return fig


@in_our_style
def finding_grid(
    images: dict[str, np.ndarray], boxes: dict[str, list[tuple]], title: str = ""
) -> Figure:
    """One film for each finding, with the radiologist's boxes.

    `images` maps each finding to a uint8 array (height, width) or None, `boxes` a finding to a
    list of (x, y, w, h) in that array's pixels. A finding without a film is said to have none.
    """
    fig, axes = grid("One film for each finding, boxes where known", title, len(images), 2.0)
    for ax, (finding, film) in zip(axes, images.items(), strict=False):
        style.show_film(ax, film, finding, boxes.get(finding, []))
    return fig


@in_our_style
def film_grid(
    images: Sequence[np.ndarray], titles: Sequence[str], title: str = "", heading: str = "Films"
) -> Figure:
    """Films (uint8 arrays of height, width), or means of films, 5 a row, each under its title."""
    fig, axes = grid(heading, title, len(images), 2.2)
    for ax, image, name in zip(axes, images, titles, strict=False):
        style.show_film(ax, image, name)
    return fig


@in_our_style
def split_overlap(table: pd.DataFrame, title: str = "") -> Figure:
    """Held-out films whose patient is in training too: `split` (a name) and `share` (0..1)."""
    heading = "Held-out films whose patient is also in training"
    fig, (ax,) = canvas(heading, title, 0.9 + 0.4 * len(table))
    shares = table.set_index("split")["share"]
    colours = [GREEN if share == 0 else VERMILION for share in shares]
    style.bars(ax, 100 * shares, map(percent, shares), "% of the held-out films", colours)
    ax.set(xlim=(0, 110), xticks=range(0, 101, 25))
    return fig


@in_our_style
def client_heatmap(report: pd.DataFrame, title: str = "") -> Figure:
    """Share of each finding at each client; the colour compares it with all clients together.

    `report` is indexed by client with `films`, `patients` and a column of shares a finding (0..1,
    or NaN where a client has no labels).
    """
    share, films = report[findings_of(report)].astype(float), report["films"]
    of_all = share.mul(films, axis=0).sum() / share.notna().mul(films, axis=0).sum()
    # No film at any client: 0 of 0 is as expected. No label at this client: grey.
    ratio = np.log2((share / of_all).fillna(1).clip(lower=2**-9)).where(share.notna())
    sizes = report[["films", "patients"]].itertuples()
    ratio.index = [f"{name}\n{films:,} films, {some:,} patients" for name, films, some in sizes]
    heading = "Films with each finding (%), coloured against all clients together"
    fig, (ax,) = canvas(heading, title, 1.9 + 0.4 * len(report))
    ticks = np.log2([1 / 3, 1 / 2, 1, 2, 3])
    bar = {"ticks": ticks, "label": "× all clients", "pad": 0.01}
    look = {"vmin": ticks[0], "vmax": ticks[-1], "cbar_kws": bar}
    form = "%.1f" if share.shape[1] <= 20 else "%.0f"  # more columns leave room for no decimal
    style.heat(ax, ratio, np.char.mod(form, 100 * share), [BLUE, "white", VERMILION], **look)
    ax.collections[0].colorbar.ax.set_yticklabels(["1/3", "1/2", "1", "2", "3"])
    return fig
