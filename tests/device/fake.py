"""A device that needs no GPU: tensors on "fakegpu" have a shape, a dtype and a device but no values; those of the CPU stay real.

As on a GPU, an operation on tensors of both raises. What is read back from the device is made up, so that whatever logs a loss, checks a
mask or writes a file goes on: values say nothing here. It rests on private parts of one version of torch. A process that has such a device
has it for good, in the place of a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

NAME = "fakegpu"
# The torch whose private parts are used; constraints.txt pins it.
TORCH = "2.13"
SUPPORTED = torch.__version__.startswith(f"{TORCH}.")

# Asked before there is a fake one, which would answer.
ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default)


class FakeDevice(FakeTensorMode):
    """The mode under which ``device`` computes; ``on_device`` and ``on_cpu`` are the names of the operations done there so far."""

    # torch would otherwise ask the device for memory, which it has not.
    avoid_device_init = True

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.device = torch.device(NAME, 0)
        self.on_device: set[str] = set()
        self.on_cpu: set[str] = set()

    def dispatch(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do one operation: for real if the device has no part in it."""
        kwargs, name = kwargs or {}, func.__name__.split(".")[0]
        leaves = tree_leaves((args, kwargs))
        wanted = next((leaf.type for leaf in leaves if isinstance(leaf, torch.device)), None)
        if wanted != NAME and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            self.on_cpu.add(name)
            return func(*args, **kwargs)
        if name == "to":  # in inference mode it comes whole, and FakeTensorMode would really move what is on the CPU
            with self:
                return func.decompose(*args, **kwargs)
        if func in READS:
            return self.read(args[0])
        if name == "_to_copy" and wanted == "cpu":
            return made_up(args[0], kwargs.get("dtype"))
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            return args[0].copy_(made_up(args[1]))
        self.on_device.add(name)
        if name not in ("_to_copy", "copy_"):
            check_one_device(name, args, kwargs)
        result = super().dispatch(func, types, args, kwargs)
        if name in ("any", "all"):
            result.truth = name == "any"  # of a mask some is marked and some is not
        return result

    def read(self, tensor: Tensor) -> Any:
        """The number in a tensor of one element."""
        return getattr(tensor, "truth", True) if tensor.dtype == torch.bool else made_up(tensor).item()


def check_one_device(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise RuntimeError when some tensor is on the CPU. FakeTensorMode does, but not for convolutions and indices.

    As on a GPU, a number in a tensor of no dimensions may stay on the CPU, and so may the indices into a tensor on the device.
    """
    if name.startswith("index") and isinstance(args[0], FakeTensor):
        args = [argument for argument in args if not isinstance(argument, Sequence)]
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) and leaf.ndim:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got one of shape {tuple(leaf.shape)} on the CPU")


def made_up(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sizes of normal noise, on the CPU in place of ``tensor``: positive, as losses are, and spread, as what is standardised must be."""
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).abs().to(dtype or tensor.dtype)


def register() -> None:
    """Make "fakegpu" a name of a device, and the accelerator that torch finds."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)


@contextmanager
def fake_device() -> Iterator[FakeDevice]:
    """Within it the registered "fakegpu" computes, accelerate chooses it, and modules move to it in place."""
    swap = torch.__future__.get_swap_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, FakeDevice() as mode:
        patch.setenv("ACCELERATE_TORCH_DEVICE", str(mode.device))
        # A module's parameters must stay the objects they are, for the optimiser; torch refuses to swap what has weak references, as
        # those have which the mode has seen, and nothing here minds.
        torch.__future__.set_swap_module_params_on_conversion(True)
        patch.setattr(torch.utils, "weakref", SimpleNamespace(getweakrefs=lambda tensor: []))
        try:
            yield mode
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swap)
