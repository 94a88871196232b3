"""Speed of a training step and of a forward pass, our U-Net against diffusers'; ``data/results/network_speed.csv`` keeps the numbers.

    python tests/benchmarks/network.py

``network_profile.csv`` says where the time of our training step goes.

Each network runs in a process of its own, and the processes take turns: the peers' as they come, ours with the memory setting that
``train`` makes, so our forward pass is that of a process that has trained. The same widths, blocks, attention, batch, optimiser (fused
AdamW), precision (float32) and threads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pandas as pd
import torch
from common import in_a_process, median_seconds, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sferd_lab.train import keep_memory
from sferd_lab.unet import UNet, UNetSettings

# By image size: the digits preset's network, two of 32-32-64 channels, and the patches preset's.
SHAPES = {
    8: UNetSettings(1, (32, 32), 1, (0, 1)),
    16: UNetSettings(1, (32, 32, 64), 1, (1, 2)),
    28: UNetSettings(1, (32, 32, 64), 1, (1, 2)),
    32: UNetSettings(3, (32, 64, 64), 1, (1, 2)),
}
BATCH, REPETITIONS, WARM_UP, TIMED = 64, 3, 4, 9


def steps(who: str, size: int) -> tuple[Callable[[], None], Callable[[], Tensor], nn.Module]:
    """A training step and a forward pass of that network, and the network."""
    shape = SHAPES[size]
    torch.manual_seed(0)
    x, goal = torch.randn(2, BATCH, shape.channels, size, size)
    phi = 1.5 * torch.rand(BATCH)
    if who == "sferd_lab":
        keep_memory()
        network: nn.Module = UNet(shape)
        predict = lambda: network(x, phi)  # noqa: E731
    else:
        from peer import matched_peer, stock_peer

        network = (matched_peer if who == "diffusers, same arrangement" else stock_peer)(shape, size)
        predict = lambda: network(x, 600 * phi, return_dict=False)[0]  # noqa: E731
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (predict() - goal).square().mean().backward()
        optimizer.step()

    return step, predict, network


def measure(who: str, size: int) -> dict[str, float]:
    """One process's numbers: seconds of a training step and of a forward pass, parameters, and FLOPs of a step."""
    step, predict, network = steps(who, size)
    with FlopCounterMode(display=False) as counter:
        step()
    found = {"step_seconds": median_seconds(step), "step_gflop": counter.get_total_flops() / 1e9}
    with torch.inference_mode():
        found["forward_seconds"] = median_seconds(predict)
    return found | {"parameters": sum(parameter.numel() for parameter in network.parameters())}


# The kernels that the bulk of a training step's work is in, by the names that torch's profiler gives them.
KINDS = {"convolution": ("mkldnn_convolution", "convolution_backward"), "attention": ("scaled_dot_product",)}


def profile(size: int) -> dict[str, float]:
    """Milliseconds of one of our training steps spent in convolutions, in attention, and in all else."""
    step, _, _ = steps("sferd_lab", size)
    for _ in range(WARM_UP):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(TIMED):
            step()
    spent = {event.key: event.self_cpu_time_total / 1000 / TIMED for event in profiler.key_averages()}
    found = {kind: sum(time for key, time in spent.items() if any(part in key for part in parts)) for kind, parts in KINDS.items()}
    return found | {"all else": sum(spent.values()) - sum(found.values())}


def convolution_peak() -> dict[str, float]:
    """GFLOP/s of a large matrix product, and of the better memory layout of a 3x3 convolution of 256 channels at 32x32."""
    a = torch.randn(2048, 2048)
    weight = torch.randn(256, 256, 3, 3)
    images = torch.randn(16, 256, 32, 32)
    flop = 2 * 16 * 256 * 256 * 9 * 32 * 32
    rates = []
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = images.to(memory_format=layout), weight.to(memory_format=layout)
        rates.append(flop / median_seconds(lambda laid=laid: nn.functional.conv2d(*laid, padding=1)) / 1e9)
    return {"matmul_gflops": 2 * 2048**3 / median_seconds(lambda: a @ a) / 1e9, "convolution_gflops": max(rates)}


def describe(table: pd.DataFrame) -> str:
    """For each size: our medians, and the peers' over ours within a repetition, median and range."""
    lines = []
    for size, part in table.groupby("size"):
        wide = part.pivot(index="repetition", columns="network", values=["step_seconds", "forward_seconds"])
        ours = part[part["network"] == "sferd_lab"]
        rate = (ours["step_gflop"] / ours["step_seconds"]).median()
        share = (ours["step_gflop"] / ours["step_seconds"] / ours["convolution_gflops"]).median()
        lines.append(
            f"{size}x{size}: a step {1000 * ours['step_seconds'].median():.1f} ms, {rate:.0f} GFLOP/s, {share:.0%} of a large convolution's"
        )
        for what in ("step_seconds", "forward_seconds"):
            for peer in wide[what].columns.drop("sferd_lab"):
                ratio = wide[what][peer] / wide[what]["sferd_lab"]
                name = what.removesuffix("_seconds")
                lines.append(f"  {name}, {peer}: {ratio.median():.2f} times ours, {ratio.min():.2f} to {ratio.max():.2f}")
    return "\n".join(lines)


def main() -> None:
    """Take turns, write the table, print its summary."""
    rows = []
    for repetition in range(1, REPETITIONS + 1):
        peak = in_a_process(__file__, "peak")
        for size in SHAPES:
            for who in ("sferd_lab", "diffusers, same arrangement", "diffusers, stock"):
                about = {"size": size, "network": who, "repetition": repetition, "batch": BATCH}
                rows.append(about | in_a_process(__file__, who, str(size)) | peak)
    print(describe(write(rows, "network_speed")))
    shares = [
        {"size": size, "kind": kind, "ms": ms} for size in SHAPES for kind, ms in in_a_process(__file__, "profile", str(size)).items()
    ]
    print(write(shares, "network_profile").pivot(index="size", columns="kind", values="ms").round(1))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        who, *size = sys.argv[1:]
        print(json.dumps(convolution_peak() if who == "peak" else profile(int(*size)) if who == "profile" else measure(who, int(*size))))
