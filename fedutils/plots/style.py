"""One look for every figure: size, colours, axes, and the marks that several figures share.

Colours are those of Okabe and Ito ("Color universal design", 2008), safe for colour-blind
readers. Figures are 880 pixels wide, which is GitHub's width, so that no text is scaled down.
In all of them `title` is the name of the data set, put behind the heading.
"""

import functools
import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, GREY, LIGHT, PALE = "#222222", "#767676", "#bbbbbb", "#eeeeee"
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
ORANGE, PURPLE, SKY = "#E69F00", "#CC79A7", "#56B4E9"
ARMS = {"federated": BLUE, "centralised": VERMILION, "local": GREEN}
WIDTH = 8.8  # inches
LETTERS = 88  # of a heading in that width
STYLE = Path(__file__).with_suffix(".mplstyle")


def in_our_style(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in our style, with the global style left alone and nothing left open in pyplot."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        """Draw, then close."""
        with plt.style.context(STYLE):
            fig = draw(*args, **kwargs)
            fig.draw_without_rendering()  # ticks take their style when first drawn
        fig._repr_png_ = functools.partial(_png, fig)
        plt.close(fig)  # a notebook would show an open figure a second time
        return fig

    return styled


def _png(figure: Figure) -> bytes:
    """Return a figure as a notebook shows it, for one whose Matplotlib has no inline backend."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    return picture.getvalue()


def save(figure: Figure, path: Path) -> Image:
    """Write a figure to a PNG file, and return that for the notebook to show: drawn but once."""
    figure.savefig(path)
    return Image(filename=str(path))


def canvas(
    heading: str, title: str, height: float, rows: int = 1, columns: int = 1, **grid: Any
) -> tuple[Figure, np.ndarray]:
    """Open a figure of our width with a heading; return it with its axes in reading order.

    A long heading, such as one that names five data sets, goes on in lines of its own.
    """
    lines = textwrap.wrap(f"{heading} · {title}" if title else heading, LETTERS)
    size = (WIDTH, height + 0.2 * (len(lines) - 1))
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **grid)
    fig.suptitle("\n".join(lines), x=0.01, ha="left")
    return fig, np.atleast_1d(axes).ravel()


def grid(heading: str, title: str, count: int, height: float, **grid: Any) -> tuple:
    """Open a figure of `count` panels, 5 a row; return it with its axes, those left over blank."""
    rows = max(1, -(-count // 5))
    fig, axes = canvas(heading, title, rows * height + 0.5, rows, 5, **grid)
    for ax in axes[count:]:
        ax.axis("off")
    return fig, axes


def note(ax: Axes, text: str) -> None:
    """Write a grey text in the middle of a panel."""
    ax.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=ax.transAxes)


def at_right(ax: Axes, height: float, text: str, colour: str) -> None:
    """Write a text beside the right edge, at a height as the y axis counts."""
    place = {"va": "center", "transform": ax.get_yaxis_transform(), "fontsize": 9}
    ax.text(1.01, height, text, color=colour, **place)


def stripe(ax: Axes, starts: Iterable[int], high: int = 1) -> None:
    """Lay pale stripes, so many rows high, behind rows that need no axis beside their names."""
    for start in starts:
        ax.axhspan(start - 0.5, start + high - 0.5, color=PALE, zorder=0, linewidth=0)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def percent(share: float, digits: int = 0) -> str:
    """Write a share of 0..1 as per cent; '<1 %' for little but some, a dash where unknown."""
    least = 10.0**-digits
    if 0 < 100 * share < least / 2:
        return f"<{least:.{digits}f} %"
    return "–" if np.isnan(share) else f"{100 * share:.{digits}f} %"


def bars(
    ax: Axes, values: pd.Series, texts: Iterable[str], unit: str, colour: str | list[str] = BLUE
) -> None:
    """Draw horizontal bars from top to bottom, each with its text at its end."""
    bars = ax.barh([str(name) for name in values.index], values, color=colour)
    ax.bar_label(bars, list(texts), padding=4)
    ax.set(xlim=(0, max(values.max(), 1e-9) * 1.3), ylim=(len(values) - 0.5, -0.5), xlabel=unit)
    ax.tick_params(axis="y", length=0)
    whole(ax)


def whole(ax: Axes) -> None:
    """Write the x axis as few whole numbers with thousands separators and without a sign."""
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):,.0f}"))


def heat(
    ax: Axes, values: pd.DataFrame, texts: np.ndarray, colours: list[str], **look: Any
) -> None:
    """Draw an annotated heat map, long lists of columns with slanted names; NaN stays grey."""
    ax.set_facecolor(PALE)
    look |= {"fmt": "", "linewidths": 1, "linecolor": PALE, "annot_kws": {"size": 9}}
    sns.heatmap(values, annot=texts, ax=ax, cmap=sns.blend_palette(colours, as_cmap=True), **look)
    rows, columns = (np.arange(count) + 0.5 for count in values.shape)
    slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(columns, values.columns, **(slant if len(columns) > 6 else {"rotation": 0}))
    ax.set_yticks(rows, values.index, rotation=0)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0)


def blank(column: pd.Series) -> pd.Series:
    """Where a column of a history or metrics table is empty: NaN, or '' before it was saved."""
    return column.isna() | (column.astype(str) == "")


def by_arm(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Each arm with its colour, the same in every figure, and its rows."""
    spare = iter([PURPLE, ORANGE, SKY] + [INK] * len(table))
    groups = table.groupby("arm", sort=False)
    return [(arm, ARMS.get(arm) or next(spare), rows) for arm, rows in groups]


def _spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Move rising positions apart to at least `gap`, up and down alike."""
    steps = gap * np.arange(len(wanted))
    up = np.maximum.accumulate(wanted - steps) + steps
    down = np.minimum.accumulate((wanted - steps)[::-1])[::-1] + steps
    return (up + down) / 2


def end_labels(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Name each line (x, y, text, colour) beside its end, without overlap."""
    if not ends:
        return note(ax, "not defined")
    ends = sorted(ends, key=lambda end: end[1])
    ax.figure.draw_without_rendering()
    lines = max(text.count("\n") + 1 for *_, text, _ in ends)
    em = plt.rcParams["font.size"] * ax.figure.dpi / 72  # pixels
    gap = (1.35 * lines + 0.3) * em / ax.get_window_extent().height
    points = ax.transData.transform([end[:2] for end in ends])
    heights = _spread(ax.transAxes.inverted().transform(points)[:, 1], gap)
    thread = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": 3, "relpos": (0, 0.5)}
    for (x, y, text, colour), height in zip(ends, heights, strict=True):
        place = {"xytext": (1.05, height), "textcoords": "axes fraction", "va": "center"}
        ax.annotate(text, (x, y), color=colour, arrowprops=thread, **place)


def show_film(ax: Axes, image: np.ndarray | None, title: str, boxes: Sequence[tuple] = ()) -> None:
    """Show one film with its title and boxes, or say that there is none."""
    ax.set(xticks=[], yticks=[], aspect="equal", facecolor=PALE)
    ax.spines[:].set_visible(False)
    ax.set_title(textwrap.fill(title, 24), loc="center")
    if image is None:
        return note(ax, "no film")
    ax.imshow(image, cmap="gray", vmin=0, vmax=255)
    for x, y, width, height in boxes:
        box = {"fill": False, "edgecolor": ORANGE, "linewidth": 1.8}
        ax.add_patch(plt.Rectangle((x, y), width, height, **box))
