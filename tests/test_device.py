"""Nothing is left on the CPU: ``tests/device`` passes, in a process of its own, since a fake accelerator is there for good."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from device.cases import CASES
from device.fake import ACCELERATOR, SUPPORTED, TORCH

ROOT = Path(__file__).parent.parent


def test_every_case_runs_on_the_fake_device_or_on_this_machines_accelerator() -> None:
    command = [sys.executable, "-m", "pytest", "tests/device", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)[1])
    # Each case by two sets of the CPU's kernels, and where one can be had, on an accelerator.
    assert passed >= len(CASES) * (1 + (SUPPORTED or ACCELERATOR is not None))


def test_the_fake_device_is_written_for_the_torch_that_is_pinned() -> None:
    assert f"\ntorch=={TORCH}." in (ROOT / "constraints.txt").read_text()
