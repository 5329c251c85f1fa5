"""Figures of the report as inline SVG: matplotlib without a display, text left as text."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curate.pipeline.reporting.summary import ColumnSummary

BLUE, ORANGE, GREY, INK, PALE = "#2f5fd0", "#c2571a", "#9aa3af", "#1f2933", "#e4e7eb"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
BINS = 40
MAX_CLASSES = 40


@dataclass(frozen=True)
class Bar:
    """A mean over seeds at a kept share, with the half width of its interval if there is one."""

    name: str
    kept: float
    mean: float
    half_width: float | None


def histograms(columns: Sequence[ColumnSummary]) -> str:
    """Return one small histogram per score column, with its median marked."""
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure, grid = _grid(down, across, width=3.1 * across, height=2.0 * down)
    for axes, column in zip(grid, columns, strict=False):
        values = column.sample[np.isfinite(column.sample)]
        axes.set_title(column.name, loc="left", fontweight="bold", fontsize=10)
        if len(values):
            low, high = np.quantile(values, [0.001, 0.999])
            if high > low:
                values = values[(values >= low) & (values <= high)]
            axes.hist(values, bins=BINS, color=BLUE, alpha=0.85)
            axes.locator_params(axis="x", nbins=4)
            axes.axvline(float(np.median(values)), color=ORANGE, linewidth=1.2)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    for axes in grid[len(columns) :]:
        axes.set_visible(False)
    return _svg(figure, "histograms")


def correlations(names: Sequence[str], matrix: Float[np.ndarray, "k k"]) -> str:
    """Return the matrix of rank correlations as a heat map with its numbers."""
    size = 1.6 + 0.52 * len(names)
    figure, (axes,) = _grid(1, 1, width=size + 0.8, height=size)
    axes.imshow(np.nan_to_num(matrix), cmap="RdBu_r", vmin=-1, vmax=1, alpha=0.8)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for i in range(len(names)):
        for j in range(len(names)):
            text = "n/a" if np.isnan(matrix[i, j]) else f"{matrix[i, j]:.2f}"
            shade = "white" if abs(matrix[i, j]) > 0.75 else INK
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=shade)
    return _svg(figure, "correlations")


def class_balance(before: Mapping[str, float], after: Mapping[str, Mapping[str, float]]) -> str:
    """Return each class's share of the corpus beside its share of every selection.

    Beyond MAX_CLASSES the largest are drawn.
    """
    classes = by_size(before)
    series = {"corpus": before, **after}
    shades = [GREY, BLUE, ORANGE, "#2f855a", "#805ad5", "#b83280"]
    width = 0.8 / len(series)
    figure, (axes,) = _grid(1, 1, width=max(6.0, min(12.0, 0.7 * len(classes))), height=2.8)
    for k, (name, shares) in enumerate(series.items()):
        at = np.arange(len(classes)) + (k - (len(series) - 1) / 2) * width
        heights = [100 * shares.get(c, 0.0) for c in classes]
        axes.bar(at, heights, width, label=name, color=shades[k % len(shades)])
    long = max(map(len, classes)) > 4
    axes.set_xticks(range(len(classes)), classes)
    axes.tick_params(axis="x", rotation=40 if long else 0)
    axes.set_ylabel("share of rows, %")
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=min(4, len(series)),
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
    )
    return _svg(figure, "balance")


def by_size(classes: Mapping[str, float | int]) -> list[str]:
    """Return the MAX_CLASSES largest classes, in the order of their names (numbers as numbers)."""
    largest = sorted(classes, key=lambda name: (-classes[name], name))[:MAX_CLASSES]
    return sorted(largest, key=lambda name: (not name.isdigit(), len(name) * name.isdigit(), name))


def accuracy(bars: Sequence[Bar], metric: str) -> str:
    """Return the metric against the kept share: lines through one method's budgets."""
    figure, (axes,) = _grid(1, 1, width=7.2, height=3.6)
    methods: dict[str, list[Bar]] = {}
    for bar in bars:
        methods.setdefault(bar.name, []).append(bar)
    shades = {"full": INK, "random": GREY}
    palette = iter([BLUE, ORANGE, "#2f855a", "#805ad5", "#b83280", "#0f766e"] * 4)
    for name, points in methods.items():
        points = sorted(points, key=lambda p: p.kept)
        colour = shades.get(name) or next(palette)
        axes.errorbar(
            [100 * p.kept for p in points],
            [p.mean for p in points],
            yerr=[p.half_width or 0.0 for p in points],
            label=name,
            color=colour,
            marker="o",
            markersize=5,
            capsize=3,
            linewidth=1.6,
        )
        if name == "full":
            axes.axhline(points[-1].mean, color=colour, linewidth=0.8, linestyle=":")
    axes.set_xlabel("rows kept, %")
    axes.set_ylabel(metric)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure, "accuracy")


def divergence(trace: Sequence[float], refused: float | None) -> str:
    """Return a divergence after each accepted step, from the start; a cross is what ended it."""
    figure, (axes,) = _grid(1, 1, width=6.0, height=2.4)
    axes.plot(range(len(trace)), trace, color=BLUE, linewidth=1.6)
    if refused is not None:
        axes.plot([len(trace)], [refused], color=ORANGE, marker="x", linestyle="none")
    axes.set_xlabel("rows or clusters accepted")
    axes.set_ylabel("KL divergence")
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    return _svg(figure, "divergence")


def _grid(down: int, across: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
        return figure, list(grid.flat)


def _svg(figure: Figure, salt: str) -> str:
    """Return the drawing, the same bytes every time; the salt keeps ids apart in one page."""
    out = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata=NO_METADATA, transparent=True)
    text = out.getvalue()
    return text[text.index("<svg") :]
