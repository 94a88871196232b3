"""The peak of a training's memory does not grow with its length: ``python tests/faults/memory.py [steps=10000] [table=FILE] [stage ...]``.

Every stage trains in a process of its own, once ``steps`` steps and once a tenth of them, with ten checkpoints each; the tally, the two
peaks in MiB, goes to ``data/results/reliability.csv``. Exit status 0: they differ by less than 5% for every stage. Linux only.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "processes"))
import stages
import torch
from run import TABLE, record

from sferd_lab.data import Split
from sferd_lab.denoiser import Denoiser
from sferd_lab.diffusion import HALF_PI
from sferd_lab.distill import denoising_target
from sferd_lab.semantic import LatentDenoiser
from sferd_lab.train import TrainSettings, train


def prior() -> Denoiser:
    torch.manual_seed(0)
    return LatentDenoiser(2, width=32, depth=1)


# The stages of the tests with several processes, 4 x 4 images and 24 of them, and the latent prior's.
STAGES = {**stages.STAGES, "prior": (prior, denoising_target(0.0, HALF_PI), Split(stages.normal(24, 2), None), {})}
ALLOWED = 0.05


def peak(stage: str, steps: int) -> float:
    """Peak memory in MiB of a process that trains ``stage`` for so many steps."""
    command = [sys.executable, __file__, "train", stage, str(steps)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


def train_here(stage: str, steps: int) -> int:
    """The peak in KiB, of this process."""
    torch.set_num_threads(1)
    build, target, data, options = STAGES[stage]
    settings = TrainSettings(**stages.BASE | options | {"steps": steps, "checkpoint_every": steps // 10, "device": "cpu"})
    with TemporaryDirectory() as folder:
        for _ in train(build(), target, data, settings, Path(folder) / "checkpoint.safetensors"):
            pass
    # Not getrusage's, in which a process begins with its parent's.
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def main(words: list[str]) -> int:
    if words[:1] == ["train"]:
        print(train_here(words[1], int(words[2])))
        return 0
    options = dict(word.split("=", 1) for word in words if "=" in word)
    chosen = [word for word in words if "=" not in word] or list(STAGES)
    if unknown := [*(set(options) - {"steps", "table"}), *(set(chosen) - set(STAGES))]:
        raise SystemExit(f"{unknown[0]}; allowed: steps=..., table=..., {', '.join(STAGES)}")
    steps, bad = int(options.get("steps", "10000")), 0
    for stage in chosen:
        peaks = {count: peak(stage, count) for count in (steps // 10, steps)}
        record(
            "memory",
            stage,
            {f"peak MiB at {count:,} steps": round(size) for count, size in peaks.items()},
            Path(options.get("table", TABLE)),
        )
        growth = peaks[steps] / peaks[steps // 10] - 1
        bad += growth >= ALLOWED
        words = ", ".join(f"{size:.1f} MiB at {count:,} steps" for count, size in peaks.items())
        print(f"{stage}: {words}: {growth:+.2%}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
