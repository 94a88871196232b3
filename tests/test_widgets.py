"""Explorers: picture and words follow the controls; without widgets both are there once."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import math
import re
import time

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

import sferd_lab
from sferd_lab import widgets
from sferd_lab.analysis.bias_variance import decompose
from sferd_lab.data import load_images

IMAGES = torch.linspace(-1, 1, 2 * 16).view(2, 1, 4, 4)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    displayed: list[object] = []
    monkeypatch.setattr(widgets, "display", displayed.append)
    return displayed


def test_picture_and_words_follow_the_slider(shown: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFERD_LAB_WIDGETS", raising=False)
    box = widgets.noise_explorer(IMAGES)
    assert shown == [box]
    slider, picture = box.children
    assert isinstance(slider, ipywidgets.FloatSlider)
    before = picture.value
    slider.value = 0.25
    assert "t = 0.25: the image counts 0.92, the noise 0.38; log SNR 1.8." in picture.value
    assert 'alt="t = 0.25: the image counts' in picture.value
    assert picture.value.split('alt="')[0] != before.split('alt="')[0]
    assert plt.get_fignums() == []


@pytest.mark.parametrize(("t", "words"), [(0.0, "counts 1.00, the noise 0.00; log SNR infinite"), (1.0, "log SNR minus infinity")])
def test_the_ends_have_words_too(shown: list[object], monkeypatch: pytest.MonkeyPatch, t: float, words: str) -> None:
    monkeypatch.delenv("SFERD_LAB_WIDGETS", raising=False)
    slider, picture = widgets.noise_explorer(IMAGES).children
    slider.value = t
    assert words in picture.value


def test_without_widgets_there_are_a_figure_and_a_sentence(
    shown: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFERD_LAB_WIDGETS", "0")
    assert widgets.noise_explorer(IMAGES) is None
    assert [type(item).__name__ for item in shown] == ["Figure"]
    assert capsys.readouterr().out.startswith("t = 0.50: the image counts 0.71")
    assert plt.get_fignums() == []


def test_words_are_text_not_markup(shown: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFERD_LAB_WIDGETS", raising=False)
    box = widgets.explore(lambda n: (plt.figure(figsize=(1, 1)), f'"{n}" < 3 & more'), n=ipywidgets.IntSlider(value=2))
    assert 'alt="&quot;2&quot; &lt; 3 &amp; more"' in box.children[-1].value


def test_the_guidance_explorer_says_what_guidance_changes(shown: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFERD_LAB_WIDGETS", raising=False)
    teacher, images = sferd_lab.load("digits/teacher").denoiser, load_images("digits").reference.images[:16]
    weight, threshold, _, picture = widgets.guidance_explorer(teacher, images).children
    before = picture.value
    weight.value = 0.0
    assert "guidance moves a pixel by 0.000" in picture.value
    weight.value = 2.0
    assert "weight 2.0" in picture.value
    assert picture.value != before
    for end in (threshold.min, threshold.max):  # no end of the slider is an error
        threshold.value = end
        assert f"threshold {end:.2f}" in picture.value
    started = time.process_time()
    weight.value = 1.5
    assert time.process_time() - started < 2  # half a second at most was seen


def test_the_code_explorer_walks_from_one_image_to_the_other(shown: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFERD_LAB_WIDGETS", raising=False)
    pair, images = sferd_lab.load("digits/pd-sgp-1").denoiser, load_images("digits").reference.images
    share, picture = widgets.code_explorer(pair, images[3:4], images[5:6]).children
    differences = []
    for value in (0.0, 1.0):
        share.value = value
        found = re.search(r"differs from one by (\d+\.\d+), from other by (\d+\.\d+)", picture.value)
        differences.append((float(found[1]), float(found[2])))
    assert differences[0][0] < differences[0][1]
    assert differences[1][1] < differences[1][0]


def test_the_sampler_explorer_counts_what_a_walk_costs(shown: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFERD_LAB_WIDGETS", raising=False)
    sampler, steps, picture = widgets.sampler_explorer(sferd_lab.load("digits/teacher").denoiser, (1, 8, 8)).children
    assert "ddim, 8 steps, 8 evaluations" in picture.value
    steps.value = 1
    assert "ddim, 1 steps, 1 evaluations: the first guess and the image differ by 0.00." in picture.value
    steps.value = 20
    for name in sampler.options:
        sampler.value = name
        assert f"{name}, 20 steps, {39 if name == 'heun' else 20} evaluations" in picture.value


def test_the_students_explorer_compares_with_its_first(shown: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFERD_LAB_WIDGETS", raising=False)
    student, pair = sferd_lab.load("digits/pd-1"), sferd_lab.load("digits/pd-sgp-1")
    noise, picture = widgets.students_explorer({"one": (student, 1), "same": (student, 1), "pair": (pair, 1)}, count=3).children
    before = picture.value
    noise.value = 7
    words = re.search(r"noise 7, root mean square distance to the first row: same (\d\.\d\d); pair (\d\.\d\d)\.", picture.value)
    wanted = (pair.sample(3, 1, seed=7) - student.sample(3, 1, seed=7)).square().mean().sqrt().item()
    assert words[1] == "0.00"
    assert float(words[2]) == pytest.approx(wanted, abs=0.006)
    assert wanted > 0.1
    assert picture.value.split("<p>")[0] != before.split("<p>")[0]


def test_the_error_explorer_follows_level_and_layer(shown: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFERD_LAB_WIDGETS", raising=False)
    teacher, images = sferd_lab.load("digits/teacher").denoiser, load_images("digits").reference.images[:40]
    level, layer, picture = widgets.error_explorer(teacher, images, which=2).children
    assert layer.value == "decoder.1.0"
    errors = []
    for value in (0.1, 0.5, 1.0):
        level.value = value
        found = re.search(rf"t = {value:.2f}, decoder.1.0: mean squared error (\d\.\d+), here (\d\.\d+); .* over 40 images", picture.value)
        errors.append(float(found[1]))
    assert errors == sorted(errors)
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        guess = teacher(eps, math.pi / 2).x0
    assert errors[-1] == pytest.approx((guess - images).square().mean().item(), abs=6e-4)
    assert float(found[2]) == pytest.approx((guess - images)[2].square().mean().item(), abs=6e-4)
    agreements = set()
    for name in teacher.attention_layers:
        layer.value = name
        agreements.add(re.search(rf"{name}: .*rank correlation of attention and error (-?\d\.\d+)", picture.value)[1])
    assert len(agreements) > 2


def test_the_ensemble_explorer_shows_what_decompose_says(shown: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFERD_LAB_WIDGETS", raising=False)
    generator = torch.Generator().manual_seed(0)
    teachers = torch.randn(5, 30, 1, generator=generator, dtype=torch.float64)
    students = teachers[:, None] + torch.randn(5, 4, 30, 1, generator=generator, dtype=torch.float64)
    m = torch.zeros(30, 1, dtype=torch.float64)
    k, m_students, picture = widgets.ensemble_explorer(students, teachers, m).children
    k.value, m_students.value = 3, 3
    found = decompose(students[:3, :3], teachers[:3], m).table().set_index("term")
    assert f"teacher variance {found.loc['teacher_variance', 'value']:.3f} [{found.loc['teacher_variance', 'low']:.3f}, " in picture.value
    k.value = 2  # of two teachers there is no interval
    assert "[" not in picture.value.split("<p>")[1]


def scores(values: dict[tuple[str, int, int], float], metric: str = "fd") -> pd.DataFrame:
    """Lines of a ``metrics.csv`` by method, steps and seed."""
    identity = {"guidance": False, "sgp": "", "z": "", "sampler": "ddim", "metric": metric, "floor": 0.5, "floor_sd": 0.1}
    return pd.DataFrame([{"method": m, "steps": k, "seed": seed, "value": v, **identity} for (m, k, seed), v in values.items()])


def test_scores_name_the_mean_and_the_number_of_seeds_of_every_kind(shown: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFERD_LAB_WIDGETS", raising=False)
    fd = scores({("teacher", 1, 1): 90.0, ("pd", 1, 1): 2.0, ("pd", 1, 2): 3.0, ("cd", 1, 1): 1.5, ("pd", 4, 1): 1.25})
    kid = scores({("pd", 1, 1): -0.25, ("pd", 4, 1): 0.75}, "kid")
    metric, steps, picture = widgets.scores_explorer(pd.concat([fd, kid])).children
    words = "fd, 1 step, mean (number of seeds), real images 0.5: cd 1.5 (1); pd 2.5 (2); teacher 90 (1)."
    assert words in picture.value
    steps.value = 4
    assert "fd, 4 steps, mean (number of seeds), real images 0.5: pd 1.25 (1)." in picture.value
    metric.value = "kid"
    assert "kid, 4 steps, mean (number of seeds), real images 0.5: pd 0.75 (1)." in picture.value
    steps.value = 1
    assert "kid, 1 step, mean (number of seeds), real images 0.5: pd -0.25 (1)." in picture.value


def test_scores_tell_the_samplers_apart_and_take_a_teacher_alone(
    shown: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFERD_LAB_WIDGETS", "0")
    table = scores({("teacher", 8, 1): 2.0})
    widgets.scores_explorer(pd.concat([table, table.assign(sampler="heun", value=1.0)]))
    assert "teacher, Heun 1 (1); teacher 2 (1)." in capsys.readouterr().out
