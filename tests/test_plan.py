"""What an experiment will cost: the plan names a run's stages and counts what the run counts, and its arithmetic is the stated one.

Times are not measured here, where machines are noisy: ``python -m sferd_lab.plan check`` does that.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sferd_lab import plan as planning
from sferd_lab.config import Settings, make_settings
from sferd_lab.data import load_images
from sferd_lab.errors import SferdError
from sferd_lab.experiment import Row, Run
from sferd_lab.plan import (
    ACCELERATORS,
    META,
    SHAPES,
    STREAMS,
    Device,
    Speed,
    Stage,
    Trial,
    Work,
    accelerator,
    alternate,
    check,
    count,
    image_shape,
    main,
    plan,
    planned_stages,
)
from sferd_lab.train import TrainSettings, train
from sferd_lab.unet import UNet, UNetSettings


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFERD_LAB_TINY", "1")


def make(preset: str = "digits", **given: Any) -> Settings:
    return make_settings(preset, **{"widths": [8, 8], "retrain": True, "device": "cpu", **given})


def recorded(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> tuple[pd.Series, dict[str, float]]:
    """TFLOPs a stage as a real run writes them, and FLOPs an image of each row, as a run counts them; nothing is scored."""
    images: dict[str, float] = {}

    def evaluate(run: Run, row: Row, denoiser: Any, prior: Any = None, **condition: Any) -> None:
        images[row.label] = run._flops(row, denoiser, prior, condition)

    monkeypatch.setattr(Run, "evaluate", evaluate)
    monkeypatch.setattr(Run, "code_errors", lambda *_: None)
    run = Run(settings, progress=False)
    for _ in run.rows():
        pass
    return pd.read_csv(run.folder / "stages.csv").set_index("stage")["tflop"], images


@pytest.mark.parametrize(
    "variant",
    [
        # Guided and plain, both methods, the conditional pair, a latent network, Heun's sampler.
        {"prior": "diffusion", "teacher_samplers": ["ddim", "heun"]},
        # A target network, Heun's teacher step, guidance by a mask that looks at the image, batches in parts, blocks computed twice.
        {"methods": ["cd"], "guided": [True], "sgp_target": "walk", "prior": "kernel", "cd_solver": "heun", "cd_target_decay": 0.9}
        | {"guidance_mask": "edge", "accumulate": 2, "gradient_checkpointing": True},
        # With one step the data target asks no teacher, with two it does. Labels, guidance in every stage.
        {"methods": ["pd"], "guided": [True], "sgp_target": "data", "sgp_sampling_steps": [1, 2], "class_conditional": True}
        | {"sgp_joint": True, "guidance_form": "x0", "guide_every_stage": True},
    ],
    ids=["conditional", "walk", "data"],
)
def test_stages_and_flops_are_those_that_a_run_records(variant: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make(run_folder=str(tmp_path / "run"), **variant)
    table = plan(settings, "A100").set_index("stage")
    assert not (tmp_path / "run").exists()
    tflop, images = recorded(settings, monkeypatch)
    trained = table[table["kind"] == "train"]
    assert trained.index.tolist() == tflop.index.tolist()
    assert trained["tflop"].tolist() == tflop.tolist()
    drawn = table[(table["kind"] == "sample") & ~table.index.str.contains("code errors")]
    assert drawn.index.tolist() == list(images)
    assert (drawn["images"] == settings.n_samples).all()
    assert (drawn["tflop"] / drawn["images"] * 1e12).tolist() == pytest.approx(list(images.values()), rel=1e-12)


def test_updates_and_parameters_are_the_settings_and_the_networks() -> None:
    table = plan(make(guided=[False], prior="diffusion", prior_steps=7), "A100").set_index("stage")
    # TINY's steps.
    assert table.loc[["teacher", "pd-4", "cd", "teacher-sgp", "pd-sgp-1", "teacher-sgp-latent"], "updates"].tolist() == [4, 2, 2, 2, 2, 7]
    network = UNet(UNetSettings(1, (8, 8), 1, (0, 1), 2))
    size = sum(part.numel() for part in network.parameters())
    assert table.loc["teacher", ["parameters", "trained"]].tolist() == [size, size]
    # The gradient predictor is trained on a frozen teacher.
    assert table.loc["teacher-sgp", "parameters"] - table.loc["teacher-sgp", "trained"] == size
    assert table.loc["pd, 1 step", "trained"] == 0


def test_a_shipped_teacher_costs_nothing_and_one_of_another_shape_is_refused() -> None:
    assert "teacher" not in planned_stages(make_settings("digits", methods=[], sgp=False))
    assert "teacher" in planned_stages(make(methods=[], sgp=False))
    with pytest.raises(SferdError, match="set retrain = True"):
        plan(make(retrain=False), "A100")


def test_shapes_are_those_of_the_data_sets() -> None:
    assert set(SHAPES) == set(get_args(Settings.model_fields["data"].annotation))
    for name in ("digits", "patches", "mixture"):
        data = load_images(name)
        shape = image_shape(make(data=name))
        assert (data.shape, data.classes) == (shape, SHAPES[name][1])
        assert (len(data.train.images), len(data.reference.images)) == SHAPES[name][2:]


def test_a_network_far_beyond_this_machine_is_planned_for_data_that_is_not_here() -> None:
    settings = make(data="cifar10", widths=[256, 256, 512], blocks=3, attention=[1, 2], batch_size=4096, methods=[], sgp=False)
    line = plan(settings, "H100").set_index("stage").loc["teacher"]
    with META:
        network = UNet(UNetSettings(3, (256, 256, 512), 3, (1, 2), 2))
    assert line["parameters"] == sum(part.numel() for part in network.parameters()) > 60e6
    # 4,096 images of 32x32 keep 4.3 GB for each tensor of 256 channels: no accelerator has room for a step.
    assert line["activations"] > 300
    assert not line["fits"]


def test_a_folder_needs_a_size_and_a_data_set_one_of_its_own() -> None:
    folder = make(data="folder", data_folder="nowhere", image_size=24)
    assert image_shape(folder) == (3, 24, 24)
    for settings, words in (
        (folder.model_copy(update={"image_size": None}), "image_size = None for data = 'folder'; allowed: a number"),
        (make(image_size=5), "image_size = 5 for data = 'digits'; allowed: 8, 4"),
        (folder.model_copy(update={"data": "paintings"}), "data = 'paintings' cannot be planned; allowed: digits"),
    ):
        with pytest.raises(SferdError, match=words):
            plan(settings, "A100")


# ---- counting


def test_fused_attention_is_counted_though_torchs_counter_passes_over_it_on_a_cpu() -> None:
    batch, heads, positions, size = 3, 2, 16, 5
    q, k, v = (torch.empty(batch, heads, positions, size, device=META, requires_grad=True) for _ in range(3))
    product = 2 * batch * heads * positions * positions * size  # one matrix product: a multiplication and an addition each
    forward = count(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert (forward.flops, forward.attention) == (2 * product, 2 * product)
    # Backward: the weights again, and the gradients of weights, values, queries and keys.
    both = count(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), lambda out: out.sum().backward())
    assert (both.flops, both.attention) == (7 * product, 7 * product)


def test_bytes_are_counted_once_a_storage_and_given_back() -> None:
    x = torch.empty(250, device=META)  # 1,000 bytes, there before

    def call() -> torch.Tensor:
        y = x + 1  # 1,000
        z = y.view(10, 25).mT * 2  # 2,000: the view shares its storage
        del y
        return z.exp()  # 2,000

    work = count(call)
    assert (work.peak, work.kept) == (2000, 1000)
    assert work.operations == 3


@pytest.mark.parametrize("saving", [{}, {"accumulate": 2, "gradient_checkpointing": True}], ids=["plain", "saving"])
def test_memory_is_what_real_steps_take_at_their_peak(saving: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 32
    given = {"widths": [16, 32], "batch_size": size, "methods": ["cd"], "guided": [False], "cd_target_decay": 0.9, **saving}
    settings = make("mixture", image_size=16, run_folder=str(tmp_path / "run"), **given)
    lines = plan(settings, "A100").set_index("stage")
    measured: dict[str, float] = {}

    def peak(build: Callable[[], Any], target: Any, data: Any, training: TrainSettings) -> float:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            for _ in train(build(), target, data, training):
                pass
        profiled.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
        totals = [event["args"]["Total Allocated"] for event in events]
        return max(totals) - (totals[0] - events[0]["args"]["Bytes"])  # the total goes on from one profile to the next

    def measure(run: Run, name: str, build: Callable[[], Any], target: Any, data: Any, seed_of: str | None = None, **options: Any) -> Any:
        training = TrainSettings(**{**options, "steps": 2, "batch_size": size, "device": "cpu", **saving})
        measured.setdefault(name, peak(build, target, data, training))
        return build().eval().requires_grad_(False)

    monkeypatch.setattr(Run, "train_stage", measure)
    run = Run(settings, progress=False)
    teacher = run.teacher()
    run.consistency(teacher, False)
    run.consistency(teacher, False, run.semantic_teacher(teacher))
    assert list(measured) == ["teacher", "cd", "teacher-sgp", "cd-sgp"]
    for name, bytes_ in measured.items():
        # The profiler does not see a teacher that was there before, which is as large as its student.
        others = 4 * lines.loc[name, "parameters"] if name.startswith("cd") else 0
        # 0.97 to 1.00 where this was written; kernels bring their own workspace on other machines.
        assert (1e9 * lines.loc[name, "memory"] - others) / bytes_ == pytest.approx(1, abs=0.1), name


# ---- devices


def test_hours_are_flops_over_the_assumed_share_of_the_peak() -> None:
    settings = make(methods=["pd"], guided=[False], sgp=False)
    stage = planned_stages(settings)["pd-4"]
    sheet = ACCELERATORS["A100"]

    def hours(efficiency: float = 0.5, **given: Any) -> float:
        changed = settings.model_copy(update=given)
        return plan(changed, "A100", efficiency).set_index("stage").loc["pd-4", "hours"]

    def seconds(target: float, student: float) -> float:  # two updates at half of these peaks, in TFLOP/s
        return 2 * (stage.inference.flops / (1e12 * target) + stage.update.flops / (1e12 * student)) / 0.5

    assert hours() == pytest.approx(seconds(sheet.fp32, sheet.fp32) / 3600)
    assert hours(0.25) == pytest.approx(2 * hours())
    assert hours(precision="tf32") == pytest.approx(seconds(sheet.tf32, sheet.tf32) / 3600)
    # Mixed precision is the student's alone.
    assert hours(precision="bf16") == pytest.approx(seconds(sheet.tf32, sheet.bf16) / 3600)


SPEEDS = pd.read_csv(Path(__file__).parent.parent / "data" / "results" / "gpu_speed.csv").groupby(["preset", "precision"])


@pytest.mark.parametrize(("preset", "precision"), SPEEDS.groups)
def test_the_times_measured_on_a_gpu_are_those_planned_for_it(preset: str, precision: str) -> None:
    rows = SPEEDS.get_group((preset, precision))
    assert set(rows["device"]) == {"NVIDIA H200"}
    measured = rows.groupby("what")["ms"].median() / 1000
    settings = make_settings(
        preset, precision=precision, batch_size=int(rows["batch"].iloc[0]), methods=["cd"], guided=[False], sgp=False, retrain=True
    )
    stage, device = planned_stages(settings)["teacher"], accelerator("H200", precision)
    assert device.seconds(stage) == pytest.approx(measured["training step"], rel=0.25)
    network = UNetSettings(*image_shape(settings)[:1], settings.widths, settings.blocks, settings.attention, settings.heads)
    with META, torch.inference_mode():
        model, x = UNet(network), torch.empty(settings.batch_size, *image_shape(settings))
        work = count(lambda: model(x, 1.0))
    assert device.inference.seconds(work) == pytest.approx(measured["pass"], rel=0.25)


def test_another_product_is_planned_at_the_shares_that_one_was_measured_to_reach() -> None:
    large, small = Work(flops=1e15, operations=1), Work(flops=1, operations=1000)
    for name, sheet in ACCELERATORS.items():
        device = accelerator(name, "bf16")
        assert device.inference.seconds(large) == pytest.approx(1e3 / (0.21 * sheet.tf32))
        assert device.training.seconds(large) == pytest.approx(1e3 / (0.12 * sheet.bf16))
        # Launches do not wait for a product.
        assert (device.inference.seconds(small), device.training.seconds(small)) == pytest.approx((0.039, 0.075))


def test_work_does_not_depend_on_the_parts_and_processes_share_the_hours() -> None:
    given = {"methods": ["pd"], "guided": [False], "batch_size": 24, "n_samples": 96, "sampling_batch": 12}
    whole, parts, shared = (plan(make(**given, **how), "A100", 0.3).set_index("stage") for how in ({}, {"accumulate": 4}, {"processes": 4}))
    trained, drawn = whole["kind"] == "train", whole["kind"] == "sample"
    for other in (parts, shared):
        assert other.index.tolist() == whole.index.tolist()
        assert other["tflop"].tolist() == pytest.approx(whole["tflop"].tolist())
        assert (other["batch"][trained] == 6).all()  # 24 in 4
        assert (other["activations"][trained] < 0.3 * whole["activations"][trained]).all()
    assert parts["hours"].tolist() == pytest.approx(whole["hours"].tolist())
    # Four devices work at once, but each of them encodes all training images, and tries the codes of all held-out ones.
    alike = whole.index.str.contains("code errors") | (whole["kind"] == "prior")
    for rows, devices in ((trained, 4), (drawn & ~alike, 4), (alike, 1)):
        assert rows.any()
        assert shared["hours"][rows].tolist() == pytest.approx((whole["hours"][rows] / devices).tolist())


def test_what_cannot_be_parted_or_timed_is_refused() -> None:
    with pytest.raises(SferdError, match="batch_size = 8 in 2 processes x accumulate = 3 parts; allowed: equal parts"):
        plan(make(batch_size=8, processes=2, accumulate=3), "A100")
    with pytest.raises(SferdError, match="processes = 2 with device = here, whose cores they share; allowed: 1, or a named device"):
        plan(make(processes=2, device="cpu"))


@pytest.mark.parametrize("name", ACCELERATORS)
def test_half_precision_has_twice_the_peak_of_tf32(name: str) -> None:
    # Within the rounding of the data sheets, on every product listed; a number with sparsity beside one without would show.
    sheet = ACCELERATORS[name]
    assert sheet.bf16 == pytest.approx(2 * sheet.tf32, rel=0.02)
    assert sheet.fp32 < sheet.tf32


def test_unknown_devices_and_impossible_shares_are_refused() -> None:
    for arguments, words in (
        (("P4", "no", 0.3), "device = 'P4'; allowed: here, A100"),
        (("A100", "no", 0.0), "efficiency = 0.0; allowed: above 0"),
        (("A100", "no", 1.5), "efficiency = 1.5; allowed"),
    ):
        with pytest.raises(SferdError, match=words):
            accelerator(*arguments)
    with pytest.raises(SferdError, match="batch_size = 3 with device = here; allowed: 4 or more"):
        plan(make(batch_size=3))


def test_fits_compares_the_sum_of_the_parts_with_the_devices_memory() -> None:
    settings, speed = make(methods=["pd"], guided=[False], sgp=False), Speed(1e9, 1e9)
    line = plan(settings, Device("toy", 10**9, speed, speed)).set_index("stage").loc["pd-4"]
    parts = line[["weights", "gradients", "optimiser", "averages", "activations"]]
    assert line["memory"] == pytest.approx(parts.sum())
    # Model, teacher; gradients; two moments; one average: all as large as the network.
    assert parts.tolist()[:4] == pytest.approx([2 * parts["averages"], parts["averages"], 2 * parts["averages"], parts["averages"]])
    for room, fits in ((1.001, True), (0.999, False)):
        device = Device("toy", room * 1e9 * line["memory"], speed, speed)
        assert plan(settings, device).set_index("stage").loc["pd-4", "fits"] == fits


def test_a_target_network_is_one_average_more() -> None:
    speed = Speed(1e9, 1e9)
    for decay, copies in ((0.0, 1), (0.9, 2)):
        settings = make(methods=["cd"], guided=[False], sgp=False, cd_target_decay=decay)
        line = plan(settings, Device("toy", 10**9, speed, speed)).set_index("stage").loc["cd"]
        assert line["averages"] == pytest.approx(copies * 4e-9 * line["parameters"])


# ---- this machine


LARGE, SMALL = Work(flops=8e9, operations=100), Work(flops=2e9, operations=100)


def timed(fast: Speed, slow: Speed) -> tuple[Trial, dict[str, float]]:
    works = {f"{kind}, {part}": work for kind in ("inference", "training") for part, work in (("batch", LARGE), ("part", SMALL))}
    seconds = {name: (fast if name.startswith("inference") else slow).seconds(work) for name, work in works.items()}
    return Trial({}, works), seconds | {"streams": 0.5}


def test_a_trial_tells_rates_from_fixed_costs() -> None:
    fast, slow = Speed(4e9, 4e9, 1e-3), Speed(1e9, 1e9, 5e-3)
    trial, seconds = timed(fast, slow)
    here = trial.device(seconds, memory=5)
    for found, true in ((here.inference, fast), (here.training, slow)):
        assert (found.flops, found.attention, found.operation) == pytest.approx((true.flops, true.attention, true.operation))
    stage = Stage("x", "train", 4, 1, 0, inference=Work(3e9, operations=7), update=Work(1e9, operations=2), streams=40)
    assert here.seconds(stage) == pytest.approx((3 / 4 + 7e-3) + (1 + 10e-3) + 40 * 0.5 / STREAMS)


def test_a_noisy_clock_gives_no_negative_cost_and_no_rate_beyond_twice_the_measured() -> None:
    trial, seconds = timed(Speed(4e9, 4e9), Speed(4e9, 4e9))
    for short, fixed, rate in ((0.1, 0.0, 4e9), (2.5, 0.01, 8e9)):  # the part took too little, or longer than the whole batch of 2 s
        here = trial.device(seconds | {"inference, part": short}, memory=5)
        assert (here.inference.operation, here.inference.flops) == pytest.approx((fixed, rate))


def test_calls_take_turns_and_the_first_of_a_turn_is_not_timed() -> None:
    clock, log = [0.0], []

    def call(name: str, seconds: Iterator[float]) -> Callable[[], None]:
        def spend() -> None:
            log.append(name)
            clock[0] += next(seconds)

        return spend

    calls = {"a": call("a", iter([9, 1, 9, 2, 9, 30])), "b": call("b", itertools.repeat(5))}
    assert alternate(calls, 3, lambda: clock[0]) == {"a": 2, "b": 5}  # medians
    assert log == ["a", "a", "b", "b"] * 3


def test_the_check_times_every_kind_of_stage_against_the_plan() -> None:
    ticks = itertools.count()
    table = check("digits", 1, clock=lambda: float(next(ticks)), widths=[8, 8], sampling_batch=4)
    assert set(table["stage"]) >= {
        "teacher",
        "pd-1",
        "pd-guided-1",
        "cd",
        "cd-guided",
        "teacher-sgp",
        "teacher-sgp-latent",
        "cd-guided-sgp",
    }
    assert {"teacher, 4 steps", "pd, 1 step", "cd+guidance+sgp (prior), 1 step"} <= set(table["stage"])
    assert (table["measured_ms"] == 1000).all()  # the clock ticks once for each call
    assert table["ratio"].tolist() == pytest.approx((table["predicted_ms"] / 1000).tolist())
    # A teacher's step is what the calibration timed: one second, as the clock says.
    assert table.set_index("stage").loc["teacher", "ratio_flops"] == pytest.approx(1)


# ---- the command


def test_the_command_prints_stages_sums_and_what_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["preset=digits", "device=A100", "efficiency=0.2", "methods=['pd']", "guided=[False]", "sgp=False"])
    out = capsys.readouterr().out
    assert "pd-4" in out
    assert "h to train" in out
    assert "A100 at 20% of its peak, an assumption. Scores" in out
    main(["preset=digits", "device=A100", "methods=['pd']", "guided=[False]", "sgp=False"])
    assert "A100 at the shares of its peak that an H200 reached. Scores" in capsys.readouterr().out


def test_the_command_check_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"stage": "teacher", "ratio": 1.2}
    monkeypatch.setattr(
        planning, "check", lambda preset, turns: pd.DataFrame([{"preset": preset, **row}, {"preset": preset, **row, "ratio": 1.3}])
    )
    monkeypatch.setattr(planning, "shipped_folder", lambda: tmp_path)
    threads = torch.get_num_threads()
    try:
        main(["check"])
    finally:
        torch.set_num_threads(threads)
    assert pd.read_csv(tmp_path / "results" / "plan.csv")["preset"].tolist() == ["digits", "digits", "fashion16", "fashion16"]
    assert "2 of 4 within 25%" in capsys.readouterr().out
