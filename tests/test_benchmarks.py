"""The speed comparisons compare like with like."""

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sferd_lab.sample import ddim
from sferd_lab.unet import UNet

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
common = pytest.importorskip("common")
figure = pytest.importorskip("figure")
loops = pytest.importorskip("loops")
network = pytest.importorskip("network")
peer = pytest.importorskip("peer")
scores = pytest.importorskip("scores")


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("size", network.SHAPES)
def test_the_peer_has_our_arrangement_parameters_and_work(size):
    shape = network.SHAPES[size]
    ours, theirs = UNet(shape), peer.matched_peer(shape, size)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)
    x, phi = torch.randn(2, shape.channels, size, size), torch.rand(2)
    with torch.no_grad():
        assert theirs(x, phi).sample.shape == ours(x, phi).shape
        assert flops(lambda: theirs(x, phi)) == pytest.approx(flops(lambda: ours(x, phi)), rel=0.01)


def test_the_summary_takes_ratios_within_a_repetition():
    lines = [
        {"size": 8, "network": name, "repetition": repetition, "step_seconds": seconds, "forward_seconds": seconds / 4, "step_gflop": 2.0}
        for repetition, scale in ((1, 1.0), (2, 3.0), (3, 2.0))
        for name, seconds in (("sferd_lab", 0.01 * scale), ("diffusers, stock", 0.015 * scale))
    ]
    text = network.describe(pd.DataFrame(lines).assign(convolution_gflops=400.0))
    assert "8x8: a step 20.0 ms, 100 GFLOP/s, 25% of a large convolution's" in text
    assert "step, diffusers, stock: 1.50 times ours, 1.50 to 1.50" in text


def test_calls_take_turns_and_ratios_pair_what_was_timed_together():
    order = []
    calls = {"peer": lambda: order.append("peer"), "ours": lambda: order.append("ours")}
    rows = list(common.alternate(calls, 2, comparison="c", case="8x8"))
    assert order == ["peer", "ours"] * 3  # the first round warms up
    assert [(row["what"], row["repetition"]) for row in rows] == [("peer", 1), ("ours", 1), ("peer", 2), ("ours", 2)]
    table = pd.DataFrame(rows).assign(seconds=[3.0, 1.0, 8.0, 2.0])
    (found,) = common.ratios(table).to_dict("records")
    assert (found["over"], found["what"], found["ratio"], found["low"], found["high"]) == ("peer", "ours", 3.5, 3.0, 4.0)
    assert "peer takes 3.50 times (3.00 to 4.00) as long as ours" in common.describe(table)


def test_the_pipeline_and_our_loop_draw_the_same_images():
    size = 8
    denoiser = loops.network(size)
    schedule = loops.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    wrapped = loops.InPipeline(denoiser, loops.image_shape(size), schedule)
    pipeline = loops.DDIMPipeline(wrapped, schedule)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(3, generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="pt").images
    # The same walk on the pipeline's angles, which end at 0.
    start = torch.randn(3, *loops.image_shape(size), generator=torch.Generator().manual_seed(0))
    grid = torch.cat([wrapped.angles[pipeline.scheduler.timesteps].clamp_max(denoiser.phi_hi), torch.zeros(1)])
    with torch.inference_mode():
        *_, last = ddim(denoiser, start, grid)
    assert theirs == pytest.approx((last.x / 2 + 0.5).clamp(0, 1), abs=2e-3)


@pytest.mark.parametrize("comparison", scores.COMPARISONS[1:])
def test_the_metrics_peers_measure_the_same(monkeypatch, comparison):
    monkeypatch.setattr(scores, "N", 1200)
    values = [call() for call in scores.calls(comparison).values()]
    if comparison == "kernel distance":
        values = [float(value[0]) for value in values]
        assert values[0] == pytest.approx(values[1], rel=0.05)  # the peer's is a mean over subsets
    else:
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_the_readme_quotes_the_committed_tables():
    readme = (common.RESULTS.parent.parent / "README.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in readme.splitlines() if line.startswith("|")}

    def quoted(name, found, digits=2):
        for row in found.itertuples():
            assert f"{row.ratio:.{digits}f} [{row.low:.{digits}f}, {row.high:.{digits}f}]" in lines[name], (name, row)

    network_rows, loop = figure.network_ratios(), common.ratios(pd.read_csv(common.RESULTS / "loop_speed.csv"))
    network_rows = network_rows[network_rows["case"] != 28]
    quoted("diffusers' blocks in the same arrangement, over ours", network_rows[network_rows["comparison"] == "step"])
    quoted("forward pass: the same, over ours", network_rows[network_rows["comparison"] == "forward"])
    quoted("diffusers' DDIM loop over ours, the same network in both", loop[loop["comparison"] == "sampler, a U-Net"])
    quoted("guided PD step over the network passes it consists of (1 is ideal)", loop[loop["comparison"] == "distillation, guided PD"])
    quoted("images a second: one-step student over 64-step teacher", loop[loop["what"] == "student, 1 step"], 0)
    quoted("the same with SGP and prior", loop[loop["what"] == "student with SGP and prior, 1 step"], 0)

    gpu = pd.read_csv(common.RESULTS / "gpu_speed.csv")
    steps = gpu[gpu["what"] == "training step"].groupby(["preset", "precision"])["ms"].median()
    cifar, fashion = ([f"{steps[preset, precision]:.0f}" for precision in ("no", "tf32", "bf16")] for preset in ("cifar10", "fashion16"))
    assert f"took {cifar[0]} ms in single precision, {cifar[1]} with TF32, {cifar[2]} in bf16" in lines["GPU"]
    assert f"one of Fashion-MNIST's took {fashion[0]}, {fashion[1]} and {fashion[2]}, since" in lines["GPU"]
    memory = (gpu["memory_gb"] / gpu["planned_gb"])[(gpu["precision"] == "no") & (gpu["preset"] != "fashion16")].max()
    assert f"held up to {memory:.1f} times the planned memory" in readme
