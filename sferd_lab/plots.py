"""Figures of the experiment. Every function returns a matplotlib figure and colours are safe for colour-blind readers."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from sferd_lab.errors import SferdError

PALETTE = sns.color_palette("colorblind")


def tile(images: Tensor, columns: int) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] as one picture, row by row with a pixel between them: (rows (H+1), columns (W+1)[, 3]) in [0, 1]."""
    pixels = ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    picture = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, channels))
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        picture[top : top + height, left : left + width] = image
    return picture[..., 0] if channels == 1 else picture


def show_grid(axes: plt.Axes, images: Tensor, columns: int, title: str) -> None:
    """Draw ``images`` as a grid on ``axes``, without ticks."""
    axes.imshow(tile(images, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def sample_grids(sets: dict[str, Tensor], count: int = 32, columns: int = 8, across: int = 3) -> Figure:
    """The first ``count`` images of every set side by side. Drawn from the same noise, image k of one set belongs to image k of another."""
    across = min(across, len(sets))
    rows = -(-len(sets) // across)
    height = 2.9 * -(-count // columns) / columns + 0.3
    figure, grid = plt.subplots(rows, across, figsize=(3.1 * across, height * rows), squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (title, images) in zip(grid.flat, sets.items(), strict=False):
        show_grid(axes, images[:count], columns, title)
    return figure


def same_noise_rows(sets: dict[str, Tensor], count: int = 16) -> Figure:
    """A row for each set, a column for each noise: what every model makes of the same starting point."""
    figure, grid = plt.subplots(len(sets), 1, figsize=(9, 0.62 * len(sets)), squeeze=False, layout="constrained")
    for axes, (title, images) in zip(grid.flat, sets.items(), strict=True):
        axes.imshow(tile(images[:count], count), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    return figure


def trajectory(states: Sequence[Tensor], predictions: Sequence[Tensor], phis: Sequence[float]) -> Figure:
    """One sampler's walk: x_phi above, the x0 predicted there below, from noise on the left to data on the right.

    ``states`` holds one image batch (B, C, H, W) more than ``predictions``; the first image of each is drawn.
    """
    figure, grid = plt.subplots(2, len(states), figsize=(1.15 * len(states), 2.7), layout="constrained")
    for axes in grid.flat:
        axes.set_axis_off()
    for column, (x, phi) in enumerate(zip(states, phis, strict=True)):
        show_grid(grid[0, column], x[:1], 1, f"$\\varphi$ = {phi / np.pi:.2f}$\\pi$")
        if column < len(predictions):
            show_grid(grid[1, column], predictions[column][:1], 1, "predicted $x_0$")
    return figure


def training_curves(losses: pd.DataFrame) -> Figure:
    """Loss against step for each stage, averaged over 20 steps. ``losses`` has the columns stage, step, loss."""
    smooth = losses.assign(step=(losses["step"] - 1) // 20 * 20 + 10).groupby(["stage", "step"], sort=False, as_index=False)["loss"].mean()
    chart = sns.relplot(smooth, x="step", y="loss", col="stage", col_wrap=5, kind="line", height=1.7, aspect=1.3, color=PALETTE[0],
                        facet_kws={"sharex": False, "sharey": False})  # fmt: skip
    chart.set_titles("{col_name}", size=9).set(yscale="log").set_axis_labels("step", "loss")
    return chart.figure


def metric_versus_steps(table: pd.DataFrame, metric: str, label: str) -> Figure:
    """A metric against the number of sampling steps for teacher and students, with the floor of real images and its spread.

    ``table`` is a run's ``metrics.csv``. Guided rows are dashed, Heun's are squares; rows with a semantic gradient predictor are stars
    (codes from the prior). Raises SferdError for a metric that the table has no floor of.
    """
    scored = table[(table["steps"] > 0) & table["floor"].notna()]
    rows = scored[scored["metric"] == metric]
    if rows.empty:
        raise SferdError(f"metric = '{metric}'; allowed: {', '.join(scored['metric'].unique())}")
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    starred = rows[rows["z"] == "prior"]
    beside = list(dict.fromkeys(zip(starred["method"], starred["guidance"], strict=True)))
    for colour, (method, part) in zip(PALETTE, rows.groupby("method", sort=False), strict=False):
        # In the order of steps: a run scores the teacher's most steps first.
        for (guided, sampler), line in part[part["sgp"] == ""].sort_values("steps").groupby(["guidance", "sampler"]):
            name = method + ", Heun" * (sampler == "heun") + " + guidance" * guided
            marker = ("s" if sampler == "heun" else "o") + ("--" if guided else "-")
            axes.plot(line["steps"], line["value"], marker, color=colour, label=name, fillstyle="none" if guided else "full")
        for guided, stars in part[part["z"] == "prior"].groupby("guidance"):
            name = f"{method}{' + guidance' if guided else ''} + SGP"
            style = {"color": colour, "mec": colour if guided else "black", "mfc": "none" if guided else colour, "ms": 13, "mew": 1.5}
            # Beside their column, so that stars of one step count do not hide each other.
            shift = 2 ** (0.18 * (beside.index((method, guided)) - (len(beside) - 1) / 2))
            axes.plot(stars["steps"] * shift, stars["value"], "*", label=name, **style)
    floor, spread = rows["floor"].iloc[0], rows["floor_sd"].iloc[0]
    axes.axhspan(floor - spread, floor + spread, color="gray", alpha=0.3, label="real images (mean ± sd)")
    ticks = sorted(rows["steps"].unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, ticks)
    if metric == "fd":
        axes.set_yscale("log")
    axes.set_xlabel("sampling steps")
    axes.set_ylabel(label)
    axes.legend(fontsize=8, ncols=2)
    return figure


def forest(ratios: pd.DataFrame, title: str = "") -> Figure:
    """Ratios with their intervals, a line each, against 1. ``ratios`` are lines of ``report.ratios``."""
    figure, axes = plt.subplots(figsize=(6.5, 0.32 * len(ratios) + 1), layout="constrained")
    for place, line in enumerate(ratios.iloc[::-1].itertuples()):
        colour = PALETTE[["teacher", "pd", "cd"].index(line.method)]  # those of the figures with a teacher
        axes.plot([line.low, line.high], [place, place], color=colour, lw=2)
        axes.plot(line.ratio, place, "o", color=colour)
    names = [f"{line.method} {line.variant}, {line.steps} step{'s' * (line.steps > 1)}" for line in ratios.iloc[::-1].itertuples()]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(-0.5, len(names) - 0.5)  # or the first and the last would lie on the frame
    axes.axvline(1, color="gray", lw=0.8)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    # Finer ones where the whole axis is about 1.
    ticks = [tick for tick in (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10) if low <= tick <= high]
    ticks = ticks if len(ticks) > 2 else [tick for tick in (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("ratio to the plain student, left of 1 is better")
    axes.set_title(title, fontsize=10)
    return figure


def metric_versus_cost(table: pd.DataFrame, metric: str, label: str) -> Figure:
    """A metric against the FLOPs of sampling an image, everything counted, mean over seeds: a line for each kind of sample.

    ``table`` is one or more runs' ``metrics.csv``, codes from the prior.
    """
    rows = table[(table["steps"] > 0) & table["z"].isin(("", "prior")) & (table["sampler"] != "heun")]
    key = ["method", "guidance", "sgp", "steps"]
    wide = rows[rows["metric"].isin((metric, "sampling_mflops_per_image"))].pivot_table(
        index=key, columns="metric", values="value", sort=False
    )
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    methods = list(dict.fromkeys(wide.index.get_level_values("method")))
    for (method, guided, sgp), line in wide.groupby(level=["method", "guidance", "sgp"], sort=False):
        line = line.sort_values("sampling_mflops_per_image")
        name = method + " + guidance" * guided + " + SGP" * bool(sgp)
        style = {"color": PALETTE[methods.index(method)], "ms": 10 if sgp else 6, "mfc": "none" if guided else None}
        marker = ("*" if sgp else "o") + ("--" if guided else "-")
        axes.plot(line["sampling_mflops_per_image"], line[metric], marker, label=name, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("MFLOP an image")
    axes.set_ylabel(label)
    axes.legend(fontsize=8, ncols=2)
    return figure


# The colours of a decomposition's terms, the same in every figure.
TERM_COLOURS = dict(
    zip(
        (
            *("teacher_bias", "distillation_bias", "bias_cross", "teacher_variance", "student_variance", "data_variance", "seed_variance"),
            *("irreducible", "chance", "irreducible_and_teacher_bias"),
        ),
        PALETTE,
        strict=True,
    )
)


def term_bars(table: pd.DataFrame, by: str, title: str = "") -> Figure:
    """What an error is made of: one stacked bar for each value of the column ``by``, each term with its interval, dots at the totals.

    ``table`` holds lines of ``Decomposition.table`` with the column ``by``. Estimates below zero hang below the axis; none is clipped.
    """
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    groups = list(dict.fromkeys(table[by]))
    up, down = np.zeros(len(groups)), np.zeros(len(groups))
    for which, (term, part) in enumerate(table[table["term"] != "total"].groupby("term", sort=False)):
        part = part.set_index(by).reindex(groups)
        value = part["value"].fillna(0).to_numpy()
        base = np.where(value >= 0, up, down)
        error = np.nan_to_num([part["value"] - part["low"], part["high"] - part["value"]])
        axes.bar(range(len(groups)), value, 0.6, base, color=TERM_COLOURS.get(term, "gray"), label=term.replace("_", " "))
        # Side by side, so that one term's interval is not taken for another's, or for the total's.
        axes.errorbar(np.arange(len(groups)) + 0.08 * (which - 2.5), base + value, error, fmt="none", ecolor="black", elinewidth=0.8)
        up, down = np.where(value >= 0, up + value, up), np.where(value < 0, down + value, down)
    totals = table[table["term"] == "total"].set_index(by).reindex(groups)["value"]
    axes.plot(range(len(groups)), totals, "kD", ms=4, label="total")
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlabel(by)
    axes.set_ylabel("mean squared error")
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


# What ``attention_verdict`` draws, in this order: (map, statistic, label).
VERDICT = (
    ("attention", "spearman", "attention"),
    ("attention of another image", "spearman", "attention of another image"),
    ("gradient energy", "spearman", "gradient energy"),
    ("local variance", "spearman", "local variance"),
    ("|x0|", "spearman", "|x0|"),
    ("attention", "spearman given controls", "attention, given the controls"),
)


def attention_verdict(table: pd.DataFrame, resolution: str = "layer", title: str = "") -> Figure:
    """Does error sit where attention is, and does attention say more than the controls? A panel a layer, the noise level across.

    ``table`` holds lines of ``attention_test`` with the columns layer and level, of one model and one kind of error. Points are mean rank
    correlations with error, bars their intervals: the claim holds where the black diamonds are clearly above zero.
    """
    rows = table[table["resolution"] == resolution]
    layers = list(dict.fromkeys(rows["layer"]))
    figure, grid = plt.subplots(1, len(layers), figsize=(2.1 * len(layers) + 1.8, 3), sharey=True, squeeze=False, layout="constrained")
    for axes, layer in zip(grid.flat, layers, strict=True):
        for index, (name, statistic, label) in enumerate(VERDICT):
            part = rows[(rows["layer"] == layer) & (rows["map"] == name) & (rows["statistic"] == statistic)].sort_values("level")
            style = {"color": PALETTE[index], "marker": "o", "lw": 1} if statistic == "spearman" else {"color": "black", "marker": "D"}
            error = np.nan_to_num([part["value"] - part["low"], part["high"] - part["value"]])
            axes.errorbar(part["level"] + 0.006 * (index - 2.5), part["value"], error, label=label, ms=4, **style)
        axes.axhline(0, color="gray", lw=0.8)
        axes.set_title(layer, fontsize=9)
        axes.set_xlabel("noise level t")
    grid[0, 0].set_ylabel("rank correlation with error")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def maps_row(maps: dict[str, np.ndarray]) -> Figure:
    """Maps (h, w) side by side, each with a colour bar of its own."""
    figure, grid = plt.subplots(1, len(maps), figsize=(2.1 * len(maps), 2.1), squeeze=False, layout="constrained")
    for axes, (name, values) in zip(grid.flat, maps.items(), strict=True):
        picture = axes.imshow(values, cmap="viridis", interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
        figure.colorbar(picture, ax=axes, shrink=0.7)
    return figure
