"""Every case on a device without values: what was left on the CPU meets what was not, and raises, or is seen to compute there.

``train`` itself runs here, and ``accelerate`` with it. What this cannot see: values, what a real device's random generators and mixed
precision do, and ``device.type == "cuda"``. ``test_accelerator.py`` does, where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import CASES, IMAGES, denoise, losses, normal, samples, teacher
from fake import ACCELERATOR, SUPPORTED, TORCH, FakeDevice, fake_device
from torch import Tensor
from torch.nn import functional as F

from sferd_lab import metrics
from sferd_lab.denoiser import Denoiser, NetworkDenoiser, Prediction
from sferd_lab.diffusion import Angle
from sferd_lab.distill import Batch, Target
from sferd_lab.experiment import Run

pytestmark = [
    pytest.mark.skipif(ACCELERATOR is not None, reason="a session has one accelerator, and this machine has a real one"),
    pytest.mark.skipif(not SUPPORTED, reason=f"the fake device rests on private parts of torch {TORCH}, this is {torch.__version__}"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]
# Where a network's time goes.
WORK = {"convolution", "convolution_backward", "native_group_norm", "addmm", "mm", "bmm", "_fused_adamw_"}
MIXED = "Expected all tensors to be on the same device"


@pytest.fixture
def fake() -> Iterator[FakeDevice]:
    with fake_device() as mode:
        yield mode


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_on_the_device(name: str, fake: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_check_images", lambda name, images, real: images)  # it looks at values
    monkeypatch.setattr(Run, "_check_fit", lambda run: None)  # it passes a blank image through the network, on the CPU
    CASES[name](fake.device)
    assert fake.on_device
    assert not fake.on_cpu & WORK


# ---- it would have been seen


class Forgetful(NetworkDenoiser):
    """Adds to its prediction a tensor that it makes where torch makes them unless told: on the CPU."""

    def predict(self, x: Tensor, phi: Angle, *rest: object, **condition: Tensor) -> Prediction:
        return super().predict(x + 0.1 * torch.arange(x.shape[-1]), phi, *rest, **condition)


def test_a_denoiser_that_makes_a_tensor_on_the_cpu_is_caught_in_training_and_in_sampling(fake: FakeDevice) -> None:
    for use in (lambda model: losses(fake.device, model, denoise), lambda model: samples(model, fake.device)):
        use(teacher())
        with pytest.raises(RuntimeError, match=MIXED):
            use(Forgetful(teacher().network))


def test_a_network_that_stays_on_the_cpu_with_all_it_reads_is_caught(fake: FakeDevice) -> None:
    left = teacher()

    def target(batch: Batch, student: Denoiser) -> Target:
        left(IMAGES.images, 0.5)
        return denoise(batch, student)

    losses(fake.device, teacher(), denoise)
    assert not fake.on_cpu & WORK
    losses(fake.device, teacher(), target)
    assert fake.on_cpu & WORK


OPERATIONS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda there, here: there + here,
    "sum in place": lambda there, here: here.add_(there),
    "product of matrices": lambda there, here: there @ here,
    "convolution": lambda there, here: F.conv2d(there[None, None], here[None, None]),
    "linear layer": lambda there, here: F.linear(there, here),
    "choice": lambda there, here: torch.where(there > 0, here, here),
    "concatenation": lambda there, here: torch.cat([there, here]),
    "index of a tensor on the CPU": lambda there, here: here[(there > 0).long()],
    "embedding": lambda there, here: F.embedding((there > 0).long(), here),
    "search": lambda there, here: torch.searchsorted(here.flatten().sort().values, there),
    "interpolation": lambda there, here: torch.lerp(there, there, here),
}


@pytest.mark.parametrize("inference", [False, True], ids=["grad", "inference"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_on_tensors_of_both_devices_raises(operation: str, inference: bool, fake: FakeDevice) -> None:
    with torch.inference_mode(inference):
        here, there = normal(3, 3), normal(3, 3).to(fake.device)
        OPERATIONS[operation](here, here)
        OPERATIONS[operation](there, there)
        with pytest.raises(RuntimeError, match=MIXED):
            OPERATIONS[operation](there, here)


def test_what_a_gpu_takes_from_the_cpu_is_taken_here_too(fake: FakeDevice) -> None:
    there = normal(3, 3).to(fake.device)
    for result in (there * torch.tensor(2.0), there[torch.tensor([0, 2])], there.copy_(normal(3, 3)), torch.zeros_like(there)):
        assert result.device == fake.device


def test_values_read_back_are_made_up_and_the_cpus_are_real(fake: FakeDevice) -> None:
    values = normal(5)
    assert values.tolist() == normal(5).tolist()
    back = values.to(fake.device).cpu()
    assert back.device.type == "cpu"
    assert not torch.equal(back, values)
    assert (values.to(fake.device) > 0).any()
    assert not (values.to(fake.device) > 0).all()


def test_modules_move_with_their_parameters_staying_the_same_objects(fake: FakeDevice) -> None:
    model = teacher()
    before = list(model.parameters())
    assert all(now is then for now, then in zip(model.to(fake.device).parameters(), before, strict=True))
    assert {parameter.device for parameter in before} == {fake.device}
