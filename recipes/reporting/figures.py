"""Draw the figures of the reports as PNG and SVG, half a page wide.

Line styles, markers, hatches and colours from dark to light make them readable in grey. The same numbers give the same
files, byte for byte. Nothing is drawn for a missing number (absent or None). `stem` is the path of the files without
suffix.
"""

import itertools
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

PAPER = {
    "svg.hashsalt": "lsm",
    "svg.fonttype": "none",  # keeps text as text, for screen readers and search
    "text.parse_math": False,  # a transcript may cost $5 or $6
    "font.size": 7,
    "axes.titlesize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3,
    "hatch.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH = 3.5  # inches
MOST_BARS = 30  # figures with more bars have twice the width

# A label that begins with one of these names gets its style; any other label gets the next free style.
LINES = {
    "text LLM": {"color": "#1b3a4b", "linestyle": "-", "marker": "o"},
    "self-powered": {"color": "#2a9d8f", "linestyle": "--", "marker": "s"},
    "vanilla": {"color": "#e9a23b", "linestyle": "-.", "marker": "^"},
    "paper": {"color": "#a8323e", "linestyle": (0, (5, 1)), "marker": "v"},
    "fifth": {"color": "#7a7a7a", "linestyle": ":", "marker": "D"},
    "sixth": {"color": "#b5b5b5", "linestyle": "-", "marker": "x"},
}
MEASURES = {
    "layers": "share of saliency",
    "per_token": "saliency per token\n(average token = 1)",
    "attention": "share of attention",
}
PARTS = {  # label, colour, hatch
    "instruction": ("instruction", "#1b3a4b", ""),
    "speech": ("speech or transcript", "#2a9d8f", "//"),
    "template": ("chat template", "#e9a23b", ".."),
    "response": ("response so far", "#cccccc", "xx"),
    "first": ("first token", "#f4f4f4", ""),
}
SIMILARITIES = {
    "cka": ("CKA", {"color": "#1b3a4b", "linestyle": "-", "marker": "o"}),
    "cosine": ("cosine, same sentence", {"color": "#2a9d8f", "linestyle": "--", "marker": "s"}),
    "cosine_other": ("cosine, another sentence", {"color": "#e9a23b", "linestyle": "-.", "marker": "^"}),
}


@matplotlib.rc_context(PAPER)
def save(figure: Figure, stem: str | Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg, creating the folder if necessary, and return both paths."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # scripts that the font lacks; the SVG shows them
        figure.savefig(paths[0], dpi=300)
        figure.set_layout_engine("none")  # keep the layout, which is slow to compute and could differ
        figure.savefig(paths[1], dpi=300, metadata=nothing)
    return paths


@matplotlib.rc_context(PAPER)
def plot_layers(biases: Mapping[str, dict], stem: str | Path) -> list[Path]:
    """Plot the shares of saliency and attention over layers, as the paper's Figures 3 and 5, with 95 % intervals.
    `biases` has the content of a `bias.json` by label. Models of different depth are drawn over relative depth.

    Raises:
        ValueError: there is no model, or a model has no layers.
    """
    depths = {label: len(bias.get("layers") or ()) for label, bias in biases.items()}
    if not depths or not all(depths.values()):
        raise ValueError(f"layers per model: {depths}; expected at least one model, each with the layers of bias.json.")
    measures = [name for name in MEASURES if any(bias.get(name) for bias in biases.values())]
    figure = Figure(figsize=(WIDTH, 0.6 + 1.15 * len(measures)), layout="constrained")
    grid = figure.subplots(len(measures), 2, squeeze=False, sharex=True, sharey="row")
    styles = _line_styles(biases)
    relative = len(set(depths.values())) > 1
    for row, measure in zip(grid, measures, strict=True):
        for axes, part in zip(row, ("instruction", "speech"), strict=True):
            for label, bias in biases.items():
                layers = np.arange(1, depths[label] + 1)
                where = layers / depths[label] if relative else layers
                values = _column(bias.get(measure), part)
                intervals = _column((bias.get("intervals") or {}).get(measure), part)
                _line(axes, where, values, intervals, label, styles[label])
            if measure == "per_token":
                axes.axhline(1, color="black", linewidth=0.5, linestyle=(0, (1, 2)))
        row[0].set_ylabel(MEASURES[measure])
        row[0].set_ylim(bottom=0)
    grid[0][0].set_title("on the instruction")
    grid[0][1].set_title("on the speech or transcript")
    for axes in grid[-1]:
        axes.set_xlabel("depth (1 = last layer)" if relative else "layer")
        axes.xaxis.set_major_locator(FixedLocator([0, 0.5, 1]) if relative else MaxNLocator(5, integer=True))
    _legend(figure, grid[0][0], handle=2.8)
    return save(figure, stem)


@matplotlib.rc_context(PAPER)
def plot_composition(bias: dict, stem: str | Path, title: str) -> list[Path]:
    """Plot a model's five shares of saliency, of a `bias.json`, as stacked bars over layers. Raises ValueError if there
    are none."""
    if not bias.get("layers"):
        raise ValueError(f"{title!r} has no layers; expected the content of a bias.json.")
    figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    axes = figure.subplots()
    layers, floor = np.arange(1, len(bias["layers"]) + 1), np.zeros(len(bias["layers"]))
    for part, (label, color, hatch) in PARTS.items():
        heights = np.nan_to_num(_numbers(_column(bias["layers"], part)))
        style = {"color": color, "hatch": hatch, "edgecolor": "black", "linewidth": 0.4}
        axes.bar(layers, heights, 0.8 if len(layers) < 13 else 1, bottom=floor, label=label, **style)
        floor = floor + heights
    axes.set(xlabel="layer", ylabel="share of saliency", ylim=(0, max(1, floor.max())), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlim(0.4, len(layers) + 0.6)
    _legend(figure, axes, handle=1.6)
    return save(figure, stem)


@matplotlib.rc_context(PAPER)
def plot_similarity(similarity: dict, stem: str | Path) -> list[Path]:
    """Plot the similarity of speech and text inside a model: curves over levels, and up to three maps of a sentence.

    Args:
        similarity: `levels`, and for each level `cka`, `cosine` and `cosine_other` with their `intervals`; `examples`,
            the first of which has `tokens` and `maps`, arrays (speech tokens, text tokens) by level.

    Raises:
        ValueError: the length of a curve is not the number of levels, or the width of a map not that of tokens.
    """
    example = next(iter(similarity.get("examples") or ()), {"maps": {}})
    names = list(example["maps"])
    names = [names[i] for i in sorted({0, len(names) // 2, len(names) - 1})] if names else []
    figure = Figure(figsize=(WIDTH, 3.5 if names else 2.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.2)) if names else (figure.subfigures(1, 1), None)
    _curves(left.subplots(), similarity)
    if names:
        _maps(right, {name: np.array(example["maps"][name], dtype=float) for name in names}, example["tokens"])
    _legend(figure, left.axes[0], handle=2.8)
    return save(figure, stem)


@matplotlib.rc_context(PAPER)
def plot_bars(
    scores: Mapping[str, Mapping[str, dict | None]],
    stem: str | Path,
    order: Sequence[str],
    styles: Mapping[str, tuple[str, str, str]],
    ylabel: str,
    title: str,
) -> list[Path]:
    """Plot groups of bars, one bar per system, with intervals as whiskers.

    Args:
        scores: `value`, `low` and `high` by system and group.
        order: groups from left to right; groups without scores are left out.
        styles: label, colour and hatch by system, in the order of the bars; systems without scores are left out.

    Raises:
        ValueError: a system has no style, or there are no scores.
    """
    if unknown := [system for system in scores if system not in styles]:
        raise ValueError(f"no style for {unknown[0]!r}; expected one of {', '.join(styles)}.")
    systems = [system for system in styles if any(_value(scores, system, group) is not None for group in order)]
    groups = [group for group in order if any(_value(scores, system, group) is not None for system in systems)]
    if not groups:
        scored = dict.fromkeys(group for by_group in scores.values() for group in by_group)
        raise ValueError(f"no system has a score for {', '.join(order)}; expected some of {', '.join(scored)}.")
    bars = len(systems) * len(groups)
    figure = Figure(figsize=(WIDTH if bars <= MOST_BARS else 2 * WIDTH, 2.4), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(systems)
    for offset, system in enumerate(systems):
        label, color, hatch = styles[system]
        drawn = [i for i, group in enumerate(groups) if _value(scores, system, group) is not None]
        values = np.array([_value(scores, system, groups[i]) for i in drawn])
        bounds = [[scores[system][groups[i]].get(side) for i in drawn] for side in ("low", "high")]
        whiskers = np.abs(np.array(bounds, dtype=float) - values)
        style = {"color": color, "hatch": hatch, "edgecolor": "black", "linewidth": 0.4}
        style["error_kw"] = {"elinewidth": 0.7, "capsize": 1.2, "capthick": 0.7}
        places = np.array(drawn) + (offset - (len(systems) - 1) / 2) * width
        axes.bar(places, values, width, label=label, yerr=whiskers, **style)
    long = max(map(len, groups)) * len(groups) > 45
    axes.set_xticks(range(len(groups)), groups, **({"rotation": 30, "ha": "right"} if long else {}))
    axes.tick_params(axis="x", length=0)
    axes.set(ylabel=ylabel, title=title)
    axes.set_ylim(bottom=0)
    _legend(figure, axes, handle=1.6)
    return save(figure, stem)


@matplotlib.rc_context(PAPER)
def plot_study(
    summaries: Mapping[str, Mapping[str, dict | None]],
    panels: Mapping[str, str],
    stem: str | Path,
    counts: Sequence[str] = (),
    ceilings: Mapping[str, dict | None] | None = None,
    layers: Mapping[str, Sequence[Mapping]] | None = None,
) -> list[Path]:
    """Plot the rows of a study: a panel of points with whiskers for each figure, and grey fields for the shares of
    saliency over layers.

    Args:
        summaries: `value`, `low` and `high` by row and figure.
        panels: titles of the panels by figure, from left to right.
        counts: figures that are counts and not shares.
        ceilings: `value` by figure, drawn as a line across all rows.
        layers: `instruction` and `speech` shares of all layers by row.

    Raises:
        ValueError: there are no rows.
    """
    if not summaries:
        raise ValueError("the study has no rows; expected at least one.")
    traced = [part for part in ("instruction", "speech") if any((layers or {}).values())]
    size = (2 * WIDTH, 0.7 + 0.17 * len(summaries))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, len(panels) + len(traced), sharey=True, squeeze=False)[0]
    for axes, (name, title) in zip(grid, panels.items(), strict=False):
        scale = 1 if name in counts else 100
        for place, summary in enumerate(summaries.values()):
            if point := summary.get(name):
                value, low, high = (scale * point[key] for key in ("value", "low", "high"))
                axes.plot([low, high], [place, place], color="#7a7a7a")
                axes.plot(value, place, color="#1b3a4b", marker="o")
        if ceiling := (ceilings or {}).get(name):
            axes.axvline(scale * ceiling["value"], color="black", linewidth=0.5, linestyle=(0, (1, 2)))
        axes.set_title(textwrap.fill(title if name in counts else f"{title} (%)", 14))
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.4)
    for axes, part in zip(grid[len(panels) :], traced, strict=True):
        shares = [_column(layers.get(row), part) or [] for row in summaries]
        values = np.full((len(shares), max(map(len, shares))), np.nan)
        for row, by_layer in zip(values, shares, strict=True):
            row[: len(by_layer)] = _numbers(by_layer)
        axes.imshow(values, cmap="Greys", vmin=0, aspect="auto", interpolation="nearest")
        axes.set_title(f"{part},\nby layer\n(black: {100 * np.nanmax(values):.0f} %)")
        axes.set_xticks([])
    grid[0].set_yticks(range(len(summaries)), list(summaries))
    grid[0].set_ylim(len(summaries) - 0.5, -0.5)
    return save(figure, stem)


def _line_styles(labels: Sequence[str]) -> dict[str, dict]:
    """Return a style of `LINES` for each label: its own, or the next one that is free."""
    free, styles = dict(LINES), {}
    for label in labels:
        if own := next((name for name in free if label.startswith(name)), None):
            styles[label] = free.pop(own)
    others = itertools.cycle(free.values() or LINES.values())
    return {label: styles.get(label) or next(others) for label in labels}


def _column(rows: Sequence[Mapping] | None, part: str) -> list | None:
    """Return one part of every layer; None if there are no layers."""
    return [row.get(part) for row in rows] if rows else None


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """Return an array (points,) with NaN, which is not drawn, for None."""
    return np.array(values, dtype=float)


def _line(axes: Axes, where: np.ndarray, values: list | None, intervals: list | None, label: str, style: dict) -> None:
    """Draw a curve and its band of intervals; either may be None."""
    if not values:
        return
    if intervals:
        low, high = np.array([bounds or (None, None) for bounds in intervals], dtype=float).T
        axes.fill_between(where, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.plot(where, _numbers(values), label=label, markevery=max(1, len(where) // 8), **style)


def _curves(axes: Axes, similarity: dict) -> None:
    levels, intervals = similarity["levels"], similarity.get("intervals") or {}
    for name, (label, style) in SIMILARITIES.items():
        values = similarity.get(name)
        if values and len(values) != len(levels):
            raise ValueError(f"{name} has {len(values)} values; expected one for each of {len(levels)} levels.")
        _line(axes, np.arange(len(levels)), values, intervals.get(name), label, style)
    shown = range(0, len(levels), max(1, -(-len(levels) // 9)))
    axes.set_xticks(shown, [levels[i] for i in shown], rotation=90)
    axes.set_ylabel("similarity (1 = the same)")
    axes.axhline(0, color="black", linewidth=0.5, linestyle=(0, (1, 2)))


def _maps(figure: Figure, maps: Mapping[str, np.ndarray], tokens: Sequence[str]) -> None:
    """Draw heat maps below each other, with a common scale."""
    for name, values in maps.items():
        if values.ndim != 2 or values.shape[1] != len(tokens):
            raise ValueError(f"the map of {name} has shape {values.shape}; expected (speech tokens, {len(tokens)}).")
    numbers = np.concatenate([values.ravel() for values in maps.values()])
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    grid = figure.subplots(len(maps), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, values) in zip(grid, maps.items(), strict=True):
        image = axes.imshow(values, cmap="Greys", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        axes.set_title(name, pad=2)
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    step = -(-len(tokens) // 14)
    words = ["".join(sign if sign.isprintable() else "�" for sign in token).strip() for token in tokens]
    grid[-1].set_xticks(range(0, len(words), step), words[::step], rotation=90, fontsize=6)
    grid[-1].set_xlabel("transcript (tokens)")
    figure.supylabel("speech (tokens)", fontsize=7)
    figure.colorbar(image, ax=list(grid), location="bottom", aspect=25, pad=0.03).set_label("cosine")


def _value(scores: Mapping, system: str, group: str) -> float | None:
    return (scores.get(system, {}).get(group) or {}).get("value")


def _legend(figure: Figure, axes: Axes, handle: float) -> None:
    """Draw a legend below the figure, in as many columns as fit; `handle` is the length of its samples in letters."""
    handles, labels = axes.get_legend_handles_labels()
    for columns in (3, 2, 1):
        longest = [max(map(len, part), default=0) for part in np.array_split(np.array(labels, dtype=object), columns)]
        if 0.047 * sum(longest) + columns * 0.097 * (handle + 1.8) < WIDTH:  # inches a letter, and letters of padding
            break
    style = {"frameon": False, "handlelength": handle, "columnspacing": 1}
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **style)
