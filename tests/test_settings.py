"""Settings: presets, and words for whatever does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from sferd_lab.config import TINY, Settings, make_settings, notebook_parameters, parse_literals, presets
from sferd_lab.errors import SferdError


@pytest.fixture(autouse=True)
def _not_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFERD_LAB_TINY", raising=False)


@pytest.mark.parametrize("preset", presets())
def test_every_preset_is_valid_and_none_keeps_its_value(preset: str) -> None:
    settings = make_settings(preset)
    assert make_settings(preset, **dict.fromkeys(set(Settings.model_fields) - {"preset"})) == settings
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"preset": "digit"}, "preset = 'digit'; allowed: digits, fashion16"),
        ({"sed": 1}, "unknown parameter 'sed' = 1; allowed: preset, seed"),
        ({"seed": -1}, "'seed' = -1: .*greater than or equal to 0"),
        ({"seed": "one"}, "'seed' = 'one': .*integer"),
        ({"teacher_lr": float("nan")}, "'teacher_lr' = nan"),
        ({"ema_decay": 1.0}, "'ema_decay' = 1.0: .*less than 1"),
        ({"pd_loss": "l3"}, "'pd_loss' = 'l3': .*'v' or 'x0_snr'"),
        ({"widths": []}, r"'widths' = \[\]: .*at least 1"),
        ({"pd_start_steps": 6, "pd_stage_steps": [5]}, "pd_start_steps = 6: 6 steps cannot be halved to 1"),
        ({"pd_stage_steps": [5]}, r"pd_stage_steps = \(5,\); allowed: 3 numbers"),
        ({"sampling_steps": [3]}, r"sampling_steps = \(3,\); allowed: step counts among \[4, 2, 1\]"),
        ({"sgp_sampling_steps": [2]}, r"sgp_sampling_steps = \(2,\); allowed: among \[1\]"),
        ({"sgp_start_steps": 3}, "sgp_start_steps = 3: 3 steps cannot be halved"),
        ({"sgp_target": "data", "sgp_sampling_steps": [4], "cd_boundaries": 6}, "divisors of cd_boundaries = 6"),
        ({"blur_kernel": 4}, "blur_kernel = 4; allowed: odd"),
        ({"attention": [2]}, r"attention = \(2,\); allowed: levels 0 to 1"),
        ({"heads": 3}, r"heads = 3; allowed: common divisors of widths = \(32, 32\)"),
    ],
)
def test_what_does_not_fit_is_named_with_its_value_and_what_is_allowed(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SferdError, match=words):
        make_settings(**given)


def test_lists_given_as_text_are_read_and_nothing_is_run_as_code() -> None:
    assert make_settings(sampling_steps="[1, 2]").sampling_steps == (1, 2)
    assert parse_literals(["a=[1, 2]", "b=x", "c=0.5", "d=__import__('os').getcwd()"]) == {
        "a": [1, 2], "b": "x", "c": 0.5, "d": "__import__('os').getcwd()",
    }  # fmt: skip
    with pytest.raises(SferdError, match="argument 'seed'; allowed: name=value"):
        parse_literals(["seed"])


def test_tiny_shrinks_what_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    settings = make_settings("digits", teacher_steps=77)
    assert settings.teacher_steps == 77
    assert settings.cd_steps == TINY["cd_steps"]


def test_parameters_are_those_of_the_cells_that_only_assign_literals() -> None:
    cells = ["", "x = 1\nprint(x)", "preset: str = 'digits'\nseed: int = None", "# Parameters\nsed = 3", "make_settings(...)"]
    namespace = {"In": cells, "x": 1, "preset": "digits", "seed": None, "sed": 3}
    assert notebook_parameters(namespace) == {"preset": "digits", "seed": None, "sed": 3}
    # Run again later: scratch names of other cells are no parameters.
    later = [*cells, "y = 5\nplot(y)", "preset: str = 'digits'\nseed: int = 7", "make_settings(...)"]
    assert notebook_parameters({**namespace, "In": later, "seed": 7}) == {"preset": "digits", "seed": 7}
