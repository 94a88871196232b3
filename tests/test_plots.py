"""Figures: a picture's geometry to the pixel, and that every figure draws what it is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sferd_lab.artifacts import shipped_folder
from sferd_lab.errors import SferdError
from sferd_lab.experiment import read_table
from sferd_lab.plots import (
    forest,
    metric_versus_cost,
    metric_versus_steps,
    same_noise_rows,
    sample_grids,
    show_grid,
    term_bars,
    tile,
    training_curves,
    trajectory,
)
from sferd_lab.report import ratios


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def images(count: int, channels: int = 1, height: int = 2, width: int = 3) -> Tensor:
    """Image k has the value k / count * 2 - 1 everywhere."""
    return (torch.arange(count) / count * 2 - 1)[:, None, None, None].expand(count, channels, height, width)


def pictures(axes: plt.Axes) -> np.ndarray:
    (image,) = axes.get_images()
    return np.asarray(image.get_array())


# ---- pictures


def test_grey_images_are_tiled_row_by_row_with_a_white_pixel_between() -> None:
    grey = torch.tensor([[[[-1.0, 0.0]]], [[[1.0, -0.5]]], [[[0.5, -1.0]]]])  # three images of 1 x 2 pixels
    expected = [
        [0, 0.5, 1, 1, 0.25],
        [1, 1, 1, 1, 1],
        [0.75, 0, 1, 1, 1],  # where a fourth would be: paper
    ]
    np.testing.assert_array_equal(tile(grey, 2), expected)


def test_colour_images_keep_their_channels() -> None:
    red, blue = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, 1])
    picture = tile(torch.stack([red, blue])[:, :, None, None], 1)
    np.testing.assert_array_equal(picture, [[[1, 0, 0]], [[1, 1, 1]], [[0, 0, 1]]])


@pytest.mark.parametrize(("count", "columns", "shape"), [(1, 1, (2, 3)), (6, 3, (5, 11)), (7, 3, (8, 11)), (2, 5, (2, 19))])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_has_the_size_that_its_docstring_says(count: int, columns: int, shape: tuple[int, int], channels: int) -> None:
    assert tile(images(count, channels), columns).shape == (shape if channels == 1 else (*shape, 3))


def test_values_out_of_range_are_clamped_and_the_images_left_alone() -> None:
    wild = torch.tensor([[[[-7.0, 7.0]]]])
    np.testing.assert_array_equal(tile(wild, 1), [[0, 1]])
    assert wild.flatten().tolist() == [-7, 7]


def test_a_grid_on_axes_has_black_at_zero_white_at_one_and_no_ticks() -> None:
    _, axes = plt.subplots()
    show_grid(axes, torch.zeros(4, 1, 2, 2), 2, "mid grey")
    (image,) = axes.get_images()
    assert image.get_clim() == (0, 1)  # or an image of one grey would be black
    assert image.get_interpolation() == "nearest"
    assert axes.get_title() == "mid grey"
    assert not axes.axison
    assert pictures(axes)[0, 0] == 0.5


@pytest.mark.parametrize(("sets", "grid"), [(1, (1, 1)), (3, (1, 3)), (5, (2, 3))])
def test_sample_grids_have_a_panel_a_set(sets: int, grid: tuple[int, int]) -> None:
    figure = sample_grids({f"set {k}": images(9) for k in range(sets)}, count=7, columns=3)
    assert isinstance(figure, Figure)
    panels = figure.axes
    assert len(panels) == grid[0] * grid[1]
    drawn = [axes for axes in panels if axes.get_images()]
    assert [axes.get_title() for axes in drawn] == [f"set {k}" for k in range(sets)]
    for axes in drawn:
        np.testing.assert_array_equal(pictures(axes), tile(images(9)[:7], 3))
    assert not any(axes.axison for axes in panels)


@pytest.mark.parametrize("channels", [1, 3])
def test_same_noise_rows_have_a_row_a_set_and_a_column_a_noise(channels: int) -> None:
    sets = {"teacher": images(20, channels), "student": images(20, channels) / 2}
    figure = same_noise_rows(sets, count=4)
    assert isinstance(figure, Figure)
    assert [axes.get_ylabel() for axes in figure.axes] == ["teacher", "student"]
    for axes, given in zip(figure.axes, sets.values(), strict=True):
        assert pictures(axes).shape[:2] == (2, 15)  # four of three pixels, three gaps
        np.testing.assert_array_equal(pictures(axes), tile(given[:4], 4))
        assert [*axes.get_xticks(), *axes.get_yticks()] == []


def test_a_trajectory_has_states_above_and_predictions_below() -> None:
    states, predictions = [images(k + 2)[1:] for k in range(3)], [images(k + 5)[1:] for k in range(2)]
    figure = trajectory(states, predictions, [np.pi / 2, np.pi / 4, 0.0])
    assert isinstance(figure, Figure)
    above, below = figure.axes[:3], figure.axes[3:]
    assert [axes.get_title() for axes in above] == [f"$\\varphi$ = {share}$\\pi$" for share in ("0.50", "0.25", "0.00")]
    for axes, state in zip(above, states, strict=True):
        np.testing.assert_array_equal(pictures(axes), tile(state[:1], 1))
    for axes, prediction in zip(below, predictions, strict=False):
        np.testing.assert_array_equal(pictures(axes), tile(prediction[:1], 1))
    assert not below[2].get_images()  # the last state is data: nothing is predicted there
    with pytest.raises(ValueError, match="zip"):
        trajectory(states, predictions, [1.0, 0.0])


# ---- curves


def test_training_curves_average_each_stage_over_twenty_steps() -> None:
    losses = pd.concat(
        [
            pd.DataFrame({"stage": "teacher", "step": range(1, 51), "loss": [4.0] * 20 + [1.0, 3.0] * 10 + [0.5] * 10}),
            pd.DataFrame({"stage": "cd", "step": range(1, 5), "loss": [0.1, 0.2, 0.3, 0.4]}),
        ]
    )
    figure = training_curves(losses)
    assert isinstance(figure, Figure)
    teacher, cd = figure.axes
    assert [axes.get_title() for axes in (teacher, cd)] == ["teacher", "cd"]
    assert teacher.get_yscale() == "log"
    (line,) = teacher.get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[10, 4], [30, 2], [50, 0.5]])
    (line,) = cd.get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[10, 0.25]])


def scores() -> pd.DataFrame:
    def row(
        method: str, guidance: bool, sgp: str, z: str, steps: int, value: float, metric: str = "fd", sampler: str = "ddim"
    ) -> dict[str, Any]:
        floor = {"floor": 2.0, "floor_sd": 0.5} if metric == "fd" else {"floor": 9.0, "floor_sd": 9.0}
        about = {"method": method, "guidance": guidance, "sgp": sgp, "z": z, "sampler": sampler, "steps": steps}
        return {**about, "metric": metric, "value": value, **floor}

    return pd.DataFrame(
        [
            *(row("teacher", False, "", "", steps, 100.0 / steps) for steps in (64, 1, 4)),  # as a run scores them
            *(row("teacher", False, "", "", steps, 50.0 / steps, sampler="heun") for steps in (1, 4)),
            row("teacher", True, "", "", 64, 3.0),
            *(row("pd", guidance, "", "", steps, 20.0 / steps + guidance) for guidance in (False, True) for steps in (1, 4)),
            *(row("pd", guidance, "conditional", z, 1, 5.0 + guidance) for guidance in (False, True) for z in ("prior", "encoder", "mean")),
            row("one class", False, "", "", 0, 70.0),
            row("pd", False, "", "", 1, 0.3, "recall"),
        ]
    )


def test_a_metric_against_steps_has_a_line_a_method_stars_for_codes_of_the_prior_and_the_floor() -> None:
    figure = metric_versus_steps(scores(), "fd", "FD-digits-net")
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == ["teacher", "teacher, Heun", "teacher + guidance", "pd", "pd + guidance", "pd + SGP", "pd + guidance + SGP"]
    np.testing.assert_allclose(lines["teacher"].get_xydata(), [[1, 100], [4, 25], [64, 100 / 64]])
    np.testing.assert_allclose(lines["teacher, Heun"].get_xydata(), [[1, 50], [4, 12.5]])
    np.testing.assert_allclose(lines["pd + guidance"].get_xydata(), [[1, 21], [4, 6]])
    # Stars beside their step count, guided to the right.
    np.testing.assert_allclose(lines["pd + SGP"].get_xydata(), [[2**-0.09, 5]])
    np.testing.assert_allclose(lines["pd + guidance + SGP"].get_xydata(), [[2**0.09, 6]])
    assert (lines["pd"].get_linestyle(), lines["pd + guidance"].get_linestyle()) == ("-", "--")
    assert lines["pd"].get_color() == lines["pd + SGP"].get_color() != lines["teacher"].get_color()
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xticks().tolist() == [1, 4, 64]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("sampling steps", "FD-digits-net")
    (band,) = axes.patches
    heights = band.get_window_extent().transformed(axes.transData.inverted())
    assert (heights.y0, heights.y1) == (pytest.approx(1.5), pytest.approx(2.5))
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == [*lines, "real images (mean ± sd)"]


def test_no_star_of_a_step_count_stands_where_another_does() -> None:
    pairs = scores().query("sgp != ''")
    (axes,) = metric_versus_steps(pd.concat([scores(), pairs.assign(method="cd"), pairs.assign(method="teacher")]), "fd", "").axes
    places = sorted(float(line.get_xdata()[0]) for line in axes.get_lines() if line.get_marker() == "*")
    assert len(places) == 6
    assert np.diff(np.log2(places)).min() > 0.1
    assert 2**-0.5 < places[0] < 1 < places[-1] < 2**0.5  # nearer to its own column than to the next


def test_a_term_has_one_colour_and_its_interval_a_place_of_its_own() -> None:
    def terms(*names: str) -> pd.DataFrame:
        return pd.DataFrame([{"term": name, "value": 1.0, "low": 0.5, "high": 2.0, "by": "a"} for name in (*names, "total")])

    colours = {}
    for names in (("teacher_bias", "student_variance"), ("student_variance", "data_variance", "teacher_bias")):
        (axes,) = term_bars(terms(*names), "by").axes
        bars = {
            container.get_label(): container
            for container in axes.containers
            if container.get_label() in {n.replace("_", " ") for n in names}
        }
        for name, bar in bars.items():
            colours.setdefault(name, set()).add(bar.patches[0].get_facecolor())
        segments = [segment for lines in axes.collections for segment in lines.get_segments()]
        assert len({float(segment[0, 0]) for segment in segments}) == len(names) == len(bars)
        np.testing.assert_allclose([segment[:, 1] - at for at, segment in enumerate(segments)], [[0.5, 2.0]] * len(names))
    assert {name: len(found) for name, found in colours.items()} == {"teacher bias": 1, "student variance": 1, "data variance": 1}
    assert len(set.union(*colours.values())) == 3


def test_another_metric_has_its_own_rows_and_a_linear_axis() -> None:
    (axes,) = metric_versus_steps(scores(), "recall", "recall").axes
    (line,) = axes.get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.3]])
    assert axes.get_yscale() == "linear"


@pytest.mark.parametrize("metric", ["fid", "teacher_mse"])
def test_a_metric_without_a_floor_is_refused_with_those_that_have_one(metric: str) -> None:
    table = pd.concat([scores(), scores().head(1).assign(metric="teacher_mse", floor=None)])
    with pytest.raises(SferdError, match=f"metric = '{metric}'; allowed: fd, recall$"):
        metric_versus_steps(table, metric, "")


# ---- the evidence


def test_a_forest_has_a_line_for_every_ratio_at_its_place() -> None:
    found = ratios(read_table(shipped_folder() / "results" / "digits" / "metrics.csv"))
    axes = forest(found).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "pd +guidance, 1 step"
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 2]
    np.testing.assert_allclose([line.get_xdata() for line in lines], found[["low", "high"]].to_numpy()[::-1])
    for few in (found, found.iloc[:2]):  # none lies on the frame
        low, high = forest(few).axes[0].get_ylim()
        assert low < -0.3
        assert high > len(few) - 0.7


@pytest.mark.parametrize(("low", "high"), [(0.78, 1.12), (0.3, 4.0)])
def test_a_forest_has_three_ticks_or_more(low: float, high: float) -> None:
    line = {"method": "pd", "steps": 1, "variant": "+sgp", "ratio": 0.95, "low": low, "high": high}
    ticks = [float(label.get_text()) for label in forest(pd.DataFrame([line])).axes[0].get_xticklabels()]
    assert len(ticks) >= 3
    assert 1 in ticks
    assert low * 0.9 < min(ticks)
    assert max(ticks) < high * 1.1


def test_a_method_has_the_same_colour_in_the_forest_and_against_cost() -> None:
    table = read_table(shipped_folder() / "results" / "digits" / "metrics.csv")
    found = ratios(table)
    lines = {line.get_label(): line.get_color() for line in metric_versus_cost(table, "fd", "FD").axes[0].lines}
    drawn = [line.get_color() for line in forest(found).axes[0].lines if line.get_marker() == "o"]
    assert drawn == [lines[method] for method in found["method"][::-1]]


def test_a_metric_stands_at_what_its_sampling_costs() -> None:
    table = read_table(shipped_folder() / "results" / "digits" / "metrics.csv")
    axes = metric_versus_cost(table, "fd", "FD").axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert {"teacher", "pd", "pd + guidance", "cd + guidance + SGP"} <= set(lines)
    plain = table[(table["method"] == "pd") & ~table["guidance"] & (table["sgp"] == "")]
    for steps, x, y in zip((1, 2, 4), *lines["pd"].get_data(), strict=True):
        part = plain[plain["steps"] == steps].groupby("metric")["value"].mean()
        assert (x, y) == pytest.approx((part["sampling_mflops_per_image"], part["fd"]))
