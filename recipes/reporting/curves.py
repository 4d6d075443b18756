"""The picture of a training on its card: the loss over the steps, and the following rate beside it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from recipes.reporting import figures
from recipes.reporting.model_card import curve_of


@matplotlib.rc_context(figures.PAPER)
def plot_curves(log: Sequence[Mapping], following: Sequence[Mapping], stem: str | Path) -> list[Path]:
    """Loss over the steps of a training and, if it was measured, the following rate beside it.

    Args:
        log: lines of `log.jsonl`.
        following: lines of `following.jsonl`.
        stem: of the files, as in `figures.save`.

    Returns:
        The files that were written: none if there is nothing to draw.
    """
    panels = {"loss per response token": curve_of(log, "loss"), "following rate": curve_of(following, "following")}
    panels = {label: points for label, points in panels.items() if points}
    if not panels:
        return []
    figure = Figure(figsize=(figures.WIDTH, 2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    for axes, (label, points) in zip(grid, panels.items(), strict=True):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color="#1b3a4b", marker="o", markevery=max(1, len(points) // 8))
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if label == "following rate":
            axes.set_ylim(-0.02, 1.02)
        else:
            _scale(axes, values)
    return figures.save(figure, stem)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where one tick at 1, 2 or 5 of a decade is sure to be in sight."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if positive and max(positive) > 5 * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
