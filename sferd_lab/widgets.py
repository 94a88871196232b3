"""Explorers for the notebooks: a picture and its description in words that follow the controls.

Every control is an ordinary ipywidgets slider, so the arrow keys move it (JupyterLab keeps those of a menu for itself). With the
environment variable SFERD_LAB_WIDGETS=0, as when a notebook is run by papermill or nbval, picture and description are shown once, for the
controls' first values.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
import textwrap
from collections.abc import Callable, Mapping

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display
from matplotlib.figure import Figure
from torch import Tensor

from sferd_lab.analysis.bias_variance import decompose
from sferd_lab.analysis.spatial import error_map, mean_interval, spearman, to_grid
from sferd_lab.artifacts import Pretrained
from sferd_lab.denoiser import Denoiser
from sferd_lab.diffusion import HALF_PI, add_noise, angle_grid, log_snr
from sferd_lab.experiment import Row
from sferd_lab.guidance import default_layer, gaussian_blur, guidance_mask, guide
from sferd_lab.plots import PALETTE, maps_row, same_noise_rows, show_grid, term_bars, trajectory
from sferd_lab.sample import SAMPLERS, SampleNoise, sample
from sferd_lab.semantic import SemanticDenoiser


def explore(show: Callable[..., tuple[Figure, str]], **controls: ipywidgets.Widget) -> ipywidgets.Widget | None:
    """Display picture and words of ``show(**values)``, again whenever one of the ``controls`` moves; give what holds them all, if shown."""

    def shown() -> tuple[Figure, str]:
        figure, words = show(**{name: control.value for name, control in controls.items()})
        plt.close(figure)  # or the notebook would show it once more
        return figure, words

    if os.environ.get("SFERD_LAB_WIDGETS") == "0":
        figure, words = shown()
        display(figure)
        print(textwrap.fill(words, 110))
        return None
    picture = ipywidgets.HTML()

    def update(_: object = None) -> None:
        (figure, words), png = shown(), io.BytesIO()
        figure.savefig(png, format="png", dpi=90)
        source, words = base64.b64encode(png.getvalue()).decode(), html.escape(words)
        # The description stands below the picture and is what a screen reader says of it.
        # Neither may be wider than the cell, which would cut off what does not fit.
        picture.value = f'<img style="max-width: 100%" src="data:image/png;base64,{source}" alt="{words}"><p>{words}</p>'

    for control in controls.values():
        control.observe(update, "value")
    update()
    box = ipywidgets.VBox([*controls.values(), picture])
    display(box)
    return box


def noise_explorer(images: Tensor, seed: int = 0) -> ipywidgets.Widget | None:
    """The forward process at a level t = phi / (pi/2) of choice: up to 8 ``images`` (N, C, H, W), and the weights of signal and noise."""
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    grid = torch.linspace(0, HALF_PI, 200)

    def show(t: float) -> tuple[Figure, str]:
        phi = torch.tensor(t * HALF_PI, dtype=torch.float64)
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), width_ratios=(2, 1.3), layout="constrained")
        show_grid(left, torch.cat([images, add_noise(images, eps, phi)]), len(images), "above: x0, below: noised")
        right.plot(grid / HALF_PI, grid.cos(), color=PALETTE[0], label="signal: cos")
        right.plot(grid / HALF_PI, grid.sin(), "--", color=PALETTE[1], label="noise: sin")
        right.axvline(t, color="black", lw=0.8)
        right.set_xlabel("t")
        right.legend(fontsize=8)
        ratio = f"{log_snr(phi).item():.1f}" if 0 < t < 1 else "infinite" if t == 0 else "minus infinity"
        return figure, f"t = {t:.2f}: the image counts {phi.cos().item():.2f}, the noise {phi.sin().item():.2f}; log SNR {ratio}."

    slider = ipywidgets.FloatSlider(value=0.5, min=0, max=1, step=0.05, description="t")
    return explore(show, t=slider)


def sampler_explorer(denoiser: Denoiser, shape: tuple[int, int, int], seed: int = 0) -> ipywidgets.Widget | None:
    """One walk from noise to an image of ``shape`` (C, H, W), by a sampler and with a number of steps of choice."""

    def show(sampler: str, steps: int) -> tuple[Figure, str]:
        noise, before = SampleNoise(seed, 1), denoiser.nfe().total()
        with torch.inference_mode():
            states = list(SAMPLERS[sampler](denoiser, noise.draw(shape), angle_grid(steps, denoiser.phi_hi), noise))
        # At most nine of them, first and last included.
        places = sorted({round(place) for place in torch.linspace(0, steps, min(steps + 1, 9)).tolist()})
        predictions = [states[place + 1].prediction.x0 for place in places[:-1]]
        figure = trajectory([states[place].x for place in places], predictions, [states[place].phi for place in places])
        spent, changed = denoiser.nfe().total() - before, (predictions[0] - states[-1].x).square().mean().sqrt().item()
        return figure, f"{sampler}, {steps} steps, {spent} evaluations: the first guess and the image differ by {changed:.2f}."

    return explore(
        show,
        sampler=ipywidgets.SelectionSlider(value="ddim", options=sorted(SAMPLERS), description="sampler"),
        steps=ipywidgets.IntSlider(value=8, min=1, max=64, description="steps"),
    )


def guidance_explorer(teacher: Denoiser, images: Tensor, t: float = 0.6, form: str = "x0", seed: int = 0) -> ipywidgets.Widget | None:
    """Attention guidance of a teacher on noised ``images`` (N, C, H, W): weight, threshold and blur of choice, and what they change."""
    phi, layer = t * HALF_PI, default_layer(teacher.attention_layers)
    x = add_noise(images, torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)), phi)
    with torch.inference_mode():
        first = teacher(x, phi, [layer])
    received = first.attention[layer].received()

    def show(w: float, threshold: float, sigma: float) -> tuple[Figure, str]:
        with torch.inference_mode():
            mask = guidance_mask(first.attention[layer], first.x0, threshold)
            guided = guide(teacher, first, x, phi, mask, w, form, 5, sigma).x0
        blurred = mask * gaussian_blur(first.x0, 5, sigma) + (1 - mask) * first.x0
        figure, grid = plt.subplots(1, 4, figsize=(10, 2.7), layout="constrained")
        pictures = {"guess": first.x0, "mask": 2 * mask - 1, "blurred where masked": blurred, f"guided, form {form}": guided}
        for axes, (name, picture) in zip(grid, pictures.items(), strict=True):
            show_grid(axes, picture, 4, name)
        moved = (guided - first.x0).square().mean().sqrt().item()
        settings = f"weight {w:.1f}, threshold {threshold:.2f}, blur {sigma:.1f} pixels"
        changes = f"{mask.mean().item():.0%} of the image is masked, and guidance moves a pixel by {moved:.3f} (root mean square)"
        return figure, f"{settings}: {changes}."

    # Within these bounds the mask is neither empty nor everything; a browser would round a value that is not on the slider's grid.
    low, high = math.ceil(20 * received.min().item() + 0.2) / 20, math.floor(20 * received.max().item() - 0.2) / 20
    return explore(
        show,
        w=ipywidgets.FloatSlider(value=1.0, min=0, max=3, step=0.1, description="weight"),
        threshold=ipywidgets.FloatSlider(value=1.0, min=low, max=high, step=0.05, description="threshold"),
        sigma=ipywidgets.FloatSlider(value=1.0, min=0.3, max=3, step=0.1, description="blur"),
    )


def code_explorer(pair: SemanticDenoiser, one: Tensor, other: Tensor, count: int = 8, seed: int = 0) -> ipywidgets.Widget | None:
    """A walk from the code of the image ``one`` (1, C, H, W) to that of ``other``: what ``pair`` draws in a step from ``count`` noises."""
    with torch.inference_mode():
        ends = pair.encoder(torch.cat([one, other]))

    def show(share: float) -> tuple[Figure, str]:
        z = torch.lerp(ends[0], ends[1], share).expand(count, -1)
        drawn = sample(pair, count, one.shape[1:], 1, seed=seed, condition={"z": z}).images
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(8, 1.6), width_ratios=(1, count, 1), layout="constrained")
        show_grid(left, one, 1, "one")
        show_grid(middle, drawn, count, f"{share:.0%} of the way, {count} noises")
        show_grid(right, other, 1, "other")
        near = [(drawn.mean(0) - image[0]).square().mean().item() for image in (one, other)]
        walked = f"{share:.0%} of the way from one code to the other"
        return figure, f"{walked}: the mean drawing differs from one by {near[0]:.2f}, from other by {near[1]:.2f}."

    return explore(show, share=ipywidgets.FloatSlider(value=0.5, min=0, max=1, step=0.05, description="share"))


def students_explorer(models: Mapping[str, tuple[Pretrained, int]], count: int = 8) -> ipywidgets.Widget | None:
    """What ``models``, each with a number of steps, make of the same ``count`` noises; the first is what the others are compared with."""

    def show(noise: int) -> tuple[Figure, str]:
        drawn = {name: model.sample(count, steps, seed=noise) for name, (model, steps) in models.items()}
        first, *others = drawn
        apart = {name: (drawn[name] - drawn[first]).square().mean().sqrt().item() for name in others}
        distances = "; ".join(f"{name} {value:.2f}" for name, value in apart.items())
        return same_noise_rows(drawn, count), f"noise {noise}, root mean square distance to the first row: {distances}."

    return explore(show, noise=ipywidgets.IntSlider(value=1, min=1, max=50, description="noise"))


def error_explorer(denoiser: Denoiser, images: Tensor, which: int = 0, seed: int = 0) -> ipywidgets.Widget | None:
    """Where ``denoiser``'s guess of image ``which`` is wrong, beside what a layer attends to, at a noise level t and layer of choice.

    The rank correlation is over all ``images`` (N, C, H, W), at the layer's resolution.
    """
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))

    def show(t: float, layer: str) -> tuple[Figure, str]:
        phi = t * HALF_PI
        x = add_noise(images, eps, phi)
        with torch.inference_mode():
            prediction = denoiser(x, phi, [layer])
        guess, attention = prediction.x0, prediction.attention[layer].received().numpy()
        error = error_map(guess, images)
        pooled = to_grid(error, attention.shape[1:])
        shown = {"image": images[which].mean(0).numpy(), "noised": x[which].mean(0).numpy(), "guess": guess[which].mean(0).numpy()}
        figure = maps_row(shown | {"squared error": error[which], f"attention, {layer}": attention[which]})
        value, low, high, count = mean_interval(spearman(attention, pooled))
        agreement = f"rank correlation of attention and error {value:.2f} [{low:.2f}, {high:.2f}] over {count} images"
        return figure, f"t = {t:.2f}, {layer}: mean squared error {error.mean():.3f}, here {error[which].mean():.3f}; {agreement}."

    layers = denoiser.attention_layers
    return explore(
        show,
        t=ipywidgets.FloatSlider(value=0.5, min=0.1, max=1, step=0.1, description="t", continuous_update=False),
        layer=ipywidgets.SelectionSlider(value=default_layer(layers), options=layers, description="layer"),
    )


def ensemble_explorer(students: Tensor, teachers: Tensor, m: Tensor) -> ipywidgets.Widget | None:
    """The decomposition of ``decompose(students, teachers, m)`` from the first K teachers and M students of each, of choice."""

    def show(k: int, m_students: int) -> tuple[Figure, str]:
        estimates = {"plug-in": False, "unbiased": True}
        found = {name: decompose(students[:k, :m_students], teachers[:k], m, unbiased=unbiased) for name, unbiased in estimates.items()}
        table = pd.concat([part.table().assign(estimate=name) for name, part in found.items()])
        figure = term_bars(table, "estimate", f"{k} teachers, {m_students} students each")
        terms = table[table["estimate"] == "unbiased"].set_index("term")
        words = "; ".join(
            f"{term.replace('_', ' ')} {line['value']:.3f}" + ("" if k < 3 else f" [{line['low']:.3f}, {line['high']:.3f}]")
            for term, line in terms.iterrows()
        )
        return figure, f"{k} teachers, {m_students} students each, unbiased: {words}."

    most_teachers, most_students = students.shape[:2]
    return explore(
        show,
        k=ipywidgets.IntSlider(value=min(4, most_teachers), min=2, max=most_teachers, description="teachers"),
        m_students=ipywidgets.IntSlider(value=2, min=2, max=most_students, description="students"),
    )


def scores_explorer(table: pd.DataFrame) -> ipywidgets.Widget | None:
    """Every kind of samples in ``table`` (one or more runs' ``metrics.csv``) by a metric and number of steps of choice, a dot a seed.

    The line with its band is the floor: what real images get, mean and standard deviation.
    """
    kinds = table[(table["steps"] > 0) & table["floor"].notna()]
    names = kinds[list(Row.__dataclass_fields__)].apply(lambda row: Row(*row).label.split(", ")[0], axis=1)
    kinds = kinds.assign(samples=names + kinds["sampler"].eq("heun").map({True: ", Heun", False: ""}))

    def show(metric: str, steps: int) -> tuple[Figure, str]:
        rows = kinds[(kinds["metric"] == metric) & (kinds["steps"] == steps)].drop_duplicates(["samples", "seed"])
        means = rows.groupby("samples", sort=False)["value"].mean().sort_values()
        figure, axes = plt.subplots(figsize=(7, 0.6 + 0.3 * max(3, len(means))), layout="constrained")
        floor, spread = rows[["floor", "floor_sd"]].iloc[0]
        axes.axvspan(floor - spread, floor + spread, color="gray", alpha=0.3)
        axes.axvline(floor, color="gray", label="real images")
        axes.plot(rows["value"], [list(means.index).index(name) for name in rows["samples"]], "o", color=PALETTE[0], mfc="none")
        axes.plot(means, range(len(means)), "|", ms=12, mew=2, color=PALETTE[1], label="mean over seeds")
        axes.set_yticks(range(len(means)), means.index)
        axes.invert_yaxis()
        axes.set_xscale("log" if means.min() > 0 and means.max() > 20 * means.min() else "linear")
        axes.set_xlabel(f"{metric}, {steps} step{'s' * (steps > 1)}")
        axes.legend(fontsize=8)
        counts = rows.groupby("samples")["seed"].nunique()
        told = "; ".join(f"{name} {value:.3g} ({counts[name]})" for name, value in means.items())
        return figure, f"{metric}, {steps} step{'s' * (steps > 1)}, mean (number of seeds), real images {floor:.3g}: {told}."

    few = sorted(set(kinds.loc[kinds["method"] != "teacher", "steps"])) or sorted(set(kinds["steps"]))
    return explore(
        show,
        metric=ipywidgets.SelectionSlider(value="fd", options=list(dict.fromkeys(kinds["metric"])), description="metric"),
        steps=ipywidgets.SelectionSlider(value=few[0], options=few, description="steps"),
    )
