"""Settings: what is valid, what is refused and in which words, and how a notebook and a command line hand them over."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from sferd_lab.config import PRESETS, TINY, Settings, make_settings, notebook_parameters, parse_literals, presets, read_parameters
from sferd_lab.data import SIZES
from sferd_lab.errors import SferdError


@pytest.fixture(autouse=True)
def _full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFERD_LAB_TINY", raising=False)


# ---- presets


def test_every_preset_makes_valid_settings_of_data_that_exist() -> None:
    assert presets() == ("digits", "fashion16", "patches", "mixture", "cifar10", "imagenet64")
    for name in presets():
        settings = make_settings(name)
        assert settings.preset == name
        assert {field: getattr(settings, field) for field in PRESETS[name]} == PRESETS[name]
        assert (settings.image_size or SIZES[settings.data][0]) in SIZES[settings.data]


STUDIES = sorted((Path(__file__).parent.parent / "data" / "studies").glob("*/*.yaml"))
RESULTS = Path(__file__).parent.parent / "data" / "results"


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_every_file_of_parameters_makes_valid_settings_of_its_preset(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    settings = make_settings(**given)
    assert settings.preset == path.parent.name
    assert settings != make_settings(settings.preset)
    assert json.loads(settings.model_dump_json(include=set(given))) == given


def test_the_default_preset_is_digits_and_given_values_take_the_place_of_its() -> None:
    assert make_settings() == make_settings("digits")
    settings = make_settings(seed=7, widths=[16, 16])
    assert (settings.seed, settings.widths) == (7, (16, 16))
    assert settings.model_copy(update={"seed": 1, "widths": (32, 32)}) == make_settings()


def test_none_keeps_the_presets_value() -> None:
    assert make_settings("fashion16", **dict.fromkeys(set(Settings.model_fields) - {"preset"})) == make_settings("fashion16")
    assert make_settings("fashion16", image_size=None).image_size == 16


@pytest.mark.parametrize("name", ["nope", 3, ["digits"], None, ""])
def test_an_unknown_preset_is_refused_with_the_known_ones(name: Any) -> None:
    with pytest.raises(SferdError, match=re.escape(f"preset = {name!r}; allowed: digits, fashion16, patches, mixture")):
        make_settings(name)


def test_every_setting_says_what_it_is() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_settings_cannot_be_changed() -> None:
    settings = make_settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 2
    assert settings.seed == 1


def test_settings_survive_json() -> None:
    for name in presets():
        settings = make_settings(name, guided=[True], run_folder="runs/größer")
        assert Settings.model_validate_json(settings.model_dump_json()) == settings
        assert Settings.model_validate(json.loads(json.dumps(settings.model_dump(mode="json")))) == settings


# ---- refusals


def test_an_unknown_parameter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SferdError, match=r"unknown parameter 'sed' = 3; allowed: preset, seed, .*, checkpoint_every$"):
        make_settings(sed=3)
    with pytest.raises(SferdError, match="unknown parameter 'sed' = None"):
        make_settings(sed=None)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("seed", "one", "valid integer"),
        ("seed", 3.5, "valid integer"),
        ("seed", [3], "valid integer"),
        ("teacher_lr", "fast", "valid number"),
        ("retrain", "perhaps", "valid boolean"),
        ("methods", "pd", "valid tuple"),
        ("widths", 32, "valid tuple"),
        ("widths", (16, "a"), "valid integer"),
        ("run_folder", 3, "valid string"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**31, f"less than {2**31}"),
        ("teacher_steps", 0, "greater than or equal to 1"),
        ("teacher_steps", 10**10, f"less than or equal to {10**9}"),
        ("teacher_lr", 0, "greater than 0"),
        ("teacher_lr", float("nan"), "finite number"),
        ("teacher_lr", float("inf"), "finite number"),
        ("ema_decay", 1.0, "less than 1"),
        ("ema_decay", float("nan"), "less than 1"),
        ("label_dropout", -0.1, "greater than or equal to 0"),
        ("guidance_weight", 11, "less than or equal to 10"),
        ("guidance_weight", float("nan"), "less than or equal to 10"),
        ("z_noise", 2.5, "less than or equal to 2"),
        ("n_samples", 1, "greater than or equal to 2"),
        ("checkpoint_every", -1, "greater than or equal to 0"),
        ("widths", (), "at least 1 item"),
        ("widths", (8,) * 17, "at most 16 items"),
        ("attention", (-1,), "greater than or equal to 0"),
        ("sampling_steps", (1, 0), "greater than or equal to 1"),
        ("data", "cifar", "'digits', 'fashion-mnist', 'patches', 'mixture', 'cifar10', 'imagenet64' or 'folder'"),
        ("methods", ("pd", "ddim"), "'pd' or 'cd'"),
        ("cd_loss", "l1", "'l2', 'pseudo_huber' or 'v'"),
        ("sgp_target", "none", "'walk', 'data' or 'conditional'"),
        ("device", "cuda", "'auto' or 'cpu'"),
    ],
)
def test_a_wrong_type_or_value_is_refused_by_name_with_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(SferdError, match=re.escape(f"parameter '{name}' = {value!r}: ") + ".*" + re.escape(allowed)):
        make_settings(**{name: value})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        # Halving ends at 1 only from a power of two above it.
        ({"pd_start_steps": 6}, "pd_start_steps = 6: 6 steps cannot be halved to 1; allowed: 1 times 2, 4, 8, ..."),
        ({"pd_start_steps": 1}, "pd_start_steps = 1: 1 steps cannot be halved to 1; allowed: 1 times 2, 4, 8, ..."),
        ({"sgp_start_steps": 3}, "sgp_start_steps = 3: 3 steps cannot be halved to 1; allowed: 1 times 2, 4, 8, ..."),
        ({"pd_stage_steps": (1, 2)}, "pd_stage_steps = (1, 2); allowed: 3 numbers, since 8 teacher steps halve to [4, 2, 1]"),
        ({"sampling_steps": (1, 3)}, "sampling_steps = (1, 3); allowed: step counts among [4, 2, 1], what pd_start_steps halves to"),
        ({"sampling_steps": (8,)}, "sampling_steps = (8,); allowed: step counts among [4, 2, 1], what pd_start_steps halves to"),
        ({"sgp_sampling_steps": (2,)}, "sgp_sampling_steps = (2,); allowed: among [1], what sgp_start_steps halves to"),
        (
            {"sgp_sampling_steps": (3,), "sgp_target": "walk"},
            "sgp_sampling_steps = (3,); allowed: step counts among [4, 2, 1], what pd_start_steps halves to",
        ),
        ({"blur_kernel": 4}, "blur_kernel = 4; allowed: odd numbers"),
        ({"attention": (0, 2)}, "attention = (0, 2); allowed: levels 0 to 1"),
        ({"heads": 3}, "heads = 3; allowed: common divisors of widths = (32, 32)"),
        ({"heads": 4, "widths": (8, 6)}, "heads = 4; allowed: common divisors of widths = (8, 6)"),
        # Batch norm has no standard deviation of one code.
        *(
            (
                {"classifier_free": 2.0, "class_conditional": labels, "sgp": sgp},
                f"classifier_free = 2.0 with class_conditional = {labels} and sgp = {sgp}; allowed: a scale other than 1 with labels "
                "and without sgp, whose samples have a code in place of a label",
            )
            for labels, sgp in ((False, True), (True, True), (False, False))
        ),
        ({"batch_size": 1}, "batch_size = 1; allowed: 2 or more with sgp, whose encoder standardises codes over a batch"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_words(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(SferdError) as caught:
        make_settings(**parameters)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "parameters",
    [
        {"pd_start_steps": 2, "pd_stage_steps": (5,), "sampling_steps": (1,)},
        {"pd_start_steps": 64, "pd_stage_steps": (1,) * 6, "sampling_steps": (32,)},
        {"sampling_steps": (3,), "methods": ("cd",)},
        {"sgp_sampling_steps": (1, 2), "sgp_start_steps": 4},
        {"sgp_sampling_steps": (4, 2, 1), "sgp_target": "data"},
        {"attention": (), "widths": (4, 6, 8)},
        {"batch_size": 1, "sgp": False},
        {"classifier_free": 2.0, "class_conditional": True, "sgp": False},
        {"guidance_weight": -0.7},  # the authors' scale of 0.3
    ],
)
def test_settings_on_the_right_side_of_each_rule_are_accepted(parameters: dict[str, Any]) -> None:
    settings = make_settings(**parameters)
    assert {name: getattr(settings, name) for name in parameters} == parameters


# ---- small runs


def test_tiny_shrinks_what_is_not_given_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    full = {name: make_settings(name) for name in presets()}
    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    for name in presets():
        tiny = make_settings(name)
        assert {field: getattr(tiny, field) for field in TINY} == TINY
        assert tiny.model_copy(update={field: getattr(full[name], field) for field in TINY}) == full[name]
    assert make_settings(teacher_steps=None).teacher_steps == TINY["teacher_steps"]
    monkeypatch.setenv("SFERD_LAB_TINY", "0")
    assert make_settings() == full["digits"]


def test_tiny_never_changes_or_refuses_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    full = make_settings()
    monkeypatch.setenv("SFERD_LAB_TINY", "1")
    given = {name: getattr(full, name) for name in TINY}
    assert make_settings(**given) == full
    # One at a time: no tiny value contradicts a value that is right without it.
    for name, value in given.items():
        assert getattr(make_settings(**{name: value}), name) == value


# ---- from a notebook

PARAMETERS = "# None keeps the preset's value.\npreset: str = 'digits'\nseed: int = None"


def run_cells(*cells: str) -> dict[str, Any]:
    """The namespace that IPython would give to the last cell."""
    namespace: dict[str, Any] = {"In": [""]}
    for source in cells:
        namespace["In"].append(source)
        if "notebook_parameters" not in source:
            exec(source, namespace)
    return namespace


CALL = "settings = make_settings(**notebook_parameters(globals()))"


def test_a_notebooks_parameters_are_those_of_its_parameters_cell() -> None:
    assert notebook_parameters(run_cells(PARAMETERS, CALL)) == {"preset": "digits", "seed": None}


def test_papermills_cell_overrides_and_its_unknown_names_are_found() -> None:
    found = notebook_parameters(run_cells("import math", PARAMETERS, "# Parameters\nseed = 5\nsed = 3\n", CALL))
    assert found == {"preset": "digits", "seed": 5, "sed": 3}
    with pytest.raises(SferdError, match="unknown parameter 'sed' = 3"):
        make_settings(**found)


def test_variables_of_other_cells_are_nobodys_parameters() -> None:
    cells = ("import math", "scratch = 3", "radius = math.sqrt(2)", PARAMETERS, CALL, "later = 1")
    assert notebook_parameters(run_cells(*cells[:-1])) == {"preset": "digits", "seed": None}
    # And again from below, after other cells: the settings are still in the namespace, whatever was assigned in between is not one.
    again = run_cells(*cells, "later = math.sqrt(later)", CALL)
    assert notebook_parameters(again) == {"preset": "digits", "seed": None}


def test_the_parameters_cell_can_be_run_again_after_other_cells() -> None:
    changed = PARAMETERS.replace("None", "9") + "\nsed = 3"
    namespace = run_cells(PARAMETERS, CALL, "scratch = [1]", "total = sum(scratch)", changed, CALL)
    assert notebook_parameters(namespace) == {"preset": "digits", "seed": 9, "sed": 3}
    # A name that was wrong once and is right now is forgotten.
    mended = run_cells("sed = 3", CALL, "pass", PARAMETERS, CALL)
    assert notebook_parameters(mended) == {"preset": "digits", "seed": None}


@pytest.mark.parametrize(
    "other",
    ["%matplotlib inline", "", "# a comment", "x = y = 1; z = x", "a, b = 1, 2", "f()", "scratch += 1", "x = {[1]: 2}", "scratch: int"],
)
def test_a_cell_that_does_more_than_assign_literals_ends_the_parameters(other: str) -> None:
    namespace = {"In": ["", "scratch = 1", other, PARAMETERS, CALL], "scratch": 1, "preset": "digits", "seed": None}
    assert notebook_parameters(namespace) == {"preset": "digits", "seed": None}


def test_without_ipython_the_settings_in_the_namespace_are_found() -> None:
    assert notebook_parameters({"seed": 4, "scratch": 1, "__name__": "__main__"}) == {"seed": 4}


# ---- from a command line


def test_a_name_that_was_deleted_since_is_no_parameter() -> None:
    assert notebook_parameters({"In": ["", "seed = 1\ngone = 2", "notebook_parameters(globals())"], "seed": 1}) == {"seed": 1}


def test_command_line_words_become_parameters() -> None:
    words = ["seed=3", "teacher_lr=1e-3", "guided=(True,)", "methods=['pd']", "data=digits", "run_folder=runs/a=b", "image_size=None"]
    assert parse_literals(words) == {
        "seed": 3,
        "teacher_lr": 1e-3,
        "guided": (True,),
        "methods": ["pd"],
        "data": "digits",
        "run_folder": "runs/a=b",
        "image_size": None,
    }
    assert parse_literals([]) == {}


@pytest.mark.parametrize("text", ["__import__('os').mkdir('made')", "seed + 1", "{[1]: 2}", "(" * 1000, "-" * 100_000 + "1", "", "1 2"])
def test_what_is_no_literal_stays_text_and_is_never_run(text: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_literals([f"run_folder={text}"]) == {"run_folder": text}
    assert list(tmp_path.iterdir()) == []


def test_a_word_without_a_value_is_refused() -> None:
    with pytest.raises(SferdError, match=re.escape("argument 'retrain'; allowed: name=value")):
        parse_literals(["seed=1", "retrain"])


def test_lists_given_as_text_are_lists() -> None:
    settings = make_settings(widths="[16, 16]", methods='["cd"]', guided="(False,)", run_folder="runs/[a]")
    assert (settings.widths, settings.methods, settings.guided, settings.run_folder) == ((16, 16), ("cd",), (False,), "runs/[a]")
    with pytest.raises(SferdError, match=re.escape("parameter 'widths' = '[16, x]': input should be a valid tuple")):
        make_settings(widths="[16, x]")


# By folder of results: what its studies leave to the command line, and of some older runs what does not bear on the rows kept of them.
BESIDE = {
    "digits-controls": {"contrast", "guidance_form", "guidance_weight", "guidance_threshold"},
    "digits-tuning": {"pd_lr", "ema_decay", "pd_loss", "batch_size", "pd_start_steps", "pd_stage_steps", "sampling_steps"},
    "fashion16-contrast": {"contrast"},
    "fashion16": {"guided", "sgp", "sgp_distil_steps", "sgp_start_steps"},
}


def test_every_recorded_run_has_a_study_that_makes_it_again() -> None:
    studies = [{"preset": "digits"}, *map(read_parameters, STUDIES)]
    made_now = [make_settings(**study).model_dump(mode="json") | {"run_folder": None} for study in studies]
    for record in sorted(RESULTS.glob("*/runs.json")):
        for run, about in json.loads(record.read_text()).items():
            then = {name: value for name, value in about["settings"].items() if name != "seed"}
            others = [{name for name, value in then.items() if now.get(name, value) != value} for now in made_now]
            beside = BESIDE.get(record.parent.name, set())
            assert any(names <= beside for names in others), (
                f"{record.parent.name}, {run}: no study has its settings but for {min(others, key=len)}"
            )
