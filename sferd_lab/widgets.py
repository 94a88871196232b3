"""Explorers for the notebooks: a picture and its description in words that follow the controls.

Every control is an ordinary ipywidgets slider or menu, so the keyboard moves it. With the environment variable SFERD_LAB_WIDGETS=0, as when
a notebook is run by papermill or nbval, picture and description are shown once, for the controls' first values.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import torch
from IPython.display import display
from matplotlib.figure import Figure
from torch import Tensor

from sferd_lab.diffusion import HALF_PI, add_noise, log_snr
from sferd_lab.plots import PALETTE, show_grid


def explore(draw: Callable[..., Figure], tell: Callable[..., str], **controls: ipywidgets.Widget) -> ipywidgets.Widget | None:
    """Show ``draw(**values)`` and ``tell(**values)``, again whenever one of the ``controls`` moves; give what holds them all, if shown."""

    def values() -> dict[str, Any]:
        return {name: control.value for name, control in controls.items()}

    if os.environ.get("SFERD_LAB_WIDGETS") == "0":
        figure = draw(**values())
        display(figure)
        plt.close(figure)
        print(tell(**values()))
        return None
    picture = ipywidgets.HTML()

    def update(_: object = None) -> None:
        figure, words, png = draw(**values()), html.escape(tell(**values())), io.BytesIO()
        figure.savefig(png, format="png", dpi=90)
        plt.close(figure)
        source = base64.b64encode(png.getvalue()).decode()
        # The description stands below the picture and is what a screen reader says of it.
        picture.value = f'<img src="data:image/png;base64,{source}" alt="{words}"><p>{words}</p>'

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

    def draw(t: float) -> Figure:
        phi = t * HALF_PI
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), width_ratios=(2, 1.3), layout="constrained")
        show_grid(left, torch.cat([images, add_noise(images, eps, phi)]), len(images), "above: x0, below: noised")
        right.plot(grid / HALF_PI, grid.cos(), color=PALETTE[0], label="signal: cos")
        right.plot(grid / HALF_PI, grid.sin(), "--", color=PALETTE[1], label="noise: sin")
        right.axvline(t, color="black", lw=0.8)
        right.set_xlabel("t")
        right.legend(fontsize=8)
        return figure

    def tell(t: float) -> str:
        phi = torch.tensor(t * HALF_PI, dtype=torch.float64)
        ratio = f"{log_snr(phi).item():.1f}" if 0 < t < 1 else "infinite" if t == 0 else "minus infinity"
        return f"t = {t:.2f}: the image counts {phi.cos().item():.2f}, the noise {phi.sin().item():.2f}; log SNR {ratio}."

    slider = ipywidgets.FloatSlider(value=0.5, min=0, max=1, step=0.05, description="t")
    return explore(draw, tell, t=slider)
